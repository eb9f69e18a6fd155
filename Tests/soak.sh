#!/usr/bin/env bash
# Trains for some minutes and watches the memory: Tests/soak.sh TRAIN_GPT MINUTES. A table of the resident set over time; fails if
# the training does, or if the second half ever needs 1 % and 1 MiB more than the first half did after its first tenth.
set -euo pipefail
train=$1 minutes=$2
folder=$(mktemp -d)
"$train" --seconds $((minutes * 60)) --workers 2 --save "$folder/saved" --sample 0 >"$folder/log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null || true; rm -rf "$folder"' EXIT
every=$((minutes * 60 / 40)) && [ "$every" -gt 0 ] || every=1
start=$SECONDS
echo "| seconds | resident MiB | threads | open files |"
echo "|---|---|---|---|"
while kill -0 $pid 2>/dev/null; do
  sleep "$every"
  memory=$(awk '/^VmRSS/ {m = $2} /^Threads/ {t = $2} END {print m, t}' /proc/$pid/status 2>/dev/null) || break
  [ "${memory% *}" != "" ] || break
  set -- $memory "$(find /proc/$pid/fd 2>/dev/null | wc -l)"
  [ $# = 3 ] || break
  printf '| %d | %.1f | %d | %d |\n' $((SECONDS - start)) "$(awk "BEGIN {print $1 / 1024}")" "$2" "$3" | tee -a "$folder/table"
done
wait $pid || { cat "$folder/log"; echo "soak.sh: failed: the training ended with an error"; exit 1; }
tail -3 "$folder/log"
awk -F'|' -v minutes="$minutes" '
  { at[NR] = $2; mib[NR] = $3; files[NR] = $5 }
  END {
    length_ = minutes * 60
    for (i = 1; i <= NR; i++) {
      if (at[i] >= length_ / 10 && at[i] < length_ / 2) { if (mib[i] > early) early = mib[i]; if (files[i] > opened) opened = files[i] }
      if (at[i] >= length_ / 2 && at[i] < 0.99 * length_) { if (mib[i] > late) late = mib[i]; if (files[i] > more) more = files[i] }
    }
    printf "resident: at most %.1f MiB in the first half, %.1f MiB in the second\n", early, late
    exit !(early > 0 && late > 0 && late <= 1.01 * early + 1 && more <= opened)
  }' "$folder/table" || { echo "soak.sh: failed: the memory is not flat"; exit 1; }
