# Needs Python 3.11 (or newer) and make; everything else is installed into .venv, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt

.PHONY: demo test lint fast slow clean

## The whole job on real images, as a Prefect flow with a server of its own; then where the results are.
# PREFECT_HOME and PREFECT_API_URL: the demo touches neither your Prefect server nor its database.
demo: $(VENV)/.installed
	@mkdir -p runs/.prefect
	env -u PREFECT_API_URL -u PREFECT_PROFILE PREFECT_HOME="$(CURDIR)/runs/.prefect" \
		$(RUN) -m flows.augment configs/quickstart.yaml
	@echo
	@echo "release:       $(CURDIR)/runs/quickstart/release"
	@echo "contact sheet: $(CURDIR)/runs/quickstart/contact_sheet.png"

## Everything that CI holds a change against.
test: lint fast slow

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

fast: $(VENV)/.installed-dev
	$(RUN) -m pytest -q -n 2 -m "not slow"

slow: $(VENV)/.installed-dev
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m slow

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Stamps: installed anew only when what is asked for has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) with $(PYTHON): some minutes, once."
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --quiet -e ".[dicom,nifti,excel,dev]"
	touch $@
