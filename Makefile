# Everything runs from .venv/bin, nothing needs activating.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
N ?= 100
WORKERS ?= 2
STEPS ?= 200
V := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help .venv demo lab test bench results-fast results-gan-study results-search results-gafi results-diffusion results-few-shot results-tiny results-realfake results-metrics presets torture docs lint format hooks check-pip check-export check-clean check-readme check-docs check-nbs check-tests

help: ## this list
	@awk -F ':.*## ' '/^[a-zA-Z.-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed ## the whole chain on scikit-learn's digits; says where its report is
	$(V)/synthlit run nbs/params/digits.yaml --out runs/demo

lab: .venv/.installed-dev ## JupyterLab in nbs/
	$(V)/jupyter lab --notebook-dir=nbs

test: .venv/.installed-dev ## all checks, in the order below (CI runs this); WORKERS=2 notebooks or test files at a time
	@s=$$(date +%s); for c in check-pip lint check-export check-clean check-readme check-docs check-nbs check-tests; do \
	  echo "== $$c ($$(($$(date +%s) - s)) s so far)"; $(MAKE) --no-print-directory $$c || { echo "== $$c FAILED"; exit 1; }; done

bench: .venv/.installed-dev ## our speed beside public peers
	$(V)/python tests/bench.py 1 2
	$(V)/python tests/bench_gan.py 1 2
	$(V)/python tests/bench_metrics.py
	$(V)/python tests/bench_fewshot.py
	$(V)/python tests/bench_clip_filter.py

presets: .venv/.installed-dev ## train every GAN preset STEPS=200 steps on CIFAR-10 and Fashion-MNIST (hours on one core; goes on where it was)
	$(V)/python tests/presets_on_real_data.py $(STEPS)

# keep: what the pages of nbs/results print of each stage of run $(1), under nbs/results/$(2)
keep = for s in runs/$(1)/*/; do [ ! -f $$s/manifest.json ] || expr $$(basename $$s) : 'splits\|cifar' >/dev/null || expr $$s : ".*old-" >/dev/null && continue; to=nbs/results/$(2)/$$(basename $$s); \
	  for f in manifest.json result.json times.json history.parquet scores.parquet; do [ ! -f $$s/$$f ] || { mkdir -p $$to && cp $$s/$$f $$to/; } || exit 1; done; done

results-fast: .venv/.installed ## train the recipe `fast` with three seeds on Fashion-MNIST and CIFAR-10 (hours on two cores; goes on where it was) for nbs/results/fast.ipynb
	for p in fast_fashion_mnist fast_cifar10; do $(V)/synthlit run $$p || exit 1; done
	$(call keep,fast_fashion_mnist,fast/fast_fashion_mnist)
	$(call keep,fast_cifar10,fast/fast_cifar10)

STUDY := $(shell awk '/^  [a-z0-9_]+:/ {n = $$1} /stage: gan/ {sub(":", "", n); print n}' nbs/params/gan_study_cpu.yaml)
results-gan-study: .venv/.installed ## train the rows of nbs/params/gan_study_cpu.yaml (hours on two cores; goes on where it was); INCEPTION=FILE: also FID and IS
	$(V)/synthlit run gan_study_cpu $(if $(INCEPTION),$(foreach r,$(STUDY) evaluate,-p $(r).inception=$(INCEPTION)))
	$(call keep,gan_study_cpu,gan_study)

results-search: .venv/.installed ## both ways of searching, generator by generator, on Fashion-MNIST and digits (hours on two cores; goes on where it was) for nbs/results/search.ipynb
	$(V)/synthlit run search_fashion_mnist_cpu --jobs 2
	$(V)/python tests/keep_search.py search_fashion_mnist_cpu runs/search_fashion_mnist_cpu
	for a in 0 10; do $(V)/synthlit run search_digits -p gan.seed="[$$(seq -s, $$a $$((a + 9)))]" --out runs/search_digits_$$a --jobs 2 && \
	  $(V)/python tests/keep_search.py search_digits_$$a runs/search_digits_$$a || exit 1; done

results-gafi: .venv/.installed ## what each of GaFi's steps brings on Fashion-MNIST (hours of one core; goes on where it was) for nbs/results/gafi.ipynb
	$(V)/synthlit run gafi_study_cpu
	$(call keep,gafi_study_cpu,gafi)
	$(V)/python tests/bench_stream.py

results-diffusion: .venv/.installed ## a diffusion model of 40 core-minutes and its variations (hours of one core; goes on where it was) for nbs/results/diffusion.ipynb
	$(V)/synthlit run diffusion_study_cpu
	$(call keep,diffusion_study_cpu,diffusion)

TINY := zero_shot_tiny_cpu few_shot_tiny_cpu pretrain_tiny_cpu
share = [ -e runs/few_shot_tiny_cpu ] || { mkdir -p runs/few_shot_tiny_cpu && cd runs/zero_shot_tiny_cpu && cp -r run.json splits-* tiny clip ../few_shot_tiny_cpu/; }
results-tiny: .venv/.installed ## the tiny twins of He et al. (hours of one core; goes on where it was) for nbs/results/ready.ipynb; the first two share a CLIP and a pipeline
	$(V)/synthlit run zero_shot_tiny_cpu --jobs 2
	$(share)
	$(V)/synthlit run few_shot_tiny_cpu --jobs 2
	$(V)/synthlit run pretrain_tiny_cpu --jobs 2
	$(foreach p,$(TINY),$(call keep,$(p),tiny/$(p)) ;)

results-realfake: .venv/.installed ## the tiny twin of Real-Fake (hours of one core; goes on where it was)
	$(V)/synthlit run realfake_tiny_cpu --jobs 2
	$(call keep,realfake_tiny_cpu,tiny/realfake_tiny_cpu)

results-few-shot: .venv/.installed ## five class splits of Omniglot, two at a time (70 minutes on two cores; goes on where it was) for nbs/results/few_shot.ipynb
	printf '%s\n' 0 1 2 3 4 | OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c '$(V)/synthlit run few_shot_omniglot_cpu -p splits.seed={} --out runs/few_shot_omniglot_cpu_{} && \
	  $(V)/python tests/keep_few_shot.py runs/few_shot_omniglot_cpu_{}'
	OMP_NUM_THREADS=1 $(V)/synthlit run few_shot_bases_cpu --jobs 2 && $(V)/python tests/keep_few_shot.py runs/few_shot_bases_cpu

results-metrics: .venv/.installed-dev ## our measures beside pytorch-fid, prdc and torch-fidelity for nbs/results/metrics.ipynb (half an hour on an idle machine; the last two go into .venv-peers)
	[ -x .venv-peers/bin/python ] || { $(PYTHON) -m venv .venv-peers && .venv-peers/bin/pip install -q prdc==0.2 torch-fidelity==0.4.0; }
	$(V)/python tests/bench_metrics.py --peers .venv-peers/bin/python --out nbs/results/metrics/bench.json

torture: .venv/.installed-dev ## kill runs at random moments, N=100 times, and resume them
	SYNTHLIT_TORTURE=$(N) $(V)/python -m pytest -rs tests/test_torture.py

docs: .venv/.installed-dev ## the web site, in _docs/ (needs Quarto)
	@PATH="$(CURDIR)/$(V):$$PATH" command -v quarto >/dev/null || \
	  { echo "make docs needs Quarto 1.7.34: https://quarto.org/docs/download or $(V)/pip install quarto-cli==1.7.34"; exit 1; }
	$(V)/python tests/make_readme.py # a README newer than index.ipynb is left alone by nbdev_docs
	PATH="$(CURDIR)/$(V):$$PATH" nbdev_docs

README.md: nbs/index.ipynb tests/make_readme.py | .venv/.installed-dev ## from nbs/index.ipynb, without Quarto
	$(V)/python tests/make_readme.py

format: .venv/.installed-dev ## tests/ and setup.py the way lint wants them
	$(V)/ruff check --fix-only --quiet tests setup.py
	$(V)/ruff format tests setup.py

hooks: .venv/.installed-dev ## once per clone: JupyterLab saves clean notebooks, git merges them by cell
	$(V)/nbdev_install_hooks

lint: .venv/.installed-dev ## ruff and mypy
	$(V)/ruff format --check tests setup.py
	$(V)/ruff check synthlit tests setup.py
	$(V)/mypy

check-pip: .venv/.installed-dev # first: one careless upgrade of fastcore breaks nbdev
	$(V)/pip check

# $(call unchanged,COMMAND,FOLDER,FILES): fail, naming the files, if the command changes any. (git diff would blame work in progress and miss new files.)
snapshot = find $(1) -name .ipynb_checkpoints -prune -o -name '$(2)' -exec cksum {} + | sort
define unchanged
	@echo $(1); before=$$($(call snapshot,$(2),$(3))); $(1) || exit 1; after=$$($(call snapshot,$(2),$(3))); \
	test "$$before" = "$$after" || { echo "$(notdir $(1)) changed these; look at them and commit them:"; \
	  printf '%s\n' "$$before" "$$after" | sort | uniq -u | awk 'NF {print "  " $$3}' | sort -u; exit 1; }
endef

check-export: .venv/.installed-dev
	$(call unchanged,$(V)/nbdev_export,synthlit,*.py)

check-clean: .venv/.installed-dev
	$(call unchanged,$(V)/nbdev_clean,nbs,*.ipynb)

check-readme: .venv/.installed-dev
	$(V)/python tests/make_readme.py --check

check-docs: .venv/.installed-dev # what a docs build executes, without Quarto; nbdev silently makes nothing when a parent folder starts with a dot
	$(V)/python tests/check_docs.py

check-nbs: .venv/.installed-dev # OMP_NUM_THREADS: two notebooks with all threads each are several times slower
	OMP_NUM_THREADS=1 $(V)/nbdev_test --n_workers $(WORKERS) --timing

check-tests: .venv/.installed-dev # last, so that a log ends with what was skipped and how many passed
	OMP_NUM_THREADS=1 $(V)/python -m pytest -rs --durations=30 -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

.venv: .venv/.installed ## the environment of a user; .venv/.installed-dev: of a contributor

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"synthlit needs Python 3.11 or later, {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv

.venv/.installed: settings.ini setup.py | .venv/bin/python
	$(V)/pip install -e .
	touch $@

# one resolver call for both, so that the pins hold for everything
.venv/.installed-dev: settings.ini setup.py | .venv/bin/python
	$(V)/pip install -e '.[dev]'
	touch .venv/.installed $@
