#!/usr/bin/env bash
# The tool as it is installed: Tests/tool.sh PREFIX. With UPDATE=1 it writes what it should print anew.
set -u
cd "$(dirname "$0")/.."
prefix=$(realpath "$1")
tool=$prefix/bin/fastermoe
paper=Benchmarks/paper
layer=d=1024,h=2048,n=1024
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
passed=0 failed=0

check() { # WORDS COMMAND...
  if "${@:2}" >"$out/said" 2>&1; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    echo "FAILED: $1"
    tail -40 "$out/said"
  fi
}

# What it prints for fixed inputs, to the last digit.
golden() { # NAME ARGUMENTS...
  local file=Tests/golden/$1
  "$tool" "${@:2}" >"$out/all" 2>"$out/error" || { cat "$out/error"; return 1; }
  grep -v planning_seconds "$out/all" >"$out/printed"  # how long it took is another number each time
  if [ "${UPDATE:-}" = 1 ]; then mkdir -p Tests/golden && cp "$out/printed" "$file"; fi
  [ ! -s "$out/error" ] && diff "$file" "$out/printed"
}

# One line on the error stream, nothing on the other, and exit code 2.
refuses() { # PART-OF-THE-LINE ARGUMENTS...
  "$tool" "${@:2}" >"$out/printed" 2>"$out/error" </dev/null
  local code=$?
  [ $code = 2 ] && [ "$(wc -l <"$out/error")" = 1 ] && [ ! -s "$out/printed" ] && grep -qF -- "$1" "$out/error" && return
  echo "exit code $code, said:" && cat "$out/error"
  return 1
}

check "golden plan" golden plan-johnny.txt plan --cluster $paper/johnny.json --layer $layer --zipf 1.2
check "golden plan, JSON" golden plan-johnny.json plan --cluster $paper/johnny.json --layer $layer,E=32 --zipf 1.2 --json
check "golden plan, even rows" golden plan-trevor.txt plan --cluster $paper/trevor.json --layer d=1024,h=2048,n=2048
printf '%s\n' "9 1" "8 2" "" "0 5" "5 0" >"$out/trace"
check "golden trace" golden plan-trace.txt plan --cluster examples/c/05_cluster.json --workers 2 --layer d=256,h=512 --trace "$out/trace"
check "golden topology" golden topology.txt topology --topology "pack:2 numa:2 l3:2 core:4 pu:1" --workers 8
check "golden topology, JSON" golden topology.json topology --topology "pack:2 core:2 pu:1" --workers 3 --json
check "golden scale" golden scale.json scale --cluster $paper/johnny.json --layer $layer --workers 16,64 --zipf 1.2 --json

printf '{"fastermoe_cluster": 1,\n' >"$out/cut.json"
printf '{"fastermoe_cluster": 1, "places": [{"name": "a", "in": "b"}, {"name": "b", "in": "a"}], "workers": [{"name": "w", "in": "a", "flops_per_second": [[1, 1]]}]}\n' >"$out/circle.json"
printf '{"fastermoe_cluster": 1, "places": [{"name": "a"}], "workers": [{"name": "w", "in": "a", "flops_per_second": [[1, -1]]}]}\n' >"$out/slow.json"
printf '1 2\n' >"$out/short.csv"
: >"$out/empty.csv"
plan=(plan --cluster $paper/johnny.json --layer)
check "cut JSON" refuses "$out/cut.json: is not JSON" plan --cluster "$out/cut.json" --layer $layer
check "a circle" refuses "go round in a circle" plan --cluster "$out/circle.json" --layer $layer
check "a circle repeated" refuses "go round in a circle" plan --cluster "$out/circle.json" --workers 2 --layer $layer
check "a negative rate" refuses "must be positive and finite" plan --cluster "$out/slow.json" --layer $layer
check "no such file" refuses "cannot be read" plan --cluster "$out/nowhere" --layer $layer
check "no cluster" refuses "--cluster" plan --layer $layer
check "a layer without h" refuses "h is missing" "${plan[@]}" d=8
check "experts that cannot be shared" refuses "17 experts cannot be shared" "${plan[@]}" d=8,h=8,E=17
check "too few counts" refuses "line 1 has 2 numbers" "${plan[@]}" $layer --counts "$out/short.csv"
check "no counts" refuses "has no counts" "${plan[@]}" $layer --counts "$out/empty.csv"
check "two sources of counts" refuses "exclude each other" "${plan[@]}" $layer --zipf 1 --counts "$out/short.csv"
check "an exponent below 0" refuses "--zipf" "${plan[@]}" $layer --zipf=-1
check "too many workers" refuses "more than the 16384" "${plan[@]}" $layer --workers 20000
check "workers that do not add up" refuses "do not add up" "${plan[@]}" $layer --workers 17
check "a roofline that cannot be written" refuses "cannot be written" "${plan[@]}" $layer --roofline "$out/no/where.svg"
check "a timeline of nothing" refuses "--timeline-of" "${plan[@]}" $layer --timeline-of none
check "a topology that is none" refuses "topology" topology --topology nonsense
check "no workers" refuses "--workers" topology --workers 0
check "no time" refuses "--seconds" calibrate --seconds 0
mkfifo "$out/pipe"
check "a profile that is a pipe" refuses "is no file that could be replaced" calibrate --profile "$out/pipe"
check "a profile without a folder" refuses "$out/no/where: cannot be written" calibrate --profile "$out/no/where"
check "no shape" refuses "--shapes" bench --shapes X
check "models that are none" refuses "models" paper $paper/johnny.json
check "no such command" refuses "nonsense" nonsense
check "an unknown option" refuses "--nonsense" "${plan[@]}" $layer --nonsense

check "version" [ "$("$tool" --version)" = "$(PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config --modversion fastermoe)" ]
"$tool" --help >"$out/help"
check "help" grep -q calibrate "$out/help"

# A reader that has had enough ends the tool without a word; a full disk is an error.
enough() {
  "$tool" topology --topology "pack:16 core:200 pu:1" --json 2>"$out/error" | head -1 >/dev/null
  local codes=("${PIPESTATUS[@]}")
  [ "${codes[0]}" = 141 ] && [ ! -s "$out/error" ] || { echo "exit codes ${codes[*]}"; cat "$out/error"; return 1; }
}
check "a closed pipe" enough
full() {
  "$tool" topology >/dev/full 2>"$out/error"
  [ $? = 1 ] && [ "$(wc -l <"$out/error")" = 1 ]
}
check "a full disk" full

# Interrupted while it measures: ended by the signal, soon, and nothing is left behind.
interrupted() {
  mkdir -p "$out/empty"
  env --default-signal=INT "$tool" calibrate --seconds 60 --profile "$out/empty/profile" 2>/dev/null &
  local process=$! start=$SECONDS
  sleep 1
  kill -INT $process
  wait $process
  local code=$?
  [ $code = 130 ] && [ $((SECONDS - start)) -lt 10 ] && [ -z "$(ls "$out/empty")" ] || { echo "exit code $code"; ls "$out/empty"; return 1; }
}
check "an interrupt" interrupted

# What it measures is a profile of this machine to the library, and a cluster to itself.
calibrated() {
  "$tool" calibrate --workers 2 --threads 1 --seconds 0.3 --profile "$out/profile.json" --cluster "$out/cluster.json" &&
    "$tool" calibrate --workers 2 --threads 1 --seconds 0.3 --profile "$out/profile.json" --json &&
    "$tool" topology --profile "$out/profile.json" && "$tool" plan --cluster "$out/cluster.json" --layer d=64,h=64 || return 1
  cat >"$out/group.c" <<'END'
#include <fastermoe.h>
#include <stdio.h>
int main(int argc, char **argv) {
  fmoe_group_options options = {.struct_size = sizeof options};
  fmoe_group *groups[2];
  options.threads = 1, options.profile = argv[argc - 1];
  if (fmoe_group_create_local(2, &options, groups)) return fprintf(stderr, "%s\n", fmoe_last_error()), 1;
  fmoe_group_destroy(groups[0]), fmoe_group_destroy(groups[1]);
}
END
  # shellcheck disable=SC2046
  gcc "$out/group.c" -o "$out/group" $(PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config --cflags --libs fastermoe) &&
    LD_LIBRARY_PATH=$prefix/lib "$out/group" "$out/profile.json" && [ "$(find "$out" -name 'profile.json*' | wc -l)" = 1 ]
}
check "calibrated" calibrated

benched() { "$tool" bench --shapes D --repeats 1 && "$tool" bench --shapes D --repeats 1 --threads 1 --zipf 1 --json | grep -q peak_flops; }
check "bench" benched

drawn() {
  "$tool" "${plan[@]}" $layer --zipf 1.2 --roofline "$out/roofline.svg" --timeline "$out/timeline.json" >/dev/null &&
    "$tool" scale --cluster $paper/johnny.json --layer $layer --workers 16,64 --plot "$out/scale.svg" >/dev/null &&
    grep -q 'semi-ideal' "$out/roofline.svg" && grep -q 'ZeRO-3' "$out/scale.svg" &&
    [ "$(grep -c '"rank [0-9]*, predicted"' "$out/timeline.json")" = 16 ]
}
check "pictures and a timeline" drawn

# The largest cluster there may be, in four gigabytes.
largest() { (ulimit -v 4194304 && "$tool" "${plan[@]}" $layer --workers 16384 --zipf 1.2); }
check "16384 workers and experts" largest

check "the paper's models" golden paper.txt paper $paper/models.json

# The manual has every option of every command.
manual() {
  local command option
  for command in plan topology calibrate bench scale paper; do
    "$tool" $command --help | grep -oE -- '^ +--[a-z-]+' | tr -d ' ' | sort -u | while read -r option; do
      grep -qF -- "${option//-/\\-}" "$prefix/share/man/man1/fastermoe.1" || { echo "$command $option"; exit 1; }
    done || return 1
  done
}
check "manual" manual

echo "$passed passed, $failed failed"
[ $failed = 0 ]
