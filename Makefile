# distillbench: `make quickstart` for a leaderboard, `make test` for the tests, `make help` for the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STORE ?= .distillbench
JOBS ?= 2
BUDGET ?= S
METHODS ?= cd dmd2 progressive instaflow swiftbrush scm sana_sprint dmd diff_instruct sid f_distill disback
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart images report test lint golden methods-table tune board-shapes board-m claims studies publish speed clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

$(VENV)/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV): torch, numpy, scipy, pandas, matplotlib and a few small packages from PyPI."
	@echo "Downloads 0.3 to 3 GB (a torch built for GPUs is the large one); one to five minutes on a usual line. Nothing else is fetched, ever."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/core
	@echo "Installing the test tools (pytest, hypothesis, ruff, mypy, build) and the image packages (diffusers, transformers, open_clip, ...)."
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps hpsv2x==1.2.0
	@touch $@

quickstart: $(VENV)/core  ## install, train every method on mixture2d and two on digits, print both leaderboards
	@echo "Training on two embedded tracks, offline, on $(JOBS) workers: two to three minutes for mixture2d and three for digits on two cores."
	@$(BIN)/distillbench bench mixture2d --methods all --budget S --seeds 1 --jobs $(JOBS) --store $(STORE)
	@$(BIN)/distillbench bench digits --budget S --seeds 1 --jobs $(JOBS) --store $(STORE)
	@echo
	@echo "Next:  $(BIN)/distillbench board mixture2d --published     your rows beside the published ones"
	@echo "       $(BIN)/distillbench bench mixture2d --seeds 8       intervals over training seeds"
	@echo "       $(BIN)/distillbench list methods                    what there is; docs/ says how it works"

test: $(VENV)/dev  ## run the tests
	@$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/dev  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q . && $(BIN)/mypy

golden: $(VENV)/dev  ## record the golden trajectories again (bump the method's version if one moved)
	@$(BIN)/python tests/golden/record.py

methods-table: $(VENV)/core  ## write methods/README.md from the methods' cards
	@$(BIN)/python -m distillbench.methods_table > methods/README.md

images: $(VENV)/core  ## install what the text-to-image tracks need (diffusers, transformers, peft, open_clip)
	@$(PIP) -e '.[images]'

report: $(VENV)/core  ## the report of the published records: boards, curves, samples, claims, a page a run (no training)
	@$(BIN)/distillbench report --published --store $(STORE) --out report

tune: $(VENV)/core  ## tune every method on both tracks by the common protocol, into methods/distillbench_methods/recipes/
	@for track in mixture2d digits; do for method in $(METHODS); do $(BIN)/distillbench tune $$method $$track --jobs $(JOBS) --store $(STORE) || exit 1; done; done

board-shapes: $(VENV)/dev  ## the published text-to-image boards again, at S with one seed (about an hour on two cores)
	@$(BIN)/distillbench bench shapes-sd --methods dmd2,swiftbrush,cd,instaflow,dmd,diff_instruct,sid,f_distill,disback --budget $(BUDGET) --seeds 1 --jobs $(JOBS) --store $(STORE)
	@$(BIN)/distillbench bench shapes-sana --methods scm,sana_sprint,progressive --budget $(BUDGET) --seeds 1 --jobs $(JOBS) --store $(STORE)

board-m: $(VENV)/core  ## the published studies again: mixture2d with 8 seeds and digits with 5, at S and at M, and shapes at M (many hours)
	@for budget in S M; do for study in "mixture2d 8" "digits 5"; do set -- $$study; \
	  $(BIN)/distillbench bench $$1 --methods all --budget $$budget --seeds $$2 --jobs $(JOBS) --store $(STORE) || exit 1; done; done
	@$(MAKE) board-shapes BUDGET=M

claims: $(VENV)/core  ## run what the methods' claims stand on, and say which hold (about an hour)
	@$(BIN)/distillbench claims --jobs $(JOBS) --store $(STORE)

studies: $(VENV)/core  ## the figures of the report that follow trainings on their way (about 10 minutes)
	@$(BIN)/python studies/score_distillation.py --jobs $(JOBS)

publish: $(VENV)/core  ## put the records of $(STORE) into leaderboards/ with rendered tables
	@$(BIN)/python -m distillbench.publish mixture2d --store $(STORE)
	@$(BIN)/python -m distillbench.publish digits --store $(STORE)
	@$(BIN)/python -m distillbench.publish shapes-sd --store $(STORE)
	@$(BIN)/python -m distillbench.publish shapes-sana --store $(STORE)
	@PYTHONPATH=tests $(BIN)/python tests/docs/test_concepts.py

speed: $(VENV)/dev  ## how fast the harness and the metrics are, into the README (the packages compared with: pip install .[published])
	@$(BIN)/python benchmarks/harness_speed.py | tee benchmarks/results.txt
	@echo | tee -a benchmarks/results.txt
	@OMP_NUM_THREADS=2 $(BIN)/python benchmarks/metrics_speed.py --threads 2 | tee -a benchmarks/results.txt
	@echo | tee -a benchmarks/results.txt
	@OMP_NUM_THREADS=2 $(BIN)/python benchmarks/scoring_speed.py | tee -a benchmarks/results.txt
	@echo | tee -a benchmarks/results.txt
	@$(BIN)/python benchmarks/sampling_speed.py | tee -a benchmarks/results.txt
	@echo | tee -a benchmarks/results.txt
	@$(BIN)/python benchmarks/shapes_step_speed.py | tee -a benchmarks/results.txt
	@$(BIN)/python benchmarks/gpu_full_size.py --out benchmarks/gpu_full_size.txt
	@$(BIN)/python benchmarks/into_readme.py

clean:  ## remove the virtual environment and caches (never the store)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
