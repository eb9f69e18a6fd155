#!/usr/bin/env bash
# predict.sh PREFIX OUT: predictions beside measurements, between hosts that are network namespaces of this machine with
# shaped links: ROOMS="2:1gbit 4:100mbit" names others. Prints tables of strategies; OUT/predict.csv has all cases,
# OUT/predict.svg draws them, OUT/timeline.svg one step of rank 0. About six minutes.
set -eu
cd "$(dirname "$0")/.."
prefix=$(realpath "$1") out=$(realpath "$2") mpi=${MPI:-openmpi}
hosts=Tests/Cluster/hosts.sh
export HOSTS=predict-$$ LIMIT=600
export PKG_CONFIG_PATH=$prefix/lib/pkgconfig LD_LIBRARY_PATH=$prefix/lib
"$hosts" can
trap '"$hosts" down' EXIT
"mpicc.$mpi" -std=gnu11 -O2 -Wall -Wextra Benchmarks/predict.c -o "$out/predict" \
  $(pkg-config --cflags --libs fastermoe) -Wl,-rpath,"$prefix/lib" -lm
cc -std=gnu11 -O2 -Wall -Wextra Benchmarks/plot.c -o "$out/plot" -lm
rm -f "$out/predict.csv"
for room in ${ROOMS:-2:1gbit 2:500mbit 2:250mbit}; do
  "$hosts" up "${room%:*}" "${room#*:}"
  "$hosts" run "$mpi" "$out/predict" --link "${room#*:}" --csv "$out/predict.csv" --repeats "${REPEATS:-5}" \
    --timeline "$out/timeline-${room#*:}"
done
if command -v python3 >/dev/null; then python3 Benchmarks/lanes.py "$out/timeline-250mbit.0.json" "$out/timeline.svg"; fi
"$out/plot" "$out/predict.csv" "$out/predict.svg"
