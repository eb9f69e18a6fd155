# Renders include/fastermoe.h: its sections as headings, comments between declarations as text, declarations as code with the
# comments they carry, and an index of all functions. `make docs` writes docs/reference.md with it; `make test` compares.
# What Markdown would read as its own, but not in words that are code.
function text(line,  part, parts, i, all) {
  gsub(/  +/, " ", line)
  parts = split(line, part, "`")
  for (i = 1; i <= parts; i++) {
    if (i % 2) gsub(/[\\*<>|]/, "\\\\&", part[i])
    all = all (i > 1 ? "`" : "") part[i]
  }
  return all
}
function end_code() {
  if (code != "") printf "```c\n%s```\n\n", code
  code = ""
}
function end_paragraph() {
  if (label != "") label = "**" text(label) "** "
  if (label paragraph != "") print label text(paragraph) "\n"
  label = paragraph = ""
}
# One line of a comment, without its frame. A word or two, then some spaces, is what a paragraph is about.
function prose(line,  name) {
  if (line ~ /^ *$/) { end_paragraph(); return }
  if (match(line, /^[A-Z][A-Za-z]*( [a-z]+)?\.?   */) && RLENGTH >= 10) {
    end_paragraph()
    label = substr(line, 1, RLENGTH)
    sub(/ +$/, "", label)
    line = substr(line, RLENGTH + 1)
  } else if (label !~ /\.$/ && match(line, /^[a-z]+\.   */) && RLENGTH >= 10) { # the second word of one
    name = substr(line, 1, RLENGTH)
    sub(/ +$/, "", name)
    label = label " " name
    line = substr(line, RLENGTH + 1)
  }
  sub(/^ +/, "", line)
  paragraph = paragraph (paragraph == "" ? "" : " ") line
}
BEGIN {
  print "# Reference\n"
  print "Made from [`fastermoe.h`](../include/fastermoe.h) by `make docs`.\n"
}
/^\/\* fastermoe\.h: / { sub(/^\/\* fastermoe\.h: /, ""); print text(toupper(substr($0, 1, 1)) substr($0, 2)) "\n"; inside = 1; next }
/^#(ifndef|define|endif|include|ifdef)/ && !/FMOE_LAYER_OPTIONS_INIT|FMOE_VERSION/ { next }
/^extern "C"/ || /^}$/ { next }
# A heading may be all of a comment or its beginning.
/^\/\* ---- / {
  end_code()
  heading = $0
  sub(/^\/\* ---- /, "", heading); sub(/ -+( \*\/)?$/, "", heading)
  print "## " toupper(substr(heading, 1, 1)) substr(heading, 2) "\n"
  anchor = tolower(heading)
  gsub(/[^a-z0-9 -]/, "", anchor); gsub(/ /, "-", anchor)
  inside = $0 !~ /\*\/$/
  next
}
!inside && /^\/\* / && !/\*\/ *[^ ]/ { end_code(); sub(/^\/\* /, ""); inside = 1; opened = 1 }
inside {
  line = $0
  last = line ~ /\*\/$/
  if (!opened) sub(/^ \* ?/, "", line)
  opened = 0
  sub(/ *\*\/$/, "", line)
  prose(line)
  if (last) { end_paragraph(); inside = 0 }
  next
}
/^$/ { if (code != "") end_code(); next }
{
  code = code $0 "\n"
  if ($0 !~ /^ / && match($0, /fmoe_[a-z_]+\(/)) {
    name = substr($0, RSTART, RLENGTH - 1)
    where[name] = anchor
    names[++count] = name
  }
}
END {
  end_code()
  print "## All functions\n"
  for (i = 2; i <= count; i++) # by name
    for (j = i; j > 1 && names[j] < names[j - 1]; j--) { name = names[j]; names[j] = names[j - 1]; names[j - 1] = name }
  for (i = 1; i <= count; i++) printf "- [`%s`](#%s)\n", names[i], where[names[i]]
}
