# make report   the notebooks on generated data, then the book in _build/html
# make test     all tests, and the notebooks with small parameters
# Nothing is done twice: every step depends on the files it is made from, and measured rows are remembered in runs/.

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
PROFILE     ?= quick
EXTRAS      := save,cli,prep,book,rag,ray,dev
VENV        := .venv
BIN         := $(VENV)/bin
INSTALLED   := $(VENV)/.installed
NOTEBOOKS   := $(wildcard notebooks/*.ipynb)
QUICK       := $(wildcard notebooks/profiles/quick/*.yaml)
# the pages of the contents; those of other profiles than quick read published rows, measure nothing
EXECUTED    := $(addsuffix .ipynb,$(shell grep -o 'book/notebooks/[a-z]*/[a-z_-]*' _toc.yml))
SOURCES     := $(shell find ecstudy -name '*.py' -o -name '*.csv' -path 'ecstudy/*')
ROWS        := $(wildcard results/*.csv)
PAGES       := $(wildcard book/*.md book/*.bib book/_static/*.css book/_static/*.svg book/_ext/*.py) CHANGELOG.md
MEASURED    := runs/.quick
GENERATED   := book/generated/.written
BUILT       := _build/.built
# one thread per process: two runs side by side are faster than one on two threads, and results do not depend on cores
export OMP_NUM_THREADS := 1
export MPLBACKEND := agg
# notebooks and pages are made side by side
MAKEFLAGS += --jobs=2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install report test study publish prep-real clean distclean

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PROFILE=quick|real|medium|paper (notebooks/profiles), TORCH_INDEX=URL to install PyTorch from an index of its own"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; make PYTHON=..." % sys.version_info[:2])'
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) -c constraints.txt torch)
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

install: $(INSTALLED)  ## the environment alone

report: $(BUILT)  ## run the notebooks (quick profile) and build the book into _build/html
	@echo "open _build/html/index.html"

# a page shows one file of a profile, executed with the notebook it is named after (what stands before a hyphen)
.SECONDEXPANSION:
book/notebooks/%.ipynb: notebooks/profiles/%.yaml notebooks/$$(firstword $$(subst -, ,$$(notdir $$*))).ipynb $(SOURCES) $(ROWS) | $(INSTALLED) $(MEASURED)
	$(BIN)/python -m ecstudy.report.execute $(word 2,$^) $@ -f $<

$(MEASURED): $(QUICK) $(SOURCES) | $(INSTALLED)
	$(BIN)/ecstudy study quick --progress
	@mkdir -p $(@D) && touch $@

$(GENERATED): $(QUICK) $(SOURCES) $(ROWS) | $(INSTALLED) $(MEASURED)
	$(BIN)/python -m ecstudy.report.pages
	@touch $@

$(BUILT): $(GENERATED) $(EXECUTED) $(PAGES) _config.yml _toc.yml
	$(BIN)/jupyter-book build . -q -W --keep-going
	@touch $@

test: $(INSTALLED)  ## pytest, then every notebook with its small default parameters
	$(BIN)/python -m pytest -n auto --dist worksteal
	$(BIN)/python -m pytest -n auto --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout 600 $(NOTEBOOKS)

study: $(INSTALLED)  ## measure the missing rows of PROFILE (may be stopped and started again)
	$(BIN)/ecstudy study $(PROFILE) --progress

publish: $(INSTALLED)  ## write measured rows of the real profile, and statistics of the data, into results/
	$(BIN)/python -m ecstudy.report.pages --publish-data
	$(BIN)/ecstudy study real --publish

prep-real: $(INSTALLED)  ## prepare a Criteo file: make prep-real CRITEO=FILE [NAME=criteo_137k]
	@test -n "$(CRITEO)" || { echo "give the file: make prep-real CRITEO=/path/to/train.txt [NAME=criteo_137k]"; exit 2; }
	$(BIN)/ecstudy prep criteo "$(CRITEO)" --out "data/$(or $(NAME),criteo)" --progress

clean:  ## remove the book and everything generated for it; measured rows and data stay
	rm -rf _build book/generated book/methods book/notebooks book/_static/mathjax book/_static/plotly

distclean: clean  ## remove the environment, the generated data and the remembered rows as well
	rm -rf $(VENV) runs data *.egg-info
