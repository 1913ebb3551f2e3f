# `make demo` and `make test` first; all make their own environment in .venv. Also:
#   make infer SCAN=file_or_folder CONTRAST=flair OUT=folder    the shipped weights on your scan
#   make package    the archive for the Model Zoo and MONAI Label, in build/
#   make test-label
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

LABEL := .venv-label
SCAN ?=
CONTRAST ?= t1
OUT ?= out

.PHONY: demo test lint format env clean infer package test-label

demo: env
	$(BIN)/python scripts/demo.py --output_dir demo

test: $(VENV)/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

infer: env
	$(BIN)/python -m monai.bundle run inference --config_file configs/inference.json --dataset_dir "$(SCAN)" --contrast $(CONTRAST) --output_dir "$(OUT)"

package: $(VENV)/tools
	$(BIN)/python scripts/package_bundle.py --output_dir build

# the packaged bundle in a real MONAI Label server, in an environment of its own: docs/monai_label.md
test-label: package $(LABEL)/installed
	$(LABEL)/bin/python tests/monai_label/check.py --archive $$(ls -t build/patch2loc_brain_mri_v*.zip | head -n 1)

$(LABEL)/installed: tests/monai_label/requirements.txt
	$(PYTHON) -m venv $(LABEL)
	$(LABEL)/bin/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(LABEL)/bin/pip install --quiet --requirement $<
	$(LABEL)/bin/pip install --quiet --no-deps monailabel==0.8.5
	cp -r tests/monai_label/torchvision $$($(LABEL)/bin/python -c 'import site; print(site.getsitepackages()[0])')
	touch $@

lint: $(VENV)/tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

env: $(VENV)/installed

# constraints.txt holds the tested versions; to use a torch of your own, install this project without it
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/tools: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(LABEL) demo build *.egg-info
