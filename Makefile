# `make demo` and `make test` first; all make their own environment in .venv. Then:
#   make infer SCAN=file_or_folder OUT=folder                        the shipped weights on your scans (MODELS=folder: others)
#   make train DATA=prepared CONTRAST=t1 MODELS=folder               its networks, and their calibration (MODELS: else in place of the shipped ones)
#   make evaluate DATA=prepared CONTRAST=t1 MODELS=folder OUT=folder
#   make serve STUDIES=folder                                        MONAI Label on port 8000
#   make package, make test-label                                    the archive, in build/; the same in MONAI Label
#   make coverage                                                    what the tests run, by lines and branches
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

LABEL := .venv-label
# inference tells the contrast from each scan
ifeq ($(origin CONTRAST),undefined)
CONTRAST := $(if $(filter infer,$(MAKECMDGOALS)),auto,t1)
endif
MODELS ?= models
OUT ?= out
RUN := $(BIN)/python -m monai.bundle run
# they reach the shell as they are, as "$$NAME": no name of a file is a command
$(foreach name,SCAN DATA CONTRAST MODELS OUT STUDIES,$(eval override export $(name) := $$(value $(name))))

.PHONY: demo test coverage lint format env clean infer train evaluate package serve test-label label-app

demo: env
	$(BIN)/python scripts/demo.py --output_dir demo

test: $(VENV)/tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

# lines and branches of bundle/ that the tests run, those of the runner's own processes included
coverage: $(VENV)/tools
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing --skip-covered

infer: env
	$(RUN) inference --config_file configs/inference.json --dataset_dir "$$SCAN" --ckpt_dir "$$MODELS" --contrast "$$CONTRAST" --output_dir "$$OUT"

train: env
	$(RUN) training --config_file configs/train.json --dataset_dir "$$DATA" --ckpt_dir "$$MODELS" --contrast "$$CONTRAST"
	$(RUN) training --config_file configs/train_segmentation.json --dataset_dir "$$DATA" --ckpt_dir "$$MODELS" --contrast "$$CONTRAST"
	$(RUN) calibration --config_file configs/calibrate.json --dataset_dir "$$DATA" --ckpt_dir "$$MODELS" --contrast "$$CONTRAST"

evaluate: env
	$(RUN) evaluation --config_file configs/evaluate.json --dataset_dir "$$DATA" --ckpt_dir "$$MODELS" --contrast "$$CONTRAST" --output_dir "$$OUT"

package: $(VENV)/tools
	$(BIN)/python scripts/package_bundle.py --output_dir build

# MONAI Label, in an environment of its own: docs/monai_label.md
serve: label-app
	PATH="$(CURDIR)/$(LABEL)/bin:$$PATH" monailabel start_server --app build/apps/monaibundle --studies "$$STUDIES" \
	    --conf models patch2loc_brain_mri --conf zoo_source ngc --conf sam2 false

label-app: package $(LABEL)/installed
	rm -rf build/apps
	PATH="$(CURDIR)/$(LABEL)/bin:$$PATH" monailabel apps --download --name monaibundle --output build/apps > /dev/null
	$(LABEL)/bin/python -m zipfile -e "$$(ls -t build/patch2loc_brain_mri_v*.zip | head -n 1)" build/apps/monaibundle/model

test-label: package $(LABEL)/installed
	$(LABEL)/bin/python tests/monai_label/check.py --archive "$$(ls -t build/patch2loc_brain_mri_v*.zip | head -n 1)"

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
