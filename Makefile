PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench fuzz soak mutants versions clean

demo: .venv/installed  ## build the bundle and rehearse it on synthetic strips drawn on the spot
	@echo "== packing the members of weights/ into dist/"
	$(BIN)/python build_kernel.py
	@echo "== dry run: the packed kernel, as its own process, in a Kaggle-like tree"
	$(BIN)/python kernel/dry_run.py

test: lint  ## lint, types and every test
	@echo "== tests"
	$(BIN)/python -m pytest --ignore tests/test_engines.py
	@echo "== tests of the engines, apart: OpenVINO and then training in one process ends in a segfault"
	$(BIN)/python -m pytest tests/test_engines.py

lint: .venv/installed
	@echo "== ruff and mypy"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@echo "== installing into .venv: PyTorch alone is some gigabytes, so the first time takes minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

bench: .venv/installed  ## race the packed members against the ways in which others run them
	@echo "== installing the peers: OpenVINO, ONNX Runtime"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@echo "== packing with OpenVINO's halves, then the race: minutes to an hour"
	$(BIN)/python build_kernel.py --openvino --out dist
	$(BIN)/python bench/bench.py

fuzz: .venv/installed  ## what comes from files, at random: 100,000 cases, some minutes
	@echo "== 20,000 cases of each of the five properties in tests/test_fuzz.py"
	FUZZ=20000 $(BIN)/python -m pytest tests/test_fuzz.py

soak: .venv/installed  ## as many strips as the scored run has, with stub members: memory stays flat
	SOAK=5506 $(BIN)/python -m pytest -s tests/test_soak.py

mutants: .venv/installed  ## change the kernel in 160 places, one at a time, and see a test fail: an hour
	@echo "== installing mutmut"
	$(BIN)/python -m pip install --quiet mutmut
	$(BIN)/python tests/mutants.py

# All but packing, training, the report and what is the same on any version.
KERNEL_TESTS := $(addprefix tests/test_, rle.py early_exit.py deadline.py mounts.py progress.py \
	inference.py faults.py fuzz.py workers.py soak.py validate.py dry_run.py kaggle.py notebook.py)

versions: .venv-oldest/installed  ## the kernel's tests with the oldest versions; as on Kaggle: PYTHON=python3.12
	@echo "== the kernel's tests, and then its engines'"
	PYTHONPATH=$(CURDIR) .venv-oldest/bin/python -m pytest $(KERNEL_TESTS)
	PYTHONPATH=$(CURDIR) .venv-oldest/bin/python -m pytest tests/test_engines.py

.venv-oldest/installed: requirements-oldest.txt
	@echo "== installing the oldest versions into .venv-oldest: minutes"
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --requirement requirements-oldest.txt
	@touch $@

clean:
	rm -rf dist data runs mutants .cache
