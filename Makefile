PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint coverage bench gpu fuzz soak test-cluster bench-cluster mutants versions clean help

# pip compiles nothing here (see `install`): what Python compiles as it imports it, it has to keep.
unexport PYTHONDONTWRITEBYTECODE

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

DISK := import os, shutil; gb = shutil.disk_usage(".").free / 1e9; gb < 9 and print(f"{gb:.1f} GB are \
	free in {os.getcwd()}: an install takes up to 8, and what pip downloads; free more if it fails")

# $(call venv,FOLDER): a virtual environment of PYTHON; one of an older Python is made anew.
define venv
@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	"3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
@ls $(1)/installed* >/dev/null 2>&1 || $(PYTHON) -c '$(DISK)'
@$(PYTHON) -m venv $$($(1)/bin/python -c '$(NEW_ENOUGH)' 2>/dev/null || echo --clear) $(1)
endef

# $(call install,EXTRAS): this project and its EXTRAS into .venv; what pip prints goes to a log file.
# Python compiles what is imported, a small part of it, when it is imported.
define install
$(call venv,.venv)
@$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.$(if $(1),[$(1)])' \
	>.venv/pip.log 2>&1 || { tail -n 20 .venv/pip.log; echo "pip failed: see .venv/pip.log"; exit 1; }
@touch $@
endef

demo: .venv/installed-demo  ## build the bundle and run it as Kaggle does, on synthetic strips
	@echo "== packing the members of weights/ into dist/"
	@$(BIN)/python build_kernel.py --openvino
	@echo "== dry run: the packed kernel, as its own process, in a Kaggle-like tree"
	@$(BIN)/python evaluation/dry_run.py

.venv/installed-demo: pyproject.toml constraints.txt
	@echo "== installing what the demo needs into .venv: the first time takes minutes, for PyTorch"
	$(call install,openvino)

test: lint  ## lint, types and every test but those of several nodes: make test-cluster
	@echo "== tests"
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: .venv/installed  ## ruff, mypy, and the one way that imports run between the rooms
	@echo "== ruff, mypy and import-linter"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

coverage: .venv/installed  ## which lines no test reaches
	$(BIN)/python -m pytest -n 3 --dist worksteal --cov --cov-report=term-missing:skip-covered

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1|/' | column -t -s '|'

.venv/installed: pyproject.toml constraints.txt
	@echo "== installing what tests and lint need into .venv: the first time takes minutes"
	$(call install,dev)
	@touch .venv/installed-demo

bench: .venv/installed  ## race the shipped members against the ways in which others run them; on real strips too: REAL=folder
	@echo "== installing the peers: OpenVINO, ONNX Runtime"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@echo "== packing with OpenVINO's halves, then the race: minutes to an hour"
	$(BIN)/python build_kernel.py --openvino --out dist-bench
	$(BIN)/python bench/race.py --bundle dist-bench $(if $(REAL),--real $(REAL))

gpu: .venv/installed  ## on a CUDA machine, unattended in 9 minutes: its tests, a race, images/s; bench/gpu.json
	$(BIN)/python bench/gpu.py

fuzz: .venv/installed  ## what comes from files, at random: 20,000 cases of each property
	@echo "== 20,000 cases of each property of what comes from files, and of packed checkpoints"
	FUZZ=20000 $(BIN)/python -m pytest tests/kernel/test_fuzz.py tests/kernel/test_rows.py \
		tests/kernel/test_jpeg.py tests/packing/test_wrappings.py

soak: .venv/installed  ## as many strips as the scored run has, with stub members: memory stays flat
	SOAK=5506 $(BIN)/python -m pytest -s tests/kernel/test_soak.py

test-cluster: .venv/installed  ## several Ray nodes here, and what dies half-way; S3 on loopback: minutes
	@echo "== installing a stand-in of S3"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt s3fs 'moto[s3]' flask flask-cors
	$(BIN)/python -m pytest tests/cluster -m 'nodes or not nodes'

bench-cluster: .venv/installed  ## one worker against the plain kernel, two against one, the engine's overhead
	@echo "== packing with OpenVINO's halves: minutes"
	$(BIN)/python build_kernel.py --openvino --out dist-bench
	$(BIN)/python bench/cluster_overhead.py kernel thread workers kernels overhead --bundle dist-bench/dataset

mutants: .venv/installed  ## change the kernel in 160 places, one at a time, and see a test fail: an hour
	@echo "== installing mutmut"
	$(BIN)/python -m pip install --quiet mutmut
	$(BIN)/python tests/mutants.py

versions: .venv-oldest/installed  ## the kernel's tests with the oldest versions; as on Kaggle: PYTHON=python3.12
	@echo "== the kernel's tests, and those of the packed kernel"
	PYTHONPATH='$(CURDIR)' .venv-oldest/bin/python -m pytest tests/kernel tests/evaluation/test_dry_run.py \
		tests/evaluation/test_kaggle_tree.py tests/packing/test_kaggle.py tests/packing/test_notebook.py

.venv-oldest/installed: requirements-oldest.txt
	@echo "== installing the oldest versions into .venv-oldest: minutes"
	$(call venv,.venv-oldest)
	.venv-oldest/bin/python -m pip install --requirement requirements-oldest.txt
	@touch $@

clean:  ## remove what was built and cached; data/, runs/ and my_weights/ stay
	rm -rf dist dist-bench mutants .cache
