# Each target creates the virtual environment .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Kind of the demo's language model: gpt3, bloom or qwen. Each has its own output folder.
LLM ?= gpt3
DEMO ?= runs/demo$(patsubst %,_%,$(filter-out gpt3,$(LLM)))

.PHONY: demo test quick lint docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m ymplug_jax.demo --out $(DEMO) --llm $(LLM)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && $(BIN)/mkdocs build --strict --quiet --site-dir "$$site"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

# Tests without the slow ones.
quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, in site/.
docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

# The tests compare conversions with PyTorch; the demo needs neither PyTorch nor development tools.
$(VENV)/.demo: EXTRAS = prep
$(VENV)/.test: EXTRAS = prep,convert,docs,dev
$(VENV)/.demo $(VENV)/.test: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) runs site
