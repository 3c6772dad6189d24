# Every target installs what it needs into .venv first; a fresh machine needs make and a Python >= 3.10 with venv.

PYTHON ?= $(shell for python in python3.12 python3.11 python3.10 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; \
	done)
# Named after what it stands for, so that only a change of these files installs again.
INSTALLED := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
RUN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs bench soak screenshots

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

install: $(INSTALLED) ## .venv with farnear and its tools, without running anything

demo: $(INSTALLED) ## train a tiny model on drawn pages with two processes; under five minutes
	$(RUN)/farnear demo

# Three at a time, also on two cores, as many tests wait for processes; a file's together, as they share what is slow.
test: $(INSTALLED) ## the default test suite; under 15 minutes on two cores
	$(RUN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED) ## ruff, mypy and the layering
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports

docs: $(INSTALLED) ## the documentation as a site, into site/; a link that leads nowhere ends it
	$(RUN)/python tools/feature_table.py
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build

bench: $(INSTALLED) ## exactness of the gradient; speed of a step, the loss, the data and a save
	$(RUN)/python benchmarks/exactness.py
	$(RUN)/python benchmarks/exactness_reranker.py
	$(RUN)/python benchmarks/engine.py
	$(RUN)/python benchmarks/reranker.py
	$(RUN)/python benchmarks/loss.py
	$(RUN)/python benchmarks/data.py
	$(RUN)/python benchmarks/mining.py
	$(RUN)/python benchmarks/compare.py
	$(RUN)/python benchmarks/checkpoint.py

soak: $(INSTALLED) ## what takes longer: the tests left out of `make test`, the fault campaign, the benchmarks
	$(RUN)/pytest -m soak
	$(RUN)/python benchmarks/faults.py
	$(RUN)/python benchmarks/exactness.py
	$(RUN)/python benchmarks/exactness_reranker.py
	$(RUN)/python benchmarks/precision.py
	$(RUN)/python benchmarks/engine.py
	$(RUN)/python benchmarks/reranker.py
	$(RUN)/python benchmarks/loss.py
	$(RUN)/python benchmarks/data.py
	$(RUN)/python benchmarks/mining.py
	$(RUN)/python benchmarks/compare.py
	$(RUN)/python benchmarks/checkpoint.py
	$(RUN)/python benchmarks/scaling.py
	$(RUN)/python benchmarks/forecast.py

screenshots: $(INSTALLED) ## the documentation's pictures of the report, of a short training; takes Chromium
	FARNEAR_SCREENSHOTS=docs/pictures $(RUN)/pytest -m soak tests/test_report_browser.py

# The exact versions need Python 3.11; on 3.10 pip picks the newest ones that still support it.
$(INSTALLED):
	@if [ -z "$(PYTHON)" ]; then \
		echo "no Python >= 3.10 with venv found; install one (Debian: apt-get install python3-venv) or say make PYTHON=..."; \
		exit 2; \
	fi
	[ -x .venv/bin/pip ] || $(PYTHON) -m venv .venv
	pins=$$(.venv/bin/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")') && \
		.venv/bin/pip install --disable-pip-version-check --editable '.[dev,docs,http,media,pdf,s3]' $$pins
	rm -f .venv/.installed-*
	touch $@
