#!/bin/sh
# symbols.sh HEADER LIBDIR: the library exports what the header declares, all of it and nothing else, under its version
# tag and name, and needs no Swift on the user's machine.  So does the build for newer processors, where there is one.
header=$1 libdir=$2 passed=0 failed=0

check() { # TEXT COMMAND...
  text=$1; shift
  if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "symbols.sh: failed: $text"; fi
}
holds() { echo "$1" | grep -Eq "$2"; } # TEXT PATTERN: some line matches
lacks() { ! holds "$1" "$2"; }

declared=$(${CC:-cc} -E -P "$header" | grep -o 'fmoe_[a-z0-9_]* *(' | tr -d ' (' | sort -u)
check "the header declares functions" test -n "$declared"

check_library() { # PATH
  exported=$(nm -D --extern-only --defined-only --with-symbol-versions "$1" | awk '$2 != "A" { print $3 }')
  dynamic=$(readelf -d "$1") needed=$(ldd "$1") stack=$(readelf -lW "$1" | grep GNU_STACK)
  for name in $declared; do
    check "$1: $name is declared, but not exported as $name@@FASTERMOE_0" holds "$exported" "^$name@@FASTERMOE_0\$"
  done
  for symbol in $exported; do
    check "$1: $symbol is exported, but not declared" holds "$declared" "^${symbol%%@*}\$"
  done
  check "$1: SONAME is not libfastermoe.so.0" holds "$dynamic" 'SONAME.*\[libfastermoe\.so\.0\]'
  check "$1: needs Swift: $needed" lacks "$needed" '[sS]wift'
  check "$1: needs what is not there: $needed" lacks "$needed" 'not found'
  check "$1: looks for libraries in a folder of the machine that built it" lacks "$dynamic" '(RPATH|RUNPATH).*(\[|:)/'
  check "$1: has text relocations" lacks "$dynamic" TEXTREL
  check "$1: wants an executable stack" lacks "$stack" RWE
}

check_library "$libdir/libfastermoe.so.0"
check "libfastermoe.so, for linking, is the same library" \
  test "$(readlink -f "$libdir/libfastermoe.so")" = "$(readlink -f "$libdir/libfastermoe.so.0")"
level=$libdir/glibc-hwcaps/x86-64-v4/libfastermoe.so.0
if [ -e "$level" ]; then check_library "$level"
elif [ "$(uname -m)" = x86_64 ]; then check "there is a build for x86-64-v4 at $level" false
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
