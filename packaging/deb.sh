#!/usr/bin/env bash
# Debian packages of what `make install` installs: packaging/deb.sh FOLDER. `make deb` calls it; Tests/deb.sh tests them.
#   libfastermoe0     the library, both builds of it
#   libfastermoe-dev  headers, the link for linking, pkg-config and CMake packages, examples
#   fastermoe-tools   programs, for both CPU levels, and their manual pages, where `make install` installs some
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "$1")
version=$(awk '/define FMOE_VERSION_(MAJOR|MINOR|PATCH)/ {v = v s $3; s = "."} END {print v}' include/fastermoe.h)-1
triplet=$(dpkg-architecture -qDEB_HOST_MULTIARCH)
architecture=$(dpkg-architecture -qDEB_HOST_ARCH)
# Of whoever builds them, in the variables that Debian's own tools read; nobody is named in the sources.
maintainer="${DEBFULLNAME:-FasterMoE} <${DEBEMAIL:-fastermoe@localhost}>"
# The same sources give the same packages.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH
umask 022
rm -rf "$out" && mkdir -p "$out"
all=$out/all
make --no-print-directory install DESTDIR="$all" PREFIX=/usr LIBDIR="lib/$triplet" >/dev/null

# take PACKAGE PATH...: what is there of the paths moves from everything into the package.
take() {
  local package=$1 path
  shift
  for path in "$@"; do
    [ -e "$all/$path" ] || [ -L "$all/$path" ] || continue
    mkdir -p "$out/$package/$(dirname "$path")"
    mv "$all/$path" "$out/$package/$path"
  done
}

lib=usr/lib/$triplet
mapfile -t libraries < <(cd "$all" && ls -d "$lib"/libfastermoe.so.* "$lib/glibc-hwcaps" 2>/dev/null)
take libfastermoe0 "${libraries[@]}"
take libfastermoe-dev usr/include "$lib/libfastermoe.so" "$lib/pkgconfig" "$lib/cmake"
take fastermoe-tools usr/bin usr/lib/fastermoe usr/share/man usr/share/bash-completion
left=$(find "$all" ! -type d)
[ -z "$left" ] || { echo "installed and in no package: $left" >&2; exit 1; }
rm -rf "$all"
mkdir -p "$out/libfastermoe-dev/usr/share/doc/libfastermoe-dev/examples"
cp -r examples/c examples/cpp "$out/libfastermoe-dev/usr/share/doc/libfastermoe-dev/examples/"
rm -rf "$out"/libfastermoe-dev/usr/share/doc/libfastermoe-dev/examples/*/build
find "$out" -name '*.1' -exec gzip -9n {} +

# needs PACKAGE: what its programs and libraries are linked to, as a Depends line has it.
needs() {
  local place
  place=$(mktemp -d)
  mkdir "$place/debian"
  printf 'Source: fastermoe\n\nPackage: %s\nArchitecture: any\n' "$1" >"$place/debian/control"
  printf 'libfastermoe 0 libfastermoe0 (>= %s)\n' "${version%-*}" >"$place/debian/shlibs.local"
  (cd "$place" && find "$out/$1" -type f \( -name '*.so*' -o -path '*/bin/*' \) -exec \
    dpkg-shlibdeps -O -l"$out/libfastermoe0/$lib" --ignore-missing-info {} + 2>/dev/null) | sed -n 's/^shlibs:Depends=//p'
  rm -rf "$place"
}

# package NAME SECTION DEPENDS SUMMARY TEXT: its control files, then the package.
package() {
  local name=$1 place=$out/$1 doc=$out/$1/usr/share/doc/$1
  mkdir -p "$place/DEBIAN" "$doc"
  {
    printf 'FasterMoE %s\n\nInside are the Swift runtime, its standard library and FoundationEssentials,\n' "${version%-*}"
    printf 'Copyright (c) 2014-2026 Apple Inc. and the Swift project authors,\n'
    printf 'Apache License 2.0 with Runtime Library Exception (/usr/share/common-licenses/Apache-2.0).\n'
    [ ! -e build/hwloc/hwloc.pc ] || { printf '\nInside is hwloc, too:\n\n' && cat /usr/share/doc/libhwloc-dev/copyright; }
    if [ -e LICENSE ]; then printf '\nFasterMoE itself:\n\n' && cat LICENSE; else printf '\nOf FasterMoE itself no licence is stated.\n'; fi
  } >"$doc/copyright"
  {
    printf 'fastermoe (%s) unstable; urgency=medium\n\n' "$version"
    awk '/^## / { sections++ } sections != 1 { next }
      /^- / { point() } /^(- |  )/ { sub(/^- /, ""); words = words " " $0 } END { point() }
      function point(  n, word, i, line) { # an entry in lines of at most 78 columns
        n = split(words, word, " "); line = "  *"; words = ""
        for (i = 1; i <= n; i++) {
          if (length(line) + 1 + length(word[i]) > 78) { print line; line = "   " }
          line = line " " word[i]
        }
        if (n) print line
      }' CHANGELOG.md
    printf '\n -- %s  %s\n' "$maintainer" "$(date -uR -d "@$SOURCE_DATE_EPOCH")"
  } | gzip -9n >"$doc/changelog.Debian.gz"
  {
    printf 'Package: %s\nSource: fastermoe\nVersion: %s\nArchitecture: %s\n' "$name" "$version" "$architecture"
    printf 'Maintainer: %s\nInstalled-Size: %s\n' "$maintainer" "$(du -sk --exclude=DEBIAN "$place" | cut -f1)"
    [ -z "$3" ] || printf 'Depends: %s\n' "$3"
    printf 'Section: %s\nPriority: optional\nMulti-Arch: %s\n' "$2" "$([ "$name" = fastermoe-tools ] && echo foreign || echo same)"
    printf 'Description: %s\n%s\n' "$4" "$5"
  } >"$place/DEBIAN/control"
  (cd "$place" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum) >"$place/DEBIAN/md5sums"
  find "$place" -type d -exec chmod 755 {} +
  find "$place" -type f ! -path '*/bin/*' -exec chmod 644 {} +
  dpkg-deb --root-owner-group --build "$place" "$out/${name}_${version}_$architecture.deb" >/dev/null
  rm -rf "$place"
  echo "$out/${name}_${version}_$architecture.deb"
}

about=" FasterMoE trains mixture-of-experts layers whose experts are spread over many
 workers, threads of one process or MPI processes on many machines. It is a C
 library."
[ ! -d "$out/fastermoe-tools" ] || tools=$(needs fastermoe-tools)
depends=$(needs libfastermoe0)
mkdir -p "$out/libfastermoe0/DEBIAN"
printf 'libfastermoe 0 libfastermoe0 (>= %s)\n' "${version%-*}" >"$out/libfastermoe0/DEBIAN/shlibs"
printf 'activate-noawait ldconfig\n' >"$out/libfastermoe0/DEBIAN/triggers"
[ -z "${tools:-}" ] || package fastermoe-tools science "$tools" "plan and measure mixture-of-experts training on CPUs" "$about
 .
 This package has the program fastermoe."
package libfastermoe-dev libdevel "libfastermoe0 (= $version)" "mixture-of-experts layers on CPUs, for building with" "$about
 .
 This package has the headers and what pkg-config and CMake need."
package libfastermoe0 libs "$depends" "mixture-of-experts layers on CPUs" "$about"
