PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow check bench compare clean

demo: $(VENV)/ready
	$(BIN)/python tools/demo.py --output output/demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy

bench: $(VENV)/ready
	for name in pseudo_labels evaluation feeding training_step runs report; do \
		$(BIN)/python tools/benchmark/$$name.py || exit 1; \
	done

# every project and its baseline, tuned, five seeds, as projects/studies.yaml says; hours on two cores, see there
compare: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python tools/compare.py --studies --jobs 2 --results projects/studies.jsonl \
		--into projects/README.md --tables output/compare

$(VENV)/ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[viz,export,weights,review,dev]'
	touch $@

clean:
	rm -rf $(VENV) output build *.egg-info
