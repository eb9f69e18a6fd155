#!/usr/bin/env bash
# Everything that must pass, from a built and staged library: Tests/all.sh PREFIX. `make test` calls it.
set -u
cd "$(dirname "$0")/.."
prefix=$(realpath "$1")
log=$(mktemp)
besides=$(mktemp)
trap 'kill $building $beside 2>/dev/null; rm -f "$log" "$besides"' EXIT
passed=0 failed=0 building= beside=

# step NAME COMMAND...: runs it, shows what it says if it fails, and counts.
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$log" 2>&1; then
    passed=$((passed + 1))
    printf 'ok      %s (%d s)\n' "$name" $((SECONDS - start))
    grep -hE '[0-9]+ passed, [0-9]+ failed|Test run with|[0-9]+ inputs, |^not run' "$log" | sed 's/^/          /'
  else
    failed=$((failed + 1))
    printf 'FAILED  %s (%d s)\n' "$name" $((SECONDS - start))
    grep -vE '^(✔|◇)' "$log" | tail -60
  fi
}

# beside COMMAND...: begins what keeps one core busy, beside steps that do not keep both; `joined` is then its own step.
beside() {
  "$@" >"$besides" 2>&1 &
  beside=$!
}
joined() {
  local status=0
  wait "$beside" || status=$?
  beside=
  cat "$besides"
  return $status
}

format() { swift format lint --strict -r Sources Tests Package.swift; }

# Swift tests of floors 0-3, optimised as shipped, for one CPU level.
swift_tests() {
  FASTERMOE_CPU=$1 swift test -c release -Xswiftc -enable-testing --disable-xctest --scratch-path ".build/test-$1"
}

thread_sanitizer() {
  wait "$building"
  FASTERMOE_CPU=$1 swift test --sanitize=thread --disable-xctest --filter "LayerTests|PeerTests|PlayTests|TeamTests|TimelineTests" --scratch-path .build/test-thread
}

# A build of Swift modules keeps one core busy. What later steps need is built ahead, beside the first ones; what fails here
# fails again, and is shown, in its step.
ahead() {
  FASTERMOE_CPU=$1 swift build --build-tests --sanitize=thread --disable-xctest --scratch-path .build/test-thread
  make --no-print-directory fuzz-library
}

c_interface() { make -j 2 --no-print-directory -C Tests/CAPITests PREFIX="$prefix" CC=gcc CXX=g++ "$1"; }

reference() { awk -f docs/reference.awk include/fastermoe.h | diff - docs/reference.md || { echo "make docs makes it anew"; return 1; }; }

fuzzers() {
  wait "$building"
  make --no-print-directory fuzz SECONDS="$1"
}

# The examples as a user builds them: pkg-config and nothing else.
examples() {
  local at=$1 cc=$2 cxx=$3 out
  out=$(realpath -m ".build/examples/$cc") && export PKG_CONFIG_PATH=$at LD_LIBRARY_PATH=$prefix/lib
  make -j 2 -B -C examples/c CC="$cc" BUILD="$out" all && make -B -C examples/cpp CXX="$cxx" BUILD="$out" all &&
    "$out/01_one_layer" && "$out/02_own_gate" && "$out/03_threads_as_ranks" && "$out/03_threads_as_ranks" 4 &&
    "$out/05_plan_only" examples/c/05_cluster.json && "$out/05_plan_only" Benchmarks/paper/trevor.json && "$out/train_regression" && "$out/test_gpt" &&
    "$out/train_gpt" --steps 30 --eval-every 15 --sample 40 --save-log "$out/log.csv" && [ "$(wc -l <"$out/log.csv")" -ge 30 ] &&
    "$out/train_gpt" --workers 2 --steps 4 --sample 0 --plan-log "$out/plans.csv" && plans "$out/plans.csv" 4
}

# plans FILE STEPS: a row for each of 3 layers of each step, with seconds that were predicted and measured.
plans() {
  awk -F, -v steps="$2" 'FNR > 1 { rows++; if (!($5 > 0 && $6 > 0)) exit 1 }
    END { printf "plans of %d layers\n", rows; exit !(rows == 3 * steps) }' "$1"
}

# One training by 1, 2 and 4 workers, here threads: the curves agree. Only sums of gradients are made in another order, some
# 1e-7 of themselves, which 50 steps leave below the last printed digit. The tolerance leaves room for a token or two of the
# 1024 that change their mind between equally good experts, where a compiler's rounding makes that happen; a gradient that is
# lost or counted twice shows 4e-3 and more. And the same workers give the same bits again.
workers_agree() {
  local out=.build/examples/gcc workers
  for workers in 1 2 4 4; do
    [ ! -e "$out/curve4.csv" ] || mv "$out/curve4.csv" "$out/again.csv"
    LD_LIBRARY_PATH=$prefix/lib "$out/train_gpt" --workers $workers --steps 50 --eval-every 25 --sample 20 \
      --save-log "$out/curve$workers.csv" || return 1
  done
  cmp <(cut -d, -f1,3- "$out/again.csv") <(cut -d, -f1,3- "$out/curve4.csv") || return 1
  for workers in 2 4; do
    awk -F, -v workers=$workers '
      function distance(a, b) { return a > b ? a - b : b - a }
      FNR == 1 { next }
      NR == FNR { loss[$1] = $4; held_out[$1] = $5; next }
      { rows++; if (distance($4, loss[$1]) > most) most = distance($4, loss[$1])
        if (distance($5, held_out[$1]) > most) most = distance($5, held_out[$1]) }
      END { printf "1 and %d workers: losses of %d steps differ by %g at most\n", workers, rows, most
            exit !(rows == 50 && most <= 1e-4) }' "$out/curve1.csv" "$out/curve$workers.csv" || return 1
  done
}

# A training that was saved and resumed has the losses of an unbroken one and writes the same text, digit for digit; another
# number of workers can go on with it, and another model refuses it.
resumed() {
  local out=.build/examples/gcc workers
  rm -rf "$out/saved"
  export LD_LIBRARY_PATH=$prefix/lib
  for workers in 1 2; do
    local run=("$out/train_gpt" --workers $workers --gate gshard --bias-step 0.01 --input-jitter 0.01 --steps 40 --eval-every 10 --sample 20)
    "${run[@]}" --save-log "$out/unbroken.csv" >"$out/unbroken.txt" &&
      "${run[@]}" --until 15 --save "$out/saved" --save-log "$out/first.csv" &&
      "${run[@]}" --resume "$out/saved" --save "$out/saved" --save-log "$out/second.csv" >"$out/second.txt" || return 1
    [ "$(find "$out/saved" -type f | wc -l)" = 5 ] || { find "$out/saved"; return 1; }
    # Another look at the held-out text, after step 15, is all that the stop may add.
    cmp <(cut -d, -f1,3,4,6 "$out/unbroken.csv") <(cut -d, -f1,3,4,6 "$out/first.csv" <(tail -n +2 "$out/second.csv")) &&
      cmp <(cut -d, -f5 "$out/unbroken.csv" | tail -20) <(cut -d, -f5 "$out/second.csv" | tail -20) &&
      cmp <(sed -n '/--- the prompt/,$p' "$out/unbroken.txt") <(sed -n '/--- the prompt/,$p' "$out/second.txt") || return 1
  done
  "$out/train_gpt" --bias-step 0.01 --steps 60 --until 45 --eval-every 0 --sample 0 --resume "$out/saved" || return 1
  ! "$out/train_gpt" --bias-step 0.01 --steps 60 --width 64 --sample 0 --resume "$out/saved" || { echo "a model of another width"; return 1; }
}

# What was recorded can be done again, by any number of workers: the first loss is the same, all loads are, and a file that
# is damaged, cut or of another model says so.
replayed() {
  local out=.build/examples/gcc workers at
  export LD_LIBRARY_PATH=$prefix/lib
  local run=("$out/train_gpt" --layers 2 --width 32 --hidden 32 --heads 2 --context 32 --batch 8 --gate gshard --eval-every 0
    --sample 0 --steps)
  "${run[@]}" 6 --workers 2 --record "$out/routing" --save-log "$out/recorded.csv" || return 1
  for workers in 1 2 4; do
    "${run[@]}" 9 --workers $workers --replay "$out/routing" --save-log "$out/replayed.csv" || return 1
    cmp <(cut -d, -f6 "$out/recorded.csv") <(cut -d, -f6 "$out/replayed.csv") || return 1
    awk -F, 'FNR == 2 { if (NR > 2) { off = $4 - loss; exit !(off < 2e-6 && off > -2e-6) } loss = $4 }' \
      "$out/recorded.csv" "$out/replayed.csv" || return 1
  done
  refuses() { # WORDS FLAGS...
    local words=$1
    shift
    ! "${run[@]}" 6 --workers 2 --replay "$out/damaged" "$@" >"$out/words" 2>&1 && grep -q "$words" "$out/words" ||
      { echo "not refused: $words"; cat "$out/words"; return 1; }
  }
  alter() { # BYTE: of a copy, is another one
    cp "$out/routing" "$out/damaged" && printf '\x55' | dd of="$out/damaged" bs=1 seek="$1" conv=notrunc status=none
  }
  alter 3 && refuses "is no recorded routing" && alter 17 && refuses "the checksum of its head" && alter 33 &&
    refuses "the checksum of its head" && alter 41 && refuses "the checksum of step 1, layer 0" &&
    alter 3001 && refuses "the checksum of step 1, layer 0" && alter 40000 && refuses "the checksum of step" || return 1
  head -c -1 "$out/routing" >"$out/damaged" && refuses "ends within step 6" && cp "$out/routing" "$out/damaged" &&
    refuses "is of 2 layers" --layers 3 && refuses "top-k 2" --top-k 1 && rm "$out/damaged" && refuses "cannot be read" || return 1
  ! "${run[@]}" 2 --record /dev/full || { echo "a full disk was not noticed"; return 1; }
}

# The C program that the README shows first, taken from the README.
readme_program() {
  local out=.build/readme
  mkdir -p "$out"
  awk '/^```c$/ {inside = 1; next} /^```$/ {if (inside) exit} inside' README.md >"$out/step.c"
  [ -s "$out/step.c" ] || { echo "README.md shows no C program"; return 1; }
  PKG_CONFIG_PATH=$prefix/lib/pkgconfig
  export PKG_CONFIG_PATH
  # shellcheck disable=SC2046
  gcc -std=c99 -Wall -Wextra -Werror "$out/step.c" $(pkg-config --cflags --libs fastermoe) -o "$out/step" &&
    LD_LIBRARY_PATH=$prefix/lib "$out/step"
}

cmake_package() {
  local out=.build/cmake
  rm -rf "$out" && mkdir -p "$out"
  cp examples/c/01_one_layer.c "$out/"
  cat >"$out/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.16)
project(consumer C)
find_package(FasterMoE 0.1 REQUIRED)
add_executable(one_layer 01_one_layer.c)
target_link_libraries(one_layer PRIVATE FasterMoE::fastermoe m)
END
  cmake -S "$out" -B "$out/build" -DCMAKE_PREFIX_PATH="$prefix" && cmake --build "$out/build" && "$out/build/one_layer"
}

# Installed under DESTDIR and taken away again, nothing may be left.
uninstall() {
  local root
  root=$(mktemp -d)
  make --no-print-directory install DESTDIR="$root" PREFIX=/opt/fastermoe &&
    grep -q '^prefix=/opt/fastermoe$' "$root/opt/fastermoe/lib/pkgconfig/fastermoe.pc" &&
    make --no-print-directory uninstall DESTDIR="$root" PREFIX=/opt/fastermoe
  local left
  left=$(find "$root" ! -type d)
  rm -rf "$root"
  [ -z "$left" ] || { echo "left behind: $left"; return 1; }
}

debian_packages() { make --no-print-directory deb && Tests/deb.sh build/deb; }

case $(uname -m) in x86_64) base=haswell ;; *) base=native ;; esac
ahead "$base" >/dev/null 2>&1 &
building=$!
step "format" format
step "reference is the header's" reference
step "Swift tests" swift_tests "$base"
if grep -q avx512vl /proc/cpuinfo; then step "Swift tests, AVX-512" swift_tests skylake-avx512; fi
step "sums stay in registers" Tests/registers.sh .build/*/release/libfastermoe.so
beside c_interface valgrind
step "thread sanitizer" thread_sanitizer "$base"
step "C interface under valgrind, beside that" joined
step "C and C++ interface, gcc and clang" c_interface test
step "programs of an older version on this library" Tests/old_binaries.sh "$prefix"
step "C interface under the address sanitizer" c_interface asan
step "fuzzers, address sanitizer in the library" fuzzers 60
step "examples from the installed library, gcc" examples "$prefix/lib/pkgconfig" gcc g++
step "examples from the build tree, clang" examples "$PWD/build/pkgconfig" clang clang++
step "training by 1, 2 and 4 workers" workers_agree
step "training saved and resumed" resumed
step "routing recorded and replayed" replayed
step "MPI: Open MPI, MPICH, several hosts" Tests/Cluster/run.sh "$prefix"
step "the tool" Tests/tool.sh "$prefix"
step "README program" readme_program
step "CMake package" cmake_package
step "uninstall" uninstall
step "Debian packages: built, installed, used, removed" debian_packages
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
