#!/usr/bin/env bash
# Programs of an older version run on today's library: Tests/old_binaries.sh PREFIX [COMMIT].
# C tests of that version are compiled against its own headers, where structs are shorter, and run on the library
# of PREFIX: their results must be right to the last check. The version is the newest release's tag (v*) that is not
# today's commit; before there is one, a commit from before options, tensors and routings got their last fields.
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=$(realpath "$1")
before_releases=2ec905888f39
tag=$(git describe --tags --abbrev=0 --match 'v[0-9]*' HEAD^ 2>/dev/null || true)
commit=${2:-${tag:-$before_releases}}
if ! git rev-parse --quiet --verify "$commit^{commit}" >/dev/null 2>&1; then
  echo "not run: this copy of the repository has no history with $commit in it"
  exit 0
fi
# What these demand holds for every later version. Others, such as misuse and owners, want what is not there yet refused.
programs=(abi layer workers plans wire)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
git archive "$commit" include Tests/CAPITests | tar -x -C "$place"
cd "$place/Tests/CAPITests"
parts=()
for part in oracle batch transports mailbox crew scene alone; do [ ! -e $part.c ] || parts+=($part.c); done
libs=(-L"$prefix/lib" -lfastermoe -lm -lpthread)
export LD_LIBRARY_PATH=$prefix/lib
failed=0
for program in "${programs[@]}"; do
  [ -e $program.c ] || continue
  gcc -std=c11 -D_GNU_SOURCE -O2 -I../../include $program.c "${parts[@]}" -rdynamic "${libs[@]}" -o $program
  echo "$program of $commit"
  ./$program || failed=1
done
exit $failed
