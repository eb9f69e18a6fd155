#!/usr/bin/env bash
# Prepares hwloc as a part of the library: packaging/hwloc.sh FOLDER. `make build` calls it, with the folder in PKG_CONFIG_PATH.
#
# So what hwloc asks the system for in vain comes from the library's reserve, too, and the hwloc of a host or of its MPI is
# another one. Its archive fits into programs, and into shared libraries but for the system's variables, which it addresses as
# if they were near: they are made variables of our own (Sources/CHwloc/shim.h gives them their values). Where the system has no
# archive, the folder stays empty and hwloc a library of its own.
set -euo pipefail
rm -rf "$1" && mkdir -p "$1"
there=$(pkg-config --variable=libdir hwloc)
[ -e "$there/libhwloc.a" ] || exit 0
version=$(pkg-config --modversion hwloc) flags=$(pkg-config --cflags hwloc)
cd "$1"

renamed=()
for name in stderr stdout program_invocation_name; do
  renamed+=(--redefine-sym "$name=hwloc_$name")
  echo "void *hwloc_$name;"
done >variables.c
objcopy "${renamed[@]}" "$there/libhwloc.a" libhwloc-parts.a
gcc -fPIC -fno-common -fvisibility=hidden -c variables.c
ar rs libhwloc-parts.a variables.o

# What -lhwloc means: these parts, and what hwloc needs besides the C library.
needed=$(objdump -p "$there/libhwloc.so" | awk '/NEEDED/ && !/libc\.|libm\./ { print $2 }')
echo "INPUT(libhwloc-parts.a ${needed//$'\n'/ })" >libhwloc.so
printf 'Name: hwloc\nDescription: a part of FasterMoE\nVersion: %s\nLibs: -L%s -lhwloc\nCflags: %s\n' \
  "$version" "$PWD" "$flags" >hwloc.pc
