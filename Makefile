PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

DEMO := configs/demo.yaml
DATA := data/emoji
FONT := /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
CLDR := /usr/share/unicode/cldr/common/annotations/en.xml
CPP_FILES = $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
FRIBIDI := $(wildcard /usr/lib/*/libfribidi.so.0)

.PHONY: setup packages data demo test test-slow parity memory check format configs clean

setup: .venv/installed

# torch comes first and exactly pinned: an open range would fetch gigabytes of CUDA packages where
# a CPU build is at hand, and extensions are built against the torch that is installed.
.venv/installed: constraints.txt pyproject.toml setup.py $(shell find csrc -name '*.c*' -o -name '*.h')
	$(PYTHON) -m venv .venv
	pip install -q -c constraints.txt setuptools wheel pybind11 ninja
	pip install -q -c constraints.txt torch
	pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@python -c "from megavlm.ops import library; print('kernels:', library.built())"
	@python -c "import megavlm._data" 2>/dev/null || \
	  echo "no C++ compiler or no Python.h (python3-dev): packing runs in Python"
	touch $@

# The sample data is drawn from two Debian packages; libfribidi0 lets Pillow join their sequences.
packages:
	@if [ ! -f $(FONT) ] || [ ! -f $(CLDR) ] || [ -z "$(FRIBIDI)" ]; then \
	  packages="fonts-noto-color-emoji unicode-cldr-core libfribidi0"; \
	  if [ "$$(id -u)" = 0 ]; then \
	    echo "installing $$packages"; \
	    { apt-get update -qq && apt-get install -y -qq $$packages; } >/dev/null || exit 2; \
	  else \
	    echo "the sample data needs Debian packages; run: sudo apt-get install $$packages"; \
	    exit 2; \
	  fi; \
	fi

data: $(DATA)/summary.json

$(DATA)/summary.json: tools/make_sample_data.py | setup packages
	python tools/make_sample_data.py --out $(DATA)

# Two ranks on the CPUs, or one on each of up to two GPUs.
demo: data
	@mkdir -p runs/demo
	@[ -f runs/demo/tokenizer.model ] || megavlm tokenizer train $(DEMO)
	@python -c "import torch; print('localhost slots=%d' % (min(2, torch.cuda.device_count()) or 2))" \
	  > runs/demo/hostfile
	megavlm train $(DEMO) --hostfile runs/demo/hostfile
	megavlm report $(DEMO)

test: setup packages
	pytest -m 'not slow'

test-slow: setup packages
	pytest

# Every engine and layout against one plain process: worst differences, as Markdown.
parity: setup
	CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -W ignore -m tests.parity.matrix

check: setup
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CPP_FILES)
	pyright

format: setup
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_FILES)

# The DeepSpeed configurations are derived from the run files, and those of configs/30b from the
# planner; all are checked in.
configs: setup
	for run in $$(grep -LE '^engine: (fsdp2|megatron)' configs/*.yaml); do \
	  megavlm plan $$run --ds-json configs/ds/$$(basename $$run .yaml).json >/dev/null || exit 1; \
	done
	python tools/make_30b_configs.py

# What the planner predicts of memory against real ranks on CPUs, as Markdown.
memory: setup
	CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -W ignore -m tests.planner.measured_memory

clean:
	rm -rf .venv build *.egg-info megavlm/*.so
