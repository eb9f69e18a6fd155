#!/usr/bin/env bash
# The fault campaign: Tests/faults.sh PREFIX, with a staged library there and the one for fuzzing built. `make faults` calls it.
# Prints a table of what was injected, how often, what was seen each time, and how often something else was.
set -u
prefix=$(realpath "$1")
cd "$(dirname "$0")"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
make --no-print-directory -C CAPITests PREFIX="$prefix" CC=gcc CXX=g++ OUT=../../.build/capi/gcc faults >"$log" 2>&1 || failed=1
make --no-print-directory -C Fuzz sequences >>"$log" 2>&1 || failed=1
echo "| injected | times | seen | anything else |"
echo "|---|---|---|---|"
sed -n 's/^injected | /| /; t show; b; :show; s/$/ |/p' "$log"
grep -v '^injected ' "$log" | grep -E 'failed:|does not hold|ERROR|passed, [1-9][0-9]* failed'
[ "$(grep -c '^injected ' "$log")" -ge 19 ] || { echo "the table is not whole"; tail -30 "$log"; failed=1; }
exit $failed
