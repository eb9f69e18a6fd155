# FasterMoE: `make demo` installs what is missing, builds, and trains a model; `make test` runs everything that must pass.
PREFIX   ?= /usr/local
# Below PREFIX; Debian's is lib/x86_64-linux-gnu.
LIBDIR   ?= lib
DESTDIR  ?=
VERSION   := $(shell awk '/define FMOE_VERSION_(MAJOR|MINOR|PATCH)/ {v = v s $$3; s = "."} END {print v}' include/fastermoe.h)
SOVERSION := $(firstword $(subst ., ,$(VERSION)))
ARCH      := $(shell uname -m)

# The base library runs on every CPU with AVX2 and FMA; the loader prefers the other one where there is AVX-512.
BASE_CPU  := haswell
WIDE_CPU  := skylake-avx512
WIDE_DIR  := glibc-hwcaps/x86-64-v4
LEVELS    := base $(if $(filter x86_64,$(ARCH)),wide)

OUT       := $(CURDIR)/build
STAGE     := $(OUT)/prefix
# The library has hwloc inside, where the system has it as an archive.
HWLOC     := $(OUT)/hwloc
SWIFT_BUILD := PKG_CONFIG_PATH=$(HWLOC):$$PKG_CONFIG_PATH swift build -c release
PRODUCTS  := fastermoe fastermoe-tool
LIBRARY   := libfastermoe.so
# The tool, and beside the library the one for AVX-512, which the tool runs where it can.
TOOL      := fastermoe
WIDE_TOOL := lib/fastermoe/x86-64-v4
BUILT     := $(OUT)/lib/$(LIBRARY).$(VERSION)
SOURCES   := $(shell find Sources include -type f) Package.swift

.PHONY: all build level-base level-wide stage demo test fuzz fuzz-library faults deb soak docs bench bench-adamw bench-rows choices bench-hosts bench-predict install uninstall format clean packages-build packages-test packages-bench study bench-paper

all: build

# ---- what the system must have ------------------------------------------------------------------------------------
APT_BUILD := libhwloc-dev pkg-config gcc g++ libc6-dev
APT_MPI   := libopenmpi-dev openmpi-bin libmpich-dev mpich
APT_TEST  := $(APT_BUILD) clang valgrind cmake dpkg-dev python3-venv $(APT_MPI) iproute2
APT_BENCH := $(APT_BUILD) libopenblas-dev
apt = @missing=""; for p in $(1); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
  if [ -n "$$missing" ]; then echo "installing:$$missing"; \
    as=""; [ "$$(id -u)" = 0 ] || as=sudo; \
    $$as apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$as apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
packages-build: ; $(call apt,$(APT_BUILD))
packages-test:  ; $(call apt,$(APT_TEST))
packages-bench: ; $(call apt,$(APT_BENCH))
# Python's safetensors and what it needs, for the test that exchanges files with it, in a folder of its own; where there is none, the test says so.
export PYTHON ?= $(OUT)/python/bin/python3
$(OUT)/python/bin/python3:
	{ python3 -m venv $(OUT)/python && $@ -m pip install --quiet --disable-pip-version-check safetensors numpy xxhash; } || rm -rf $(OUT)/python

# ---- the library --------------------------------------------------------------------------------------------------
build: packages-build
	@$(MAKE) --no-print-directory $(BUILT)

$(BUILT): $(SOURCES) $(HWLOC)/made Makefile $(wildcard pkgconfig/*.in)
	$(MAKE) --no-print-directory -j 2 $(LEVELS:%=level-%)
	$(call place,$(OUT)/lib)
	@mkdir -p $(OUT)/pkgconfig
	$(call fill,$(OUT),$(OUT)/lib,$(CURDIR)/include,-Wl$(comma)-rpath$(comma)$${libdir}) pkgconfig/fastermoe.pc.in > $(OUT)/pkgconfig/fastermoe.pc
	@touch $(BUILT)

# The compiler keeps one core busy, so both levels at once.
level-base: CPU := $(BASE_CPU)
level-wide: CPU := $(WIDE_CPU)
level-base level-wide: level-%:
	for p in $(PRODUCTS); do FASTERMOE_CPU=$(CPU) $(SWIFT_BUILD) --product $$p --scratch-path .build/$* || exit 1; done

$(HWLOC)/made: packaging/hwloc.sh | packages-build
	packaging/hwloc.sh $(HWLOC)
	@touch $@

comma := ,
# place DIR: both levels of the library and their links.
define place
	install -d $(1) $(if $(filter wide,$(LEVELS)),$(1)/$(WIDE_DIR))
	install -m 755 -s .build/base/release/$(LIBRARY) $(1)/$(LIBRARY).$(VERSION)
	ln -sf $(LIBRARY).$(VERSION) $(1)/$(LIBRARY).$(SOVERSION)
	ln -sf $(LIBRARY).$(SOVERSION) $(1)/$(LIBRARY)
	$(if $(filter wide,$(LEVELS)),install -m 755 -s .build/wide/release/$(LIBRARY) $(1)/$(WIDE_DIR)/$(LIBRARY).$(VERSION))
	$(if $(filter wide,$(LEVELS)),ln -sf $(LIBRARY).$(VERSION) $(1)/$(WIDE_DIR)/$(LIBRARY).$(SOVERSION))
endef
# fill PREFIX,LIBDIR,INCLUDEDIR,RPATH: a template with its names filled in.
fill = sed -e 's|@PREFIX@|$(1)|' -e 's|@LIBDIR@|$(2)|' -e 's|@INCLUDEDIR@|$(3)|' -e 's|@RPATH@ *|$(4) |' \
  -e 's|@UP@|$(shell echo $(LIBDIR) | sed 's|[^/][^/]*|..|g')|' -e 's|@VERSION@|$(VERSION)|' -e 's|@SOVERSION@|$(SOVERSION)|'

HEADERS := fastermoe.h fastermoe.hpp fastermoe_mpi.h
CMAKE   := $(LIBDIR)/cmake/FasterMoE
install: build
	$(call place,$(DESTDIR)$(PREFIX)/$(LIBDIR))
	install -D -m 755 -s .build/base/release/fastermoe-tool $(DESTDIR)$(PREFIX)/bin/$(TOOL)
	$(if $(filter wide,$(LEVELS)),install -D -m 755 -s .build/wide/release/fastermoe-tool $(DESTDIR)$(PREFIX)/$(WIDE_TOOL)/$(TOOL))
	install -D -m 644 docs/$(TOOL).1 $(DESTDIR)$(PREFIX)/share/man/man1/$(TOOL).1
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/$(LIBDIR)/pkgconfig $(DESTDIR)$(PREFIX)/$(CMAKE)
	install -m 644 $(HEADERS:%=include/%) $(DESTDIR)$(PREFIX)/include
	$(call fill,$(PREFIX),$${prefix}/$(LIBDIR),$${prefix}/include,) pkgconfig/fastermoe.pc.in > $(DESTDIR)$(PREFIX)/$(LIBDIR)/pkgconfig/fastermoe.pc
	for f in FasterMoEConfig FasterMoEConfigVersion; do \
	  $(fill) pkgconfig/$$f.cmake.in > $(DESTDIR)$(PREFIX)/$(CMAKE)/$$f.cmake || exit 1; done
	@if [ -z "$(DESTDIR)" ] && [ "$$(id -u)" = 0 ] && [ "$(PREFIX)" = /usr/local -o "$(PREFIX)" = /usr ]; then ldconfig; fi

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/$(LIBDIR)/$(LIBRARY)* $(DESTDIR)$(PREFIX)/$(LIBDIR)/$(WIDE_DIR)/$(LIBRARY)*
	rm -f $(HEADERS:%=$(DESTDIR)$(PREFIX)/include/%) $(DESTDIR)$(PREFIX)/$(LIBDIR)/pkgconfig/fastermoe.pc
	rm -rf $(DESTDIR)$(PREFIX)/$(CMAKE) $(DESTDIR)$(PREFIX)/lib/fastermoe
	rm -f $(DESTDIR)$(PREFIX)/bin/$(TOOL) $(DESTDIR)$(PREFIX)/share/man/man1/$(TOOL).1
	-rmdir --ignore-fail-on-non-empty -p $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/$(LIBDIR)/$(WIDE_DIR) $(DESTDIR)$(PREFIX)/$(LIBDIR)/pkgconfig $(DESTDIR)$(PREFIX)/$(LIBDIR)/cmake $(DESTDIR)$(PREFIX)/include 2>/dev/null

stage: build
	@$(MAKE) --no-print-directory install PREFIX=$(STAGE) >/dev/null

# ---- the main job, the tests, the figures -------------------------------------------------------------------------
DEMO_SECONDS ?= 135
demo: stage
	PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig $(MAKE) --no-print-directory -C examples/c BUILD=$(OUT)/examples RPATH=1 all
	$(OUT)/examples/train_gpt --seconds $(DEMO_SECONDS)

test: packages-test stage | $(filter $(OUT)/%,$(PYTHON))
	Tests/all.sh $(STAGE)

# Fuzzers, two at a time, SECONDS each, by the compiler that comes with Swift: Tests/Fuzz. FUZZERS="calls plans" names some of them.
fuzz: fuzz-library
	$(MAKE) --no-print-directory -C Tests/Fuzz -j 2

fuzz-library: packages-build $(HWLOC)/made
	FASTERMOE_CPU=$(BASE_CPU) $(SWIFT_BUILD) --product fastermoe --scratch-path .build/fuzz/library -Xswiftc -sanitize=address \
	  -Xswiftc -sanitize-coverage=edge,trace-cmp,inline-8bit-counters,pc-table

# Everything that can be made to fail, made to fail; some minutes. Prints a table.
faults: packages-test stage fuzz-library
	Tests/faults.sh $(STAGE)

# Debian packages, to build/deb: the library, what is needed to build with it, and the tools where there are any.
deb: build
	packaging/deb.sh $(OUT)/deb

# How the memory of a training goes, MINUTES long.
MINUTES ?= 20
soak: stage
	PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig $(MAKE) --no-print-directory -C examples/c BUILD=$(OUT)/examples RPATH=1 all
	Tests/soak.sh $(OUT)/examples/train_gpt $(MINUTES)

BENCH ?= --json $(OUT)/bench.json
bench: packages-bench stage
	gcc -std=gnu11 -O3 -march=native -Wall -Wextra Benchmarks/bench.c -o $(OUT)/bench \
	  $$(PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config --cflags --libs fastermoe openblas) -Wl,-rpath,$(STAGE)/lib -lm -pthread
	$(OUT)/bench $(BENCH)
	gcc -std=gnu11 -O3 -Wall -Wextra Benchmarks/workers.c -o $(OUT)/workers \
	  $$(PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config --cflags --libs fastermoe) -Wl,-rpath,$(STAGE)/lib -lm -pthread
	$(OUT)/workers --json $(OUT)/workers.json
	gcc -std=gnu11 -O3 -Wall -Wextra Benchmarks/gates.c -o $(OUT)/gates \
	  $$(PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config --cflags --libs fastermoe) -Wl,-rpath,$(STAGE)/lib -pthread
	$(OUT)/gates
	gcc -std=gnu11 -O3 -Wall -Wextra Benchmarks/plan.c -o $(OUT)/plan \
	  $$(PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config --cflags --libs fastermoe) -Wl,-rpath,$(STAGE)/lib -lm
	$(OUT)/plan

# An expert's speed by its rows, beside OpenBLAS and the limit: a table and a plot for one thread and for all.
bench-rows: packages-bench stage
	gcc -std=gnu11 -O3 -march=native -Wall -Wextra Benchmarks/rows.c -o $(OUT)/rows \
	  $$(PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config --cflags --libs fastermoe openblas) -Wl,-rpath,$(STAGE)/lib -lm -pthread
	$(OUT)/rows --csv $(OUT)/rows.csv --svg $(OUT)/rows.svg
	$(OUT)/rows --threads 2 --csv $(OUT)/rows-2.csv --svg $(OUT)/rows-2.svg

# Which kernels are fastest, by rows, sizes and threads: measured here for both CPU levels and written into the sources, as the
# tables of Intel's processors or of all others. The speeds that decided go to build/choices-*.csv. Ten minutes of a machine
# that does nothing else.
MAKER := $(shell grep -q GenuineIntel /proc/cpuinfo && echo Intel)
choices: packages-build $(HWLOC)/made
	@mkdir -p $(OUT)
	FASTERMOE_CPU=$(BASE_CPU) $(SWIFT_BUILD) --product Choose --scratch-path .build/base
	$(if $(filter wide,$(LEVELS)),FASTERMOE_CPU=$(WIDE_CPU) $(SWIFT_BUILD) --product Choose --scratch-path .build/wide)
	.build/base/release/Choose $(OUT)/choices-base.csv > $(OUT)/choices && mv $(OUT)/choices Sources/FasterMoE/Ground/ChoicesBase$(MAKER).swift
	if grep -q avx512vl /proc/cpuinfo; then .build/wide/release/Choose $(OUT)/choices-wide.csv > $(OUT)/choices && \
	  mv $(OUT)/choices Sources/FasterMoE/Ground/ChoicesWide$(MAKER).swift; fi
	swift format -i Sources/FasterMoE/Ground/Choices*.swift

# AdamW beside loops that move the same bytes.
bench-adamw: packages-build stage
	gcc -std=gnu11 -O3 -march=native -Wall -Wextra Benchmarks/adamw.c -o $(OUT)/adamw \
	  $$(PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config --cflags --libs fastermoe) -Wl,-rpath,$(STAGE)/lib -pthread
	for n in 1 2; do $(OUT)/adamw --threads $$n || exit 1; done

# Speeds between hosts, which are network namespaces of this machine with shaped links; needs root.
bench-hosts: packages-test stage
	Benchmarks/hosts.sh $(STAGE) $(OUT)

# Strategies and predictions between such hosts.
bench-predict: packages-test stage
	Benchmarks/predict.sh $(STAGE) $(OUT)

# How gates converge, by steps and by time; times need root.
study: packages-test stage
	Benchmarks/study.sh $(STAGE) $(OUT)

# The FasterMoE paper's figures beside predictions for its clusters and models.
bench-paper: stage
	$(STAGE)/bin/$(TOOL) paper Benchmarks/paper/models.json

format:
	swift format -i -r Sources Tests Package.swift

# docs/reference.md, from the header.
docs:
	awk -f docs/reference.awk include/fastermoe.h > docs/reference.md

clean:
	rm -rf .build build examples/c/build examples/cpp/build
