# Every stage as a target. Nothing runs twice: what stands is kept, an interrupted run goes on. A module that stands is
# kept whatever EPOCHS or LIMIT say now: delete its folder, or run train_module.py, which compares.
#
#   make demo                     the whole method on the embedded crystals, offline, minutes on two cores
#   make test                     set up what is needed and run the tests
#   make backbone                 theta_0, pre-trained here
#   make hub                      every hub module, one target each (try -j2); KIND=adapter for adapter modules
#   make compose TASK=dielectric  weights, report, composed module      make finetune TASK=dielectric
#   make results                  the real run of the README: hub, adapters, comparison
#   make demo-random              the demo's hub from a random start, and its merge gaps
#   make clean                    remove the demo's run and the caches
#
# DATA=demo, TASKS=file.json, HUB=, PRESET=, KIND=, LIMIT=rows, EPOCHS=, ARGS="--any --flag"
# LAUNCH="torchrun --nproc-per-node 2" or LAUNCH="srun -n1 -c8 --exact .venv/bin/python"

PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
HUB    ?= hub
KIND   ?= full
PRESET ?= small
TASK   ?= dielectric
LAUNCH ?= $(PY)

flags   = $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS)) $(if $(LIMIT),--limit $(LIMIT)) $(ARGS)
epochs  = $(if $(EPOCHS),--epochs $(EPOCHS))
suffix  = $(if $(filter adapter,$(KIND)),-adapter)

help:
	@sed -n '4,16s/^# \{0,2\}//p' Makefile

# ------------------------------------------------------------------------------------------------------------- set-up

$(VENV)/done: requirements.txt
	@echo "installing into $(VENV) (Python 3.11 to 3.13)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt
	touch $@

$(VENV)/tests: requirements-test.txt $(VENV)/done
	$(VENV)/bin/pip install -q -r requirements-test.txt
	touch $@

setup: $(VENV)/done

test: $(VENV)/tests
	$(PY) -m pytest -q -n 2 --dist loadfile tests

# ------------------------------------------------------------------------------------------------------------- stages

SETS ?= ff_mattersim_benchmarks,ff_mad,mp_2018_megnet,carbon_24,qm9
HUB_TASKS ?= mp_eform mp_bandgap mp_gvrh mp_kvrh n_e_cond p_e_cond n_th_cond p_th_cond n_seebeck p_seebeck \
             n_avg_eff_mass p_avg_eff_mass castelli_eform jarvis_eform jarvis_bandgap jarvis_dielectric_opt \
             jarvis_gvrh jarvis_kvrh

# torchrun is in the virtual environment
$(HUB)/%/module.json finetune: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

$(HUB)/backbone/module.json: | $(VENV)/done
	$(LAUNCH) pretrain.py --sets $(SETS) --preset $(PRESET) --hub $(HUB) --resume $(if $(DATA),--data $(DATA)) \
	    $(if $(TASKS),--tasks $(TASKS)) $(PRETRAIN_ARGS)

backbone: $(HUB)/backbone/module.json

$(HUB)/%/module.json: $(HUB)/backbone/module.json
	$(LAUNCH) train_module.py --task $(patsubst %-adapter,%,$*) --name $* --kind $(KIND) --hub $(HUB) --resume $(flags) $(epochs)

hub: $(foreach t,$(HUB_TASKS),$(HUB)/$(t)$(suffix)/module.json)

compose: setup
	$(PY) compose.py --task $(TASK) --kind $(KIND) --hub $(HUB) $(flags)

finetune: setup
	$(LAUNCH) finetune.py --task $(TASK) --hub $(HUB) --resume $(flags) $(epochs)

# -------------------------------------------------------------------- the demo: embedded crystals (toy labels, not DFT)

DEMO       = runs/demo
DEMO_HUB   = demo_ewald demo_lattice_energy demo_volume demo_dielectric demo_gap demo_phonon
DEMO_TASKS = demo_refractive_index demo_optical_gap demo_heat_capacity
demo_make  = OMP_NUM_THREADS=1 $(MAKE) --no-print-directory HUB=$(DEMO)/hub PRESET=tiny DATA=demo HUB_TASKS="$(DEMO_HUB)"

demo: | $(VENV)/done
	@echo "--- stage 0: theta_0, pre-trained on toy energies and forces"
	@$(demo_make) backbone SETS=demo_forcefield,demo_clusters PRETRAIN_ARGS="--epochs 14 --quiet"
	@echo "--- stage 1: six full modules, then six adapter modules, two at a time"
	@$(demo_make) -j2 hub KIND=full EPOCHS=12 ARGS=--quiet
	@$(demo_make) -j2 hub KIND=adapter EPOCHS=12 ARGS=--quiet
	@$(PY) hub.py list --hub $(DEMO)/hub
	@echo "--- stage 2: compose and fine-tune, three tasks, four methods, three splits"
	@$(demo_make) -j2 demo-tasks
	@echo "--- predict two crystals that no task holds"
	@$(PY) -c "import demo; demo.write_examples('$(DEMO)/my_crystals')"
	$(PY) predict.py --model $(DEMO)/moma-full/demo_refractive_index/seed0 $(DEMO)/my_crystals --output $(DEMO)/predictions
	@cat $(DEMO)/predictions/predictions.csv
	@echo "--- test errors"
	@$(PY) benchmark.py --table --output $(DEMO)
	@echo "plots: $(DEMO)/heat_map_full.png $(DEMO)/heat_map_adapter.png $(DEMO)/moma-full/demo_refractive_index/seed0/parity.png"

demo-tasks: $(DEMO_TASKS:%=demo-task-%)

# the same hub from a theta_0 that was hardly trained: how well its modules merge
demo-random: | $(VENV)/done
	$(demo_make) HUB=$(DEMO)/hub-random backbone SETS=demo_forcefield,demo_clusters PRETRAIN_ARGS="--epochs 1 --limit 64 --lr 1e-9 --quiet"
	$(demo_make) HUB=$(DEMO)/hub-random -j2 hub KIND=full EPOCHS=12 ARGS=--quiet
	for task in $(DEMO_TASKS); do for hub in hub hub-random; do echo "== $$task, $$hub"; \
	    $(PY) compose.py --task $$task --data demo --hub $(DEMO)/$$hub --kind full --output $(DEMO)/$$hub-composed/$$task; done; done

demo-task-%:
	@echo "$*: 12 runs, progress in $(DEMO)/$*.log"
	@$(PY) benchmark.py --task $* --data demo --hub $(DEMO)/hub --output $(DEMO) --methods moma-full,moma-adapter,theta0,scratch \
	    --epochs 60 --quiet > $(DEMO)/$*.log
	@grep -h "seed0$$" $(DEMO)/$*.log

# ------------------------------------------- the real run (README, Results): published splits, one hub of both kinds

RESULTS       = runs/results
RESULTS_HUB   = mp_eform mp_bandgap mp_gvrh castelli_eform jarvis_eform jarvis_bandgap jarvis_dielectric_opt jarvis_kvrh
RESULTS_TASKS = jarvis_2d_eform mp_eps_total mp_phonons expt_bandgap
SHARED       ?= ../shared
results_make  = MATMINER_DATA=$(SHARED)/matminer OMP_NUM_THREADS=1 $(MAKE) --no-print-directory HUB=$(RESULTS)/hub \
                TASKS=$(SHARED)/matminer/tasks.json HUB_TASKS="$(RESULTS_HUB)"

results: results-hub
	$(results_make) -j2 results-tasks
	$(PY) benchmark.py --table --output $(RESULTS)

results-hub: | $(VENV)/done
	$(results_make) backbone PRETRAIN_ARGS="--epochs 6" LAUNCH="env OMP_NUM_THREADS=2 $(PY)"
	$(results_make) -j2 hub KIND=full LIMIT=2000 EPOCHS=12
	$(results_make) -j2 hub KIND=adapter LIMIT=2000 EPOCHS=12

results-tasks: $(RESULTS_TASKS:%=results-task-%)

results-task-%:
	$(PY) benchmark.py --task $* --tasks $(TASKS) --splits $(SHARED)/splits --hub $(HUB) --output $(RESULTS) \
	    --epochs $(if $(filter expt_bandgap,$*),12,20) --patience 8 --quiet > $(RESULTS)/$*.log

clean:
	rm -rf $(DEMO) .cache .pytest_cache

.PHONY: help setup test demo demo-random demo-tasks backbone hub compose finetune results results-hub results-tasks clean
