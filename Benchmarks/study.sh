#!/usr/bin/env bash
# study.sh PREFIX OUT: how gates converge, by steps and by time. Trains one model by each gate with some seeds, by 4 workers that
# are places of their own; then predicts and measures what the routing of the first seed takes on 4 hosts with shaped links,
# which are network namespaces of this machine and need root (without, times are left out).
# OUT/study-loss.csv, study-time.csv and study.svg; prints tables. STEPS, SEEDS, GATES, LINKS and TEXT change what is done; 25
# minutes on two cores. PARTS="train time plot" says what of it is done: training may share the machine with others, times
# may not, and those of some LINKS and GATES are added to the ones that are there.
set -eu
cd "$(dirname "$0")/.."
prefix=$(realpath "$1") out=$(realpath "$2") mpi=${MPI:-openmpi} work=$2/study
hosts=Tests/Cluster/hosts.sh
export HOSTS=study-$$ LIMIT=900
export PKG_CONFIG_PATH=$prefix/lib/pkgconfig LD_LIBRARY_PATH=$prefix/lib
make --no-print-directory -C examples/c BUILD="$out/examples" RPATH=1 "$out/examples/train_gpt"
mkdir -p "$work"
width=64 hidden=128
steps=${STEPS:-1200} seeds=${SEEDS:-1 2 3}
gates=${GATES:-topk bias noisy switch gshard base swipe topology} parts=${PARTS:-train time plot}
does() { [[ " $parts " == *" $1 "* ]]; }
# Each gate with what balances it: a loss, or what it has instead.
flags() {
  case $1 in
    bias) echo --gate topk --balance-loss 0 --bias-step 0.001 ;;
    switch) echo --gate switch --input-jitter 0.01 ;;
    *) echo --gate "$1" ;;
  esac
}
if does train; then
  rm -f "$out/study-time.csv" "$work"/*.routing
  echo "gate,seed,step,loss,held_out_loss,balance" >"$out/study-loss.csv"
  for seed in $seeds; do
    for gate in $gates; do
      record=()
      [ "$seed" != "${seeds%% *}" ] || record=(--record "$work/$gate.routing")
      # shellcheck disable=SC2046
      "$out/examples/train_gpt" $(flags "$gate") ${TEXT:+--text $TEXT} --workers 4 --threads 1 --topology "pack:4 core:1 pu:1" \
        --layers 3 --width $width --hidden $hidden --experts 16 --context 64 --batch 16 --steps "$steps" --warmup $((steps / 12)) \
        --eval-every $((steps / 12)) --sample 0 --seed "$seed" --save-log "$work/$gate-$seed.csv" "${record[@]}" | tail -1
      # Training losses are means since the latest look at the held-out text.
      awk -F, -v gate="$gate" -v seed="$seed" 'FNR > 1 { loss += $4; load += $6; n++ }
        FNR > 1 && $5 != "" { printf "%s,%d,%d,%.6f,%.6f,%.4f\n", gate, seed, $1, loss / n, $5, load / n; loss = load = n = 0 }' \
        "$work/$gate-$seed.csv" >>"$out/study-loss.csv"
      echo "-- $gate, seed $seed"
    done
  done
fi

if does time && "$hosts" can; then
  trap '"$hosts" down' EXIT
  "mpicc.$mpi" -std=gnu11 -O2 -Wall -Wextra Benchmarks/study.c examples/c/routing.c -o "$out/study-time" \
    $(pkg-config --cflags --libs fastermoe) -Wl,-rpath,"$prefix/lib"
  files=()
  for gate in $gates; do files+=("$gate=$work/$gate.routing"); done
  for link in ${LINKS:-1gbit 100mbit}; do
    "$hosts" up 4 "$link"
    "$hosts" run "$mpi" "$out/study-time" --link "$link" --width $width --hidden $hidden --csv "$out/study-time.csv" \
      --every 20 --measure 6 "${files[@]}"
  done
fi
if does train && does time; then rm -f "$work"/*.routing; fi
if does plot && command -v python3 >/dev/null; then python3 Benchmarks/study.py "$out"; fi
