#!/usr/bin/env bash
# Installs, uses and removes the Debian packages of a folder, in a root directory of their own: Tests/deb.sh FOLDER.
# That root has the machine's list of installed packages and none of their files, so dependencies count and the machine
# stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
debs=$(realpath "$1")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
triplet=$(dpkg-architecture -qDEB_HOST_MULTIARCH)
library=("$debs"/libfastermoe0_*.deb) dev=("$debs"/libfastermoe-dev_*.deb) tools=("$debs"/fastermoe-tools_*.deb)
mkdir -p "$root"/var/lib/dpkg/{updates,info,triggers,parts}
sed '/^Package: \(libfastermoe\|fastermoe\)/,/^$/d' /var/lib/dpkg/status >"$root/var/lib/dpkg/status"
in_root() { dpkg --root="$root" --force-not-root --log=/dev/null "$@"; }
fail() { echo "deb.sh: failed: $*"; exit 1; }

! in_root --install "${dev[0]}" >/dev/null 2>&1 || fail "libfastermoe-dev can be installed without the library"
in_root --purge libfastermoe-dev >/dev/null 2>&1 || true
present=("${library[0]}" "${dev[0]}")
[ ! -e "${tools[0]}" ] || present+=("${tools[0]}")
in_root --install "${present[@]}" >"$root/log" 2>&1 || { cat "$root/log"; fail "the packages cannot be installed"; }
in_root --verify libfastermoe0 libfastermoe-dev || fail "what is installed is not what was packed"

# As a user builds and runs the README's program, the root in front of all paths.
export PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_PATH=$root/usr/lib/$triplet/pkgconfig LD_LIBRARY_PATH=$root/usr/lib/$triplet
awk '/^```c$/ {inside = 1; next} /^```$/ {if (inside) exit} inside' README.md >"$root/step.c"
# shellcheck disable=SC2046
gcc -std=c99 -Wall -Wextra -Werror "$root/step.c" $(pkg-config --cflags --libs fastermoe) -o "$root/step"
"$root/step" | grep -q "computed" || fail "the program does not run"
[ "$(LD_DEBUG=libs "$root/step" 2>&1 | grep -c "calling init: $root/.*libfastermoe")" = 1 ] || fail "another library was used"
Tests/CAPITests/symbols.sh "$root/usr/include/fastermoe.h" "$root/usr/lib/$triplet"
mkdir "$root/cmake"
cat >"$root/cmake/CMakeLists.txt" <<'EOF'
cmake_minimum_required(VERSION 3.16)
project(consumer C)
find_package(FasterMoE 0.1 REQUIRED)
add_executable(step ../step.c)
target_link_libraries(step PRIVATE FasterMoE::fastermoe)
EOF
cmake -S "$root/cmake" -B "$root/cmake/build" -DCMAKE_PREFIX_PATH="$root/usr" >"$root/log" && cmake --build "$root/cmake/build" >>"$root/log" &&
  "$root/cmake/build/step" >/dev/null || { cat "$root/log"; fail "the CMake package"; }
if [ -e "${tools[0]}" ]; then "$root/usr/bin/fastermoe" --help >/dev/null || fail "fastermoe --help"; fi
# What is not for sources to say: an address (DEBEMAIL), and a bug in which Debian was asked to take the package.
unsaid=bogus-mail-host,bogus-mail-host-in-debian-changelog,initial-upload-closes-no-bugs
if command -v lintian >/dev/null; then lintian --allow-root --fail-on error,warning --suppress-tags $unsaid "${present[@]}"; else echo "deb.sh: no lintian here, not run"; fi

names=$(for p in "${present[@]}"; do dpkg-deb -f "$p" Package; done)
# shellcheck disable=SC2086
in_root --purge $names >"$root/log" 2>&1 || { cat "$root/log"; fail "the packages cannot be removed"; }
left=$(find "$root/usr" ! -type d 2>/dev/null || true)
[ -z "$left" ] || fail "left behind: $left"
echo "$(echo "$names" | wc -w) packages: installed, built with, run, removed"
