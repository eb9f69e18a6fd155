#!/usr/bin/env bash
# hosts.sh PREFIX OUT: speeds between hosts, which are network namespaces of this machine with shaped links, one core each
# (cores are shared where there are fewer). Prints tables, writes JSON to OUT. MPI=mpich uses MPICH instead of Open MPI.
set -eu
cd "$(dirname "$0")/.."
prefix=$(realpath "$1") out=$(realpath "$2") mpi=${MPI:-openmpi}
hosts=Tests/Cluster/hosts.sh
export HOSTS=bench-$$
export PKG_CONFIG_PATH=$prefix/lib/pkgconfig LD_LIBRARY_PATH=$prefix/lib
"$hosts" can
trap '"$hosts" down' EXIT
for program in wire overlap; do
  "mpicc.$mpi" -std=gnu11 -O2 -Wall -Wextra "Benchmarks/$program.c" -o "$out/$program" \
    $(pkg-config --cflags --libs fastermoe) -Wl,-rpath,"$prefix/lib" -lm
done

echo "== rows on the wire, links of 1 Gbit/s"
for count in 2 4; do
  "$hosts" up $count 1gbit
  "$hosts" run "$mpi" "$out/wire" --json "$out/wire-$count.json"
done
echo "== one expert with half of all rows, 4 hosts, links of 100 Mbit/s"
"$hosts" up 4 100mbit
"$hosts" run "$mpi" "$out/overlap" --shape 2048,512,256,4,1 --hot 0.5 --repeats 5 --json "$out/overlap-hot.json"
# Hidden widths at which computing takes about as long as communicating here, and a little longer.
echo "== rows travel while experts compute, 2 hosts"
for link in 1gbit:500 500mbit:1000 250mbit:2000; do
  "$hosts" up 2 "${link%:*}"
  for ratio in 0.95 1.1; do
    echo "-- ${link%:*}/s"
    "$hosts" run "$mpi" "$out/overlap" --shape "2048,512,${link#*:},8,2" --ratio $ratio --json "$out/overlap-${link%:*}-$ratio.json"
  done
done
