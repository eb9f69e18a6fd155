#!/usr/bin/env bash
# run.sh PREFIX: the tests that need mpirun, against an installed library, with each MPI that is here; on this host, and on
# several made of network namespaces where the machine allows them. Tests/all.sh calls it.
set -u
cd "$(dirname "$0")/../.."
prefix=$(realpath "$1")
hosts=Tests/Cluster/hosts.sh
export HOSTS=test-$$ # nobody else's
export PKG_CONFIG_PATH=$prefix/lib/pkgconfig LD_LIBRARY_PATH=$prefix/lib
passed=0 failed=0
log=$(mktemp)
trap 'rm -f "$log"; "$hosts" down' EXIT

# expect CODE NAME COMMAND...: counts, and shows what the command said if it ends otherwise.
expect() {
  local wanted=$1 name=$2 code=0
  shift 2
  "$@" >"$log" 2>&1 || code=$?
  if [ "$code" = "$wanted" ]; then
    passed=$((passed + 1)) && echo "ok      $name: $(grep -E '^[0-9]+ passed|losses' "$log" || echo "code $code")"
  else
    failed=$((failed + 1)) && echo "FAILED  $name: code $code, not $wanted" && tail -30 "$log"
  fi
}

build() { # FLAVOUR
  out=$PWD/.build/cluster/$1
  mkdir -p "$out"
  for program in mpi_layer mpi_faults; do
    "mpicc.$1" -std=gnu11 -O2 -Wall -Wextra -Werror -ITests/CAPITests Tests/Cluster/$program.c -o "$out/$program" \
      $(pkg-config --cflags --libs fastermoe) -lm || return 1
  done
  # The header alone, as strict as the others; mpi.h itself is not.
  echo '#include <fastermoe_mpi.h>' | "mpicc.$1" -std=c99 -Wall -Wextra -Werror $(pkg-config --cflags fastermoe) -x c -fsyntax-only - &&
    echo '#include <fastermoe_mpi.h>' | "mpicxx.$1" -std=c++11 -Wall -Wextra -Werror -DOMPI_SKIP_MPICXX $(pkg-config --cflags fastermoe) -x c++ -fsyntax-only - &&
    make -B -C examples/c MPICC="mpicc.$1" BUILD="$out" mpi "$out/train_gpt"
}

# run FLAVOUR RANKS PROGRAM...: mpirun on this host.
run() {
  local flavour=$1 ranks=$2 more=()
  shift 2
  [ "$flavour" = mpich ] || more=(--allow-run-as-root --oversubscribe)
  timeout -k 5 120 "mpirun.$flavour" "${more[@]}" -bind-to none -n "$ranks" "$@"
}

# How a job ends that loses a rank is the MPI's choice; that it ends, soon and not well, is what a user relies on.
ends() { # COMMAND...
  local start=$SECONDS
  ! "$@" && [ $((SECONDS - start)) -lt 30 ]
}

# Processes as workers train like threads as workers, also where every pass is planned by prediction.
same_curve() {
  local flags="--steps 12 --eval-every 0 --sample 0"
  "$out/train_gpt" --workers 2 $flags --save-log "$out/threads.csv" &&
    run "$1" 2 "$out/train_gpt_mpi" $flags --save-log "$out/processes.csv" --plan-log "$out/plans.csv" &&
    awk -F, 'FNR > 1 { rows++; if (!($4 > 0 && $5 > 0 && $6 > 0)) exit 1 } END { exit !(rows == 36) }' "$out/plans.csv" &&
    awk -F, 'NR == FNR { loss[$1] = $4; next }
      FNR > 1 { d = $4 - loss[$1]; if (d < 0) d = -d; if (d > most) most = d; rows++ }
      END { printf "losses of %d steps differ by %g at most\n", rows, most; exit !(rows == 12 && most <= 1e-4) }' \
      "$out/threads.csv" "$out/processes.csv"
}

found=0
for flavour in openmpi mpich; do
  command -v "mpicc.$flavour" >/dev/null || { echo "no $flavour here"; continue; }
  found=$((found + 1))
  expect 0 "$flavour: everything compiles" build "$flavour"
  for ranks in 1 2 4; do
    expect 0 "$flavour, $ranks ranks: results of one worker" run "$flavour" $ranks "$out/mpi_layer"
  done
  expect 42 "$flavour: ranks that come late" run "$flavour" 3 "$out/mpi_faults" late
  expect 42 "$flavour: a rank that stops" run "$flavour" 3 "$out/mpi_faults" stop
  expect 0 "$flavour: a rank that is killed" ends run "$flavour" 3 "$out/mpi_faults" kill
  expect 0 "$flavour: example 04_mpi" run "$flavour" 4 "$out/04_mpi"
  expect 0 "$flavour: training by 2 processes and by 2 threads" same_curve "$flavour"
done
[ $found -gt 0 ] || { echo "no MPI is installed: nothing tested"; exit 1; }

# Several hosts with links of their own. MPICH over UCX, as Debian has it, may not come back from MPI_Finalize where more
# than two ranks speak TCP, whatever they did before (openucx/ucx issue 8738).
if "$hosts" can; then
  export LIMIT=120
  for count in 2 4; do
    expect 0 "$count hosts" "$hosts" up $count 1gbit
    for flavour in openmpi mpich; do
      out=$PWD/.build/cluster/$flavour
      [ -x "$out/mpi_layer" ] && [ $flavour$count != mpich4 ] || continue
      expect 0 "$flavour on $count hosts: results of one worker" "$hosts" run "$flavour" "$out/mpi_layer"
    done
  done
  out=$PWD/.build/cluster/openmpi
  if [ -x "$out/mpi_layer" ]; then
    expect 0 "openmpi, 8 ranks on 4 hosts: results of one worker" "$hosts" run -n 8 openmpi "$out/mpi_layer"
    expect 42 "openmpi on 3 hosts: ranks that come late" "$hosts" run -n 3 openmpi "$out/mpi_faults" late
    expect 42 "openmpi on 3 hosts: a rank that stops" "$hosts" run -n 3 openmpi "$out/mpi_faults" stop
    expect 0 "openmpi on 3 hosts: a rank that is killed" ends "$hosts" run -n 3 openmpi "$out/mpi_faults" kill
  fi
  expect 0 "no hosts left" "$hosts" down
else
  echo "several hosts: not tested, see above"
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
