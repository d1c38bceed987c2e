# make bench   the benchmark, from nothing to figures, tables and report.html
# make test    lint, types, tests, the check of the asv suites and of the pages, in environments of their own
# make docs    the pages of docs/ as a site in site/
# make site    the results of RUNS as pages in results-site/, with those of `make asv` if any, docs/submit-a-run.md
# make verify  the full numbers about runs: a hundred kills, a thousand bad inputs, Ray, overheads; half an hour alone
# make asv     speed, memory, evaluations and accuracy of the current commit into results/asv, pages into results/asv-html
#
# PYTHON   the interpreter the environments are made from (3.11 or newer)
# VENV     the environment of `make bench` and `make asv`; one that exists is used as it is
# RUNS     folders of runs that `make site` shows; without any the records that come along
# ARGS     more arguments: of `flowlik run` for bench, of tox for test, of `asv run` for asv
# FLOWLIK_TORCH=any (environment) takes any build of torch instead of the pinned CPU build: see docs/install.md

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RUNS ?= results/records/quick.jsonl

TOX = .tox/bootstrap
ASV = $(VENV)/bin/asv

.PHONY: bench test docs site verify asv

bench: $(VENV)/.flowlik-installed
	$(VENV)/bin/flowlik run $(ARGS)

test: $(TOX)/.installed
	@. .ci/torch.sh && FLOWLIK_SITE_PACKAGES=$$(torch_shared "$(PYTHON)") && export FLOWLIK_SITE_PACKAGES && \
	echo "tox run $(ARGS)" && $(TOX)/bin/tox run $(ARGS)

docs: $(TOX)/.installed
	@FLOWLIK_SITE=site $(TOX)/bin/tox run -e docs $(ARGS)
	@echo "open site/index.html, or for the search: $(PYTHON) -m http.server -d site"

site: $(VENV)/.flowlik-installed
	$(VENV)/bin/flowlik gallery $(RUNS) --out results-site $(if $(wildcard results/asv-html/index.json),--timings results/asv-html) $(ARGS)

verify: $(TOX)/.installed
	@. .ci/torch.sh && FLOWLIK_SITE_PACKAGES=$$(torch_shared "$(PYTHON)") && export FLOWLIK_SITE_PACKAGES && \
	echo "tox run -e verify $(ARGS)" && $(TOX)/bin/tox run -e verify $(ARGS)

asv: $(VENV)/.flowlik-installed $(VENV)/.asv-installed
	@test -z "$$(git status --porcelain)" || echo "asv: uncommitted changes are recorded under the last commit" >&2
	$(ASV) machine --yes
	$(ASV) run --set-commit-hash "$$(git rev-parse HEAD)" --show-stderr $(ARGS)
	$(ASV) publish
	@echo "open results/asv-html/index.html through: $(VENV)/bin/asv preview"

$(VENV)/.flowlik-installed: pyproject.toml constraints-cpu.txt
	sh .ci/make-venv "$(PYTHON)" "$(VENV)"
	sh .ci/pip-install "$(VENV)/bin/python" -e .
	@touch "$@"

$(VENV)/.asv-installed: $(VENV)/.flowlik-installed
	sh .ci/pip-install "$(VENV)/bin/python" -e '.[asv]'
	@touch "$@"

$(TOX)/.installed:
	sh .ci/make-venv "$(PYTHON)" $(TOX)
	$(TOX)/bin/python -m pip install --quiet "tox>=4.20"
	@touch "$@"
