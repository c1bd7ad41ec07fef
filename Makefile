# The two commands: `make train` and `make test`. Both make .venv if it is missing.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test
.DELETE_ON_ERROR:

train: $(VENV)/installed
	$(RUN) train_papsmear.py --data_root data --preset quick

test: $(VENV)/installed-dev
	$(RUN) -m pytest

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; say make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@
