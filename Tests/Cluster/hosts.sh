#!/usr/bin/env bash
# hosts.sh: a small cluster inside one Linux machine.
#   hosts.sh up N RATE           N hosts whose links carry RATE both ways: 200mbit, 1gbit; up to 2.5gbit it is true
#   hosts.sh run [-n RANKS] MPI PROGRAM...   mpirun over them; MPI: openmpi or mpich; RANKS: default is one a host
#   hosts.sh exec I COMMAND...   on host I of 0..N-1, which has the address 10.87.0.(I+1) and the core I mod cores
#   hosts.sh can                 whether the machine allows this: exit code 77 and a reason, if not
#   hosts.sh down                leaves nothing
# A host is a process with namespaces of its own: network, hostname, /dev/shm, processes.  All hang on a switch, a
# bridge in one more namespace, where mpirun starts; the machine's own network is not touched.  LIMIT=300 s ends a run.
# HOSTS=name: several such clusters side by side.
set -u
state=/run/fastermoe-hosts${HOSTS:+-$HOSTS}
self=$(realpath "$0")

no() { echo "hosts.sh: $*" >&2; exit 77; }
pid() { cat "$state/$1" 2>/dev/null; }
alive() { grep -qz '^FASTERMOE_HOST=' "/proc/$1/environ" 2>/dev/null; } # not one that was given the number since
in_switch() { nsenter -t "$(pid switch)" -n -u -m --wd="$PWD" -- "$@"; }
enter() { # I COMMAND...
  local i=$1
  shift
  exec taskset -c $((i % $(nproc))) nsenter -t "$(pid "host$i")" -n -u -i -m -p --wd="$PWD" -- "$@"
}

can() {
  [ "$(id -u)" = 0 ] || no "needs root"
  local tool
  for tool in unshare nsenter taskset ip tc; do
    command -v $tool >/dev/null || no "needs $tool (packages iproute2 and util-linux)"
  done
  unshare --net --uts --ipc --mount --pid --fork -- sh -ec 'ip link add bridge0 type bridge
    ip link add end0 type veth peer name end1; tc qdisc add dev end0 root tbf rate 1gbit burst 128000 limit 1000000
  ' 2>/dev/null ||
    no "this machine allows no namespaces, or no bridge, veth or tc tbf in them"
}

# A host's first process takes all others of the host and its link along when it is killed; it also buries orphans.
start() { # NAME unshare-options...
  local name=$1
  shift
  FASTERMOE_HOST=$name setsid unshare --net --uts --mount "$@" -- bash -c 'hostname "$1"; ip link set lo up
    mount --bind "$2/hosts" /etc/hosts
    [ "$1" = switch ] || mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    for control in cubic reno; do echo $control >/proc/sys/net/ipv4/tcp_congestion_control && break; done
    echo 0 >/proc/sys/net/ipv4/tcp_slow_start_after_idle
    : >"$2/$1.ready"; [ "$1" != switch ] || exec sleep infinity
    while :; do sleep infinity; done' - "$name" "$state" </dev/null >/dev/null 2>&1 &
  local outer=$! tries
  disown
  for ((tries = 0; tries < 250; tries++)); do [ -e "$state/$name.ready" ] && break; sleep 0.02; done
  [ "$name" = switch ] || outer=$(cat "/proc/$outer/task/$outer/children")
  echo "${outer% }" >"$state/$name"
}

# One end of a link.  A packet as large as the bucket would lose tokens to late timers: the kernel's may be half of it.
shape() { ip link set "$1" gso_max_size 64000 && tc qdisc add dev "$1" root tbf rate "$2" burst 128000 limit 1000000; }

up() { # N RATE
  local i
  can
  down
  mkdir -p "$state/tmp"
  trap '[ $? = 0 ] || down' EXIT
  echo "127.0.0.1 localhost" >"$state/hosts"
  echo "10.87.0.254 switch" >>"$state/hosts"
  for ((i = 0; i < $1; i++)); do echo "10.87.0.$((i + 1)) host$i" >>"$state/hosts"; done
  printf '#!/bin/sh\nexec "%s" agent "$@"\n' "$self" >"$state/agent"
  chmod +x "$state/agent"
  start switch
  in_switch ip link add bridge0 type bridge && in_switch ip address add 10.87.0.254/24 dev bridge0 &&
    in_switch ip link set bridge0 up || exit 1
  for ((i = 0; i < $1; i++)); do
    start "host$i" --ipc --pid --fork --mount-proc
    in_switch ip link add "port$i" type veth peer name eth0 netns "$(pid "host$i")" &&
      in_switch ip link set "port$i" master bridge0 up && in_switch "$self" shape "port$i" "$2" &&
      (enter "$i" ip address add "10.87.0.$((i + 1))/24" dev eth0) && (enter "$i" ip link set eth0 up) &&
      (enter "$i" "$self" shape eth0 "$2") || exit 1
  done
  echo "$1" >"$state/count"
}

down() {
  local file at
  [ -d "$state" ] || return 0
  for file in "$state"/host? "$state"/host?? "$state"/switch; do
    at=$(cat "$file" 2>/dev/null) && alive "$at" && kill -KILL "$at"
    while [ -n "$at" ] && alive "$at"; do sleep 0.02; done
  done
  rm -rf "$state"
}

run() {
  local ranks='' hosts='' count per i code=0
  count=$(pid count) || { echo "hosts.sh: first say: hosts.sh up N RATE" >&2; exit 1; }
  if [ "$1" = -n ]; then ranks=$2 && shift 2; fi
  local flavour=$1
  shift
  per=$(((${ranks:=$count} + count - 1) / count))
  for ((i = 0; i < count; i++)); do hosts+=${hosts:+,}host$i:$per; done
  export TMPDIR=$state/tmp
  case $flavour in
    openmpi)
      export OMPI_MCA_plm=rsh OMPI_MCA_plm_rsh_agent=$state/agent OMPI_MCA_plm_rsh_no_tree_spawn=1 OMPI_MCA_pml=ob1 \
        OMPI_MCA_btl=tcp,vader,self OMPI_MCA_btl_tcp_if_include=10.87.0.0/24 OMPI_MCA_oob_tcp_if_include=10.87.0.0/24
      set -- mpirun.openmpi --allow-run-as-root -H "$hosts" -n "$ranks" --map-by slot --bind-to none "$@" ;;
    mpich)
      set -- mpirun.mpich -launcher ssh -launcher-exec "$state/agent" -localhost switch -hosts "$hosts" -n "$ranks" \
        -bind-to none "$@" ;;
    *) echo "hosts.sh: openmpi or mpich, not $flavour" >&2; exit 2 ;;
  esac
  in_switch timeout -k 5 "${LIMIT:-300}" "$@" || code=$?
  # Ranks may outlive an mpirun that was killed.
  for ((i = 0; code && i < count; i++)); do (enter "$i" bash -c 'kill -KILL -1') 2>/dev/null; done
  return $code
}

# What mpirun calls in place of ssh: options, host, words of a command.
agent() {
  while [ "${1#-}" != "$1" ]; do shift; done
  local host=$1
  shift
  enter "${host#host}" bash -c "$*"
}

case ${1:-} in
  can | up | down | run | agent | shape) "$@" ;;
  exec) shift && enter "$@" ;;
  *) sed -n '2,10p' "$0"; exit 2 ;;
esac
