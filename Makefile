# gsa.c: `make` builds the programs, `make help` says what else there is.
#   config=release|debug|sanitize|clang|plain|fuzz|aarch64   NO_OMP=1   NO_DNNL=1   NO_CUDA=1   CC=clang   MARCH=native
#   PRECISION=bf16|fp32

CC      ?= cc
ifeq ($(origin CC),default)
CC      := gcc
endif
config  ?= release

comma := ,
hash  := \#

# ---- configurations: release's programs stand where their sources do, all others below build/

OUT      := build/$(config)/
OPTIMISE := -O3 -g
ifeq ($(config),release)
OUT      :=
else ifeq ($(config),debug)
OPTIMISE := -O0 -g3
else ifeq ($(config),sanitize)
OPTIMISE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
else ifeq ($(config),clang) # another compiler's warnings are errors
CC       := clang
OPTIMISE += -Werror
else ifeq ($(config),plain) # as on a machine without oneDNN and OpenMP
NO_DNNL  := 1
NO_OMP   := 1
else ifeq ($(config),fuzz) # every branch counted, for libFuzzer, which is one thread
CC       := clang
OPTIMISE := -O1 -g -fsanitize=fuzzer-no-link,address,undefined,float-cast-overflow -fno-sanitize-recover=all \
            -fno-omit-frame-pointer -Wno-pass-failed -Wno-unused-function
NO_DNNL  := 1
NO_OMP   := 1
else ifeq ($(config),aarch64) # built on x86-64; a program is a script that runs PROGRAM.aarch64 by the emulator
CC       := aarch64-linux-gnu-gcc
MARCH    := armv8-a
NO_DNNL  := 1
EMULATOR := qemu-aarch64 -L /usr/aarch64-linux-gnu
DEBIAN   := build/aarch64/debian
override CPPFLAGS += -isystem $(DEBIAN)/usr/include
override LDFLAGS += -L$(DEBIAN)/usr/lib/aarch64-linux-gnu -Wl,-rpath,$(CURDIR)/$(DEBIAN)/usr/lib/aarch64-linux-gnu
else
$(error config=$(config) is not known: release, debug, sanitize, clang, plain, fuzz or aarch64)
endif
ifneq ($(config),release)
NO_CUDA  := 1
endif

# ---- what is here: each probe compiles or asks, nothing is guessed

# $(call have,lines of C,flags,libraries): yes, where they make a program
have     = $(shell printf '%s\n' $(1) | $(CC) $(CPPFLAGS) $(2) -x c - -o /dev/null $(LDFLAGS) $(3) 2>/dev/null && \
             echo yes)
EMPTY   := 'int main(void){return 0;}'
MARCH   ?= native
ARCH    := $(if $(call have,$(EMPTY),-march=$(MARCH)),-march,-mcpu)=$(MARCH)
ifndef NO_OMP # the second is for Apple's clang beside a libomp
OMP     := $(or $(if $(call have,$(EMPTY),-fopenmp),-fopenmp),\
             $(if $(call have,$(EMPTY),-Xpreprocessor -fopenmp,-lomp),-Xpreprocessor -fopenmp))
endif
ifndef NO_DNNL
DNNL    := $(call have,'$(hash)include <dnnl.h>' 'int main(void){return dnnl_version() == 0;}',,-ldnnl)
endif
ifndef NO_CUDA
NVCC    := $(shell command -v nvcc 2>/dev/null)
GPU_ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
endif

# override: what is given on the command line of make is added to these flags, behind them, so that it wins
GIVEN    := $(strip $(CPPFLAGS) $(CFLAGS))
override CPPFLAGS += -D_GNU_SOURCE
# -ffp-contract=fast: a product and a sum in one instruction, as clang and nvcc do without being asked
override CFLAGS   := -std=c11 -Wall -Wextra -fno-math-errno -ffp-contract=fast $(ARCH) $(OPTIMISE) \
                     $(or $(OMP),-fopenmp-simd -Wno-unknown-pragmas) $(CFLAGS)
override LDLIBS   += $(if $(filter -Xpreprocessor,$(OMP)),-lomp) -lm
# everything that changes the objects without changing a source is in the folder's name
LINKED   := build/$(config)/linked$(subst /,-,$(OUT))
BUILD    := build/$(config)/$(notdir $(CC))-$(MARCH)$(if $(OMP),-omp)$(if $(DNNL),-dnnl)$(if \
            $(GIVEN),-$(firstword $(shell echo '$(GIVEN)' | cksum)))

# ---- programs: each from its own source and the objects it shares

PROGRAMS := train_gsa infer tokenizer/train_bpe tokenizer/tokenize data/prepare data/make_stories data/make_recall \
            dev/plot
ALL_TESTS := $(patsubst test/%.c,%,$(wildcard test/test_*.c))
TESTS    := $(ALL_TESTS)
SCRIPTS  := $(patsubst test/%,%,$(wildcard test/test_*.sh))
TOOLS    := test/check_stories
BENCHES  := dev/scan_bench dev/infer_bench dev/logits
ifdef NVCC
CUDA_PROGRAMS := train_gsacu
ifneq ($(GPU_ARCH),) # minutes of compiling, and nothing to run without a card
CUDA_TESTS    := $(foreach t,$(patsubst test/%.cu,%,$(wildcard test/test_*.cu)),$(t) $(t)_fp32)
endif
endif

all: probe $(PROGRAMS:%=$(OUT)%) $(CUDA_PROGRAMS)

COMMON    := gsa/util gsa/flags
TOKENIZER := tokenizer/tokenizer
GROUND    := gsa/model gsa/checkpoint gsa/sample tokenizer/stored $(TOKENIZER) data/loader data/text $(COMMON)
MODEL     := gsa/run/train gsa/run/settings gsa/run/save gsa/run/memory gsa/run/adapt gsa/run/starts \
             gsa/run/into_splats gsa/run/ranks gsa/look/measure data/stories $(GROUND)
LOOK      := gsa/look/classes gsa/look/splats gsa/look/picture gsa/look/report

# program.parts: objects beside the program's own; program.libs: libraries beside -lm
train_gsa.parts            := $(MODEL)
infer.parts                := gsa/run/adapt gsa/run/starts gsa/look/measure $(LOOK) data/tasks data/json $(GROUND)
tokenizer/train_bpe.parts  := data/json data/text $(TOKENIZER) $(COMMON)
tokenizer/tokenize.parts   := data/text $(TOKENIZER) $(COMMON)
data/prepare.parts         := data/loader data/text $(TOKENIZER) $(COMMON)
data/make_stories.parts    := data/stories $(COMMON)
dev/plot.parts             := gsa/look/picture data/text $(COMMON)
data/make_recall.parts     := $(COMMON)
test/check_stories.parts   := data/stories $(COMMON)
dev/scan_bench.parts       := $(MODEL)
dev/logits.parts           := $(MODEL)
dev/scan_bench.libs         = $(NETWORK_LIBS)
dev/infer_bench.parts      := $(infer.parts)
dev/infer_bench.libs        = $(infer.libs)
dev/logits.libs             = $(NETWORK_LIBS)
test/fuzz/fuzz.parts       := test/fuzz/targets test/fuzz/table test/fuzz/vocabulary data/tasks $(LOOK) \
                              data/json $(MODEL)
$(foreach t,$(ALL_TESTS),$(eval test/$(t).parts := $(MODEL) data/tasks data/json $(LOOK)))

NETWORK_LIBS := $(if $(DNNL),-ldnnl) -lutf8proc -lpthread
train_gsa.libs             := $(NETWORK_LIBS)
infer.libs                 := $(NETWORK_LIBS) -lcjson
tokenizer/train_bpe.libs   := -lutf8proc -lcjson
tokenizer/tokenize.libs    := -lutf8proc
data/prepare.libs          := -lutf8proc
data/make_stories.libs     := -lcjson
test/fuzz/fuzz.libs         = -fsanitize=fuzzer $(addprefix -Wl$(comma)--wrap=,exit malloc calloc realloc free \
                              vasprintf fopen fclose open close mmap munmap) $(NETWORK_LIBS) -lcjson
$(foreach t,$(ALL_TESTS),$(eval test/$(t).libs := $(NETWORK_LIBS) -lcjson))

# ---- rules

# $(1): the program's file, $(2): its name above
define program
$(1): $$(addprefix $(BUILD)/,$(2).o $$(addsuffix .o,$$($(2).parts))) $(LINKED)
	@mkdir -p $$(@D)
	$$(CC) $$(CFLAGS) $$(LDFLAGS) -o $$@$(if $(EMULATOR),.aarch64) $$(filter %.o,$$^) $$($(2).libs) $$(LDLIBS)
	$(if $(EMULATOR),@printf '#!/bin/sh\nexec $(EMULATOR) -0 "$$$$0" "$$$$0.aarch64" "$$$$@"\n' >$$@ && chmod +x $$@)
endef
$(foreach p,$(PROGRAMS),$(eval $(call program,$(OUT)$(p),$(p))))
$(foreach t,$(ALL_TESTS),$(eval $(call program,build/$(config)/test/$(t),test/$(t))))
$(foreach t,$(TOOLS) $(BENCHES) test/fuzz/fuzz,$(eval $(call program,build/$(config)/$(t),$(t))))

$(BUILD)/%.o: %.c | libraries
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(if $(DNNL),-DUSE_DNNL) $(CFLAGS) -MMD -MP -c -o $@ $<

# gcc 12 for aarch64 crashes on largest errors that are found in nested loops, where it makes vectors of them
ifneq ($(findstring aarch64,$(shell $(CC) -dumpmachine 2>/dev/null)),)
$(BUILD)/test/%.o: override CFLAGS += -fvect-cost-model=very-cheap
endif

# the page of infer's report is a part of the program: its bytes as numbers with commas
$(BUILD)/gsa/look/report.o: $(BUILD)/gsa/look/report_page.h
$(BUILD)/gsa/look/report.o: override CPPFLAGS += -I$(BUILD)/gsa/look
$(BUILD)/gsa/look/report_page.h: gsa/look/report.html
	@mkdir -p $(@D)
	od -An -v -tu1 $< | sed 's/\([0-9]\)  */\1,/g; s/\([0-9]\)$$/\1,/' >$@.tmp && mv $@.tmp $@

# GPU code: for the card that answers, else for Ampere and newer (PTX) and Hopper; each source in bf16 and, for
# checking, in fp32
PRECISION ?= bf16
GENCODE   := $(if $(GPU_ARCH),-gencode arch=compute_$(GPU_ARCH:90=90a)$(comma)code=sm_$(GPU_ARCH:90=90a),\
             -gencode arch=compute_80$(comma)code=[sm_80$(comma)compute_80] \
             -gencode arch=compute_90a$(comma)code=sm_90a)
NVCCFLAGS := -std=c++17 -O3 -t 0 $(GENCODE) -Xcompiler -Wall,-Wextra,$(ARCH)$(if $(OMP),$(comma)-fopenmp)
CUDA      := $(BUILD)/cuda$(GPU_ARCH:%=-sm_%)
MODEL_OBJECTS := $(MODEL:%=$(BUILD)/%.o)

$(CUDA)/%.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) $(CPPFLAGS) $(NVCCFLAGS) -MMD -MP -c -o $@ $<
$(CUDA)/%_fp32.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) $(CPPFLAGS) $(NVCCFLAGS) -DGSA_FP32 -MMD -MP -c -o $@ $<
train_gsacu: $(CUDA)/train_gsa$(if $(filter fp32,$(PRECISION)),_fp32).o
build/$(config)/bench: $(CUDA)/dev/cuda/bench.o
build/$(config)/positions: $(CUDA)/dev/cuda/positions.o
build/$(config)/ranks_bench: $(CUDA)/dev/cuda/ranks_bench.o
$(foreach t,$(CUDA_TESTS),$(eval build/$(config)/test/$(t): $(CUDA)/test/$(t).o))
train_gsacu build/$(config)/bench build/$(config)/positions build/$(config)/ranks_bench \
    $(CUDA_TESTS:%=build/$(config)/test/%): $(MODEL_OBJECTS) $(LINKED)
	@mkdir -p $(@D)
	$(NVCC) $(GENCODE) -o $@ $(filter %.o,$^) -lcublasLt $(NETWORK_LIBS) \
	    $(if $(OMP),-Xcompiler -fopenmp) $(LDLIBS)

# remembers which build the programs were linked from, so that another compiler or flag links them anew
$(LINKED): FORCE
	@mkdir -p $(@D)
	@echo '$(BUILD) $(LDFLAGS) $(PRECISION)' | cmp -s - $@ || echo '$(BUILD) $(LDFLAGS) $(PRECISION)' > $@
FORCE:

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

probe:
	@echo "$(if $(shell command -v $(CC)),✓ $(CC) $(shell $(CC) -dumpfullversion 2>/dev/null || \
	    $(CC) -dumpversion),✗ $(CC) not found)"
	@echo "$(if $(OMP),✓ OpenMP,✗ OpenMP $(if $(NO_OMP),switched off,not found): one thread)"
	@echo "$(if $(DNNL),✓ oneDNN,✗ oneDNN $(if $(NO_DNNL),switched off,not found): \
	    the built-in matrix product (about half as fast))"
	@echo "$(if $(NVCC),✓ nvcc for $(if $(GPU_ARCH),sm_$(GPU_ARCH),sm_80 and sm_90a$(comma) as no GPU answers),✗ \
	    nvcc $(if $(NO_CUDA),switched off,not found): CPU programs only)"

# without these nothing is built; named as Debian does
MISSING = $(strip $(if $(shell command -v $(CC)),\
    $(if $(call have,'$(hash)include <utf8proc.h>' $(EMPTY),,-lutf8proc),,libutf8proc-dev) \
    $(if $(call have,'$(hash)include <cjson/cJSON.h>' $(EMPTY),,-lcjson),,libcjson-dev) \
    $(if $(call have,'$(hash)include <stb/stb_easy_font.h>' $(EMPTY),,-lm),,libstb-dev),$(CC)))
libraries:
	@missing='$(MISSING)'; [ -z "$$missing" ] || { \
	echo "missing: $$missing; 'make deps' installs what is missing, 'make test' and 'make quickstart' do so too" >&2; \
	exit 1; }

# TESTS, SCRIPTS: fewer than all; built and run on all cores, those first that take longest
test: deps
	@$(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$$(nproc)) build-tests
	@$(MAKE) --no-print-directory run-tests
build-tests: all $(TESTS:%=build/$(config)/test/%) $(TOOLS:%=build/$(config)/%) $(CUDA_TESTS:%=build/$(config)/test/%)
run-tests: build-tests
	@OUT='$(OUT)' \
	    SKIP='$(if $(or $(CUDA_TESTS),$(OUT)),,test_cuda, test_gpus: $(if $(NVCC),no NVIDIA GPU answers,no nvcc))' \
	    test/run build/$(config)/test $(SCRIPTS) $(TESTS) $(CUDA_TESTS)

# from a clone to stories: a training, then five stories from its model; run again, it goes on or just writes them anew.
# Made-up stories copy names and colours from far back. Sharp splats beside standard heads, and no gates, learn that
# first (dev/LOG.md).
QUICKSTART := runs/quickstart
RECIPE     := --steps 2750 --batch 8 \
              --gsa-heads 1 --gain none --phase none --rope-frequencies fixed --forget-gate none
quickstart: deps
	@$(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$$(nproc)) probe $(PROGRAMS) \
	    build/$(config)/test/check_stories
	@if ls $(QUICKSTART)/model_*.bin >/dev/null 2>&1; then flags=--resume; else flags='$(RECIPE)'; fi; \
	./train_gsa $$flags --out $(QUICKSTART)
	@model=$$(ls $(QUICKSTART)/model_*.bin | tail -n 1); echo; echo "five stories by $$model:"; echo; \
	for seed in 1 2 3 4 5; do ./infer generate "$$model" --seed $$seed 2>/dev/null || exit 1; echo '<|endoftext|>'; \
	done | tee $(QUICKSTART)/stories.txt
	@echo; build/$(config)/test/check_stories $(QUICKSTART)/stories.txt --seed 1 --count 70000 | tail -n 1

# twins of every kind of attention on the same text, three seeds: an hour on two cores, minutes on a GPU; stopped, it
# goes on. TRAIN, VAL: texts, else made-up stories; SET: another comparison of dev/compare
SET ?= modes
compare: deps
	@$(MAKE) --no-print-directory all
	@dev/compare $(SET) $(if $(TRAIN),--train $(TRAIN) --val $(VAL)) \
	    $(if $(GPU_ARCH),$(if $(CUDA_PROGRAMS),--gpu)) $(COMPARE)

# every reader of files, FUZZ seconds each: see test/fuzz/run
FUZZ ?= 60
fuzz: deps
	@$(MAKE) --no-print-directory config=fuzz build/fuzz/test/fuzz/fuzz
	@$(MAKE) --no-print-directory probe $(PROGRAMS)
	@test/fuzz/run --seconds $(FUZZ)

# ---- what the programs need, from the distribution

PACKAGES := libutf8proc-dev libcjson-dev libstb-dev fonts-dejavu-core
ifeq ($(config),aarch64)
PACKAGES := gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
deps: $(DEBIAN)/complete
else ifeq ($(config),fuzz)
PACKAGES += clang
else ifeq ($(config),clang)
PACKAGES += clang libomp-dev libdnnl-dev
else
PACKAGES += gcc libgomp1 libdnnl-dev
endif
compare: PACKAGES += python3
fuzz: PACKAGES += clang
deps:
	@missing=; for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	[ -z "$$missing" ] && exit 0; \
	command -v apt-get >/dev/null || { \
	    echo "missing:$$missing (Debian's names); install them with this system's packages"; \
	    exit 1; }; \
	if [ "$$(id -u)" = 0 ]; then run=; elif sudo -n true 2>/dev/null; then run="sudo -n"; \
	else echo "first: sudo apt-get install$$missing"; exit 1; fi; \
	echo "installing$$missing"; \
	$$run apt-get -qq update && $$run env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install $$missing >/dev/null

# the libraries of another architecture, unpacked below build/ by lists of packages of their own: the system stays as
# it is
APT = apt-get -qq -o Dir::State::Lists=lists -o Dir::Cache=cache -o APT::Sandbox::User=root \
    -o APT::Architecture=arm64 -o APT::Architectures=arm64
$(DEBIAN)/complete:
	@rm -rf $(@D) && mkdir -p $(@D)/lists/partial $(@D)/cache/archives/partial
	@echo "fetching arm64 libraries into $(@D)"
	@cd $(@D) && $(APT) update && \
	$(APT) download libstb-dev libutf8proc-dev libutf8proc2 libcjson-dev libcjson1 && \
	for deb in *.deb; do dpkg -x $$deb . || exit 1; done
	@touch $@

# ---- the form of the sources

SOURCES = $(sort $(shell find . -path ./build -prune -o -path ./runs -prune -o -path "./.?*" -prune -o \
    \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) -print))
WRAPPED = $(SOURCES) $(sort $(shell find . -path ./build -prune -o -path ./runs -prune -o -path "./.?*" -prune -o \
    \( -name '*.py' -o -name '*.sh' \) -print)) dev/compare test/run test/soak \
    test/fuzz/run .ci/run Makefile
# other versions write some lines in another way
CLANG_FORMAT = $(firstword $(foreach f,clang-format-14 clang-format,\
    $(if $(findstring version 14.,$(shell $(f) --version 2>/dev/null)),$(f))))
format:
	@[ -n "$(CLANG_FORMAT)" ] || { echo "clang-format 14 is not here: its Debian package is clang-format" >&2; exit 1; }
	@$(CLANG_FORMAT) -i $(SOURCES)
format-check:
	@status=0; \
	if [ -z "$(CLANG_FORMAT)" ]; then echo "skipped: is the code as clang-format 14 writes it? It is not here"; else \
	for f in $(SOURCES); do $(CLANG_FORMAT) $$f | cmp -s - $$f || { \
	    echo "$$f: not as clang-format writes it; make format mends it" >&2; status=1; }; done; fi; \
	for f in $(WRAPPED); do long=$$(LC_ALL=C.UTF-8 grep -nE '^.{121}' $$f | cut -d: -f1 | tr '\n' ' '); \
	    [ -z "$$long" ] || { echo "$$f: more than 120 columns in line $$long" >&2; status=1; }; done; exit $$status

clean:
	rm -rf build $(PROGRAMS) train_gsacu

help:
	@echo "make               the programs: $(PROGRAMS) $(CUDA_PROGRAMS)"
	@echo "make quickstart    install what is missing, build, train on made-up stories, write new ones (3 minutes)"
	@echo "make test          install what is missing, build, run all tests; TESTS='test_data ...' SCRIPTS=: only these"
	@echo "make compare       kinds of attention compared on made-up stories, or TRAIN=FILE VAL=FILE, SET=recall ..."
	@echo "                   (dev/compare --help; an hour)"
	@echo "make fuzz          files made by libFuzzer for every reader of files, FUZZ=60 seconds each"
	@echo "make deps          install what is missing (Debian's packages)"
	@echo "make format        write all code as clang-format 14 does; make format-check says what differs"
	@echo "make clean         remove what was built; runs/ stays"
	@echo ".ci/run            what is run before a change is taken: make test, the form, and these configurations' tests"
	@echo "config=debug       -O0 -g3; this and the following put their programs below build/, each into its own folder"
	@echo "config=sanitize    AddressSanitizer and UBSan"
	@echo "config=clang       clang, warnings are errors"
	@echo "config=plain       without oneDNN and OpenMP"
	@echo "config=fuzz        clang, both sanitizers, coverage counted: for test/fuzz"
	@echo "config=aarch64     for 64-bit ARM, built on x86-64, run by qemu-user"
	@echo "make build/release/dev/infer_bench   how fast infer reads and writes, beside the speed of the memory"
	@echo "make build/release/bench             the GPU's kernels, timed (dev/cuda/bench.cu)"
	@echo "make build/release/ranks_bench       what several GPUs gain (dev/cuda/ranks_bench.cu)"
	@echo "make build/release/positions         loss by position (dev/cuda/positions.cu)"
	@echo "CC=clang  MARCH=x86-64-v3  NO_OMP=1  NO_DNNL=1  NO_CUDA=1  GPU_ARCH=90  PRECISION=fp32 (of train_gsacu)"
	@echo "CFLAGS, CPPFLAGS, LDFLAGS: added behind the project's own"

.PHONY: all probe libraries quickstart compare fuzz test build-tests run-tests deps format format-check clean help FORCE
.DEFAULT_GOAL := all
