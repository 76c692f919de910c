# make demo: the simulator's first comparison; make test: every check; make fuzz: ten thousand mutated inputs; make site:
# the documentation as pages in out/site.
# They need only Python >= 3.11 and pip.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test fuzz site clean
.NOTPARALLEL:

demo: $(VENV)/.base
	$(VENV)/bin/kvsim compare --trace mooncake-conversation --model llama-3.1-8b --gpu h100-sxm --gpus 8 \
		--policy full --policy offload-all --policy sink-window --policy squeezed-attention \
		--policy shadowkv --policy retrieval-attention --out out/demo

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/check

# Ten thousand mutated inputs; the results that the documentation counts are written when none breaks a rule. Then
# fifty kills of a comparison that writes its results, and of a cache that is saved.
fuzz: $(VENV)/.dev
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" $(VENV)/bin/python -m fuzz.campaign --out benchmarks/results/fuzz.json
	KVSIM_KILLS=50 $(VENV)/bin/python -m pytest -q tests/kvsim/test_faults.py -k random_moments
	KVSIM_KILLS=50 $(VENV)/bin/python -m pytest -q tests/runtime/test_saved_kills.py -k killed

# Broken links end it.
site: $(VENV)/.site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --config-file scripts/mkdocs.yml

clean:
	rm -rf $(VENV) out build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1): what to install. Running `venv` on an environment that exists changes nothing.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"kvsim needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(1)
endef
comma := ,

# The stamps tell what is installed, so that a second call starts at once.
$(VENV)/.base: pyproject.toml constraints.txt
	$(call install,--editable .)
	@touch $@

# torch first, by its pin: what asks for it loosely would bring another build.
$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,torch)
	$(call install,--editable ".[dev$(comma)runtime]")
	@touch $(VENV)/.base $@

$(VENV)/.site: pyproject.toml constraints.txt
	$(call install,--editable ".[site]")
	@touch $(VENV)/.base $@
