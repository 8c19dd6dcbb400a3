# Each target does everything on a fresh machine: environment, installation, run.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: quickstart test stress lint docs clean

quickstart: $(STAMP)
	$(VENV)/bin/python tools/quickstart.py

test: $(STAMP) lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

# About an hour on two cores; what it found last is in docs/reliability.md.
stress: $(STAMP)
	status=0; for part in "kill_storm.py" "kill_storm.py --full-disk" "fuzz.py --seconds 45" "soak.py"; do \
		$(VENV)/bin/python tests/stress/$$part || status=1; \
	done; exit $$status

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
