# Every stage as a target. Nothing runs twice: what stands is kept, an interrupted run goes on. A module that stands is
# kept whatever EPOCHS or LIMIT say now: delete its folder, or run train_module.py, which compares.
#
#   make demo                     the shipped hub on the paper's dielectric task: compose, fine-tune, compare, predict
#   make from-zero                every stage from nothing, on the embedded crystals (toy labels)
#   make test                     set up what is needed and run the tests
#   make compose TASK=dielectric  weights, report, composed module      make finetune TASK=dielectric
#   make predict MODEL=runs/dielectric INPUT=my_crystals
#   make results                  all methods on the nine shipped tasks of the paper, three splits each, 20 epochs: hours
#   make teacher                  install CHGNet, which labels crystals for theta_0
#   make backbone HUB=my_hub      theta_0, pre-trained here; SETS=a,b,c for energies and forces in place of a teacher
#   make hub HUB=my_hub           every hub module, one target each (try -j2); KIND=adapter for adapter modules
#   make clean                    remove the runs of demo and from-zero, and the caches
#
# DATA=folder, TASKS=file.json, HUB=, PRESET=, KIND=, LIMIT=rows, EPOCHS=, HELD_OUT=share, ARGS="--any --flag"
# LAUNCH="torchrun --nproc-per-node 2" or LAUNCH="srun -n1 -c8 --exact .venv/bin/python"

SHELL       = /bin/bash
.SHELLFLAGS = -o pipefail -c

PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
HUB    ?= hub
KIND   ?= full
PRESET ?= small
TASK   ?= $(if $(DATA),,dielectric)
LAUNCH ?= $(PY)

flags   = $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS)) $(if $(LIMIT),--limit $(LIMIT)) $(ARGS)
task    = $(if $(TASK),--task $(TASK))
epochs  = $(if $(EPOCHS),--epochs $(EPOCHS))
suffix  = $(if $(filter adapter,$(KIND)),-adapter)

help:
	@sed -n '4,18s/^# \{0,2\}//p' Makefile

# ------------------------------------------------------------------------------------------------------------- set-up

$(VENV)/done: requirements.txt
	@echo "installing into $(VENV) (Python 3.11 to 3.13)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt
	touch $@

$(VENV)/tests: requirements-test.txt $(VENV)/done
	$(VENV)/bin/pip install -q -r requirements-test.txt
	touch $@

$(VENV)/teacher: requirements-teacher.txt $(VENV)/done
	$(VENV)/bin/pip install -q -r requirements-teacher.txt
	touch $@

setup: $(VENV)/done

teacher: $(VENV)/teacher

test: $(VENV)/tests
	$(PY) -m pytest -q -n 2 --dist loadfile tests

# ------------------------------------------------------------------------------------------------------------- stages

PAPERS_HUB = mp_eform mp_bandgap mp_gvrh mp_kvrh n_e_cond p_e_cond n_th_cond p_th_cond n_seebeck p_seebeck \
             n_avg_eff_mass p_avg_eff_mass castelli_eform jarvis_eform jarvis_bandgap jarvis_dielectric_opt \
             jarvis_gvrh jarvis_kvrh
SHIPPED    = hub/tasks.json
HELD_OUT  ?= 0.1

# the shipped hub has its own tasks: tables that come near to the paper's
hub_tasks  = $(or $(TASKS),$(if $(filter hub,$(HUB)),$(SHIPPED)))
names      = $(shell sed -n 's/^ "\([^"]*\)".*/\1/p' $(SHIPPED) | tr A-Z a-z)
HUB_TASKS ?= $(if $(filter $(SHIPPED),$(hub_tasks)),$(names),$(PAPERS_HUB))
pretrain   = $(if $(SETS),--sets $(SETS),--teacher chgnet --limit 12000 --epochs 7 --batch-size 64 --max-atoms 2000 \
                 --lr 2.5e-3 --num-workers 2)

# torchrun is in the virtual environment
$(HUB)/%/module.json finetune: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

$(HUB)/backbone/module.json: | $(VENV)/done $(if $(SETS),,$(VENV)/teacher)
	$(LAUNCH) pretrain.py $(pretrain) --preset $(PRESET) --hub $(HUB) --resume $(if $(DATA),--data $(DATA)) \
	    $(if $(hub_tasks),--tasks $(hub_tasks)) $(PRETRAIN_ARGS)

backbone: $(HUB)/backbone/module.json

$(HUB)/%/module.json: | $(HUB)/backbone/module.json
	$(LAUNCH) train_module.py --task $(patsubst %-adapter,%,$*) --name $* --kind $(KIND) --hub $(HUB) --resume \
	    --held-out $(HELD_OUT) $(if $(TASKS),,$(if $(hub_tasks),--tasks $(hub_tasks))) $(flags) $(epochs)

hub: $(foreach t,$(HUB_TASKS),$(HUB)/$(t)$(suffix)/module.json)

compose: setup
	$(PY) compose.py $(task) --kind $(KIND) --hub $(HUB) $(flags)

finetune: setup
	$(LAUNCH) finetune.py $(task) --hub $(HUB) --resume $(flags) $(epochs)

MODEL ?= runs/$(or $(TASK),$(basename $(notdir $(DATA:/=))))
INPUT ?= examples
predict: setup
	$(PY) predict.py --model $(MODEL) $(INPUT) $(ARGS)

# ------------------------------------- the demo: the shipped hub and table, the paper's row "Dielectric Constant"

DEMO        = runs/demo
DEMO_EPOCHS ?= 5
# a twelfth of the default's epochs, hence larger steps
quick       = --epochs $(DEMO_EPOCHS) --lr 1e-3
first       = full/mp_eps_total/seed0
# with other settings than before: make demo ARGS=--overwrite

# one thread: small nets gain little from a second, and lose much beside other programs
demo: export OMP_NUM_THREADS = 1
demo: export PYTHONUNBUFFERED = 1
demo: | $(VENV)/done
	@echo "--- the hub: modules that were trained from one theta_0"
	$(PY) hub.py list --hub $(HUB)
	@mkdir -p $(DEMO)
	@$(MAKE) --no-print-directory -j3 demo-compose demo-theta0 demo-others
	@$(PY) benchmark.py --table --output $(DEMO)
	@echo "--- two crystals: CaF2 is in the table (8.06, validation row of this split), MgO is not (measured: 9.8)"
	$(PY) predict.py --model $(DEMO)/moma-$(first) examples --output $(DEMO)/predictions
	@cat $(DEMO)/predictions/predictions.csv
	@echo "plots: $(DEMO)/composed/$(first)/weights.png $(DEMO)/moma-$(first)/parity.png $(DEMO)/heat_map_full.png"

demo-compose:
	@echo "--- stage 2a: compose the modules that help to predict dielectric constants"
	$(PY) compose.py --task dielectric --hub $(HUB) --output $(DEMO)/composed/$(first) $(ARGS)
	@echo "--- stage 2b: fine-tune, $(DEMO_EPOCHS) epochs; then two more splits"
	$(PY) finetune.py --task dielectric --hub $(HUB) --init $(DEMO)/composed/$(first) --output $(DEMO)/moma-$(first) \
	    $(quick) --resume $(ARGS)
	@$(demo_run) moma-full --seeds 0,1 $(demo_lines)

# at the same time: without modules
demo-theta0:
	@$(demo_run) theta0 $(demo_lines)

# and without networks; then the last split, which waits for representations that demo-compose is computing
demo-others:
	@$(demo_run) magpie $(demo_lines)
	@$(demo_run) moma-full --seeds 2 $(demo_lines)

demo_run   = $(PY) benchmark.py --task dielectric --hub $(HUB) $(quick) --output $(DEMO) --quiet $(ARGS) --methods
demo_lines = | grep --line-buffered 'seed[0-9]*$$'

# ------------------------------------------ every stage from nothing: embedded crystals (toy labels, not DFT), minutes

ZERO       = runs/from-zero
ZERO_SEEDS ?= 0
# of theta_0, the modules, the fine-tuned models
ZERO_EPOCHS ?= 6 8 40
ZERO_HUB   = demo_ewald demo_lattice_energy demo_volume demo_dielectric demo_gap demo_phonon
ZERO_TASKS = demo_refractive_index demo_optical_gap demo_heat_capacity
zero_make  = OMP_NUM_THREADS=1 $(MAKE) --no-print-directory HUB=$(ZERO)/hub PRESET=tiny DATA=demo \
             HUB_TASKS="$(ZERO_HUB)" SETS=demo_forcefield,demo_clusters HELD_OUT=0.3

from-zero: | $(VENV)/done
	@echo "--- stage 0: theta_0, pre-trained on toy energies and forces"
	@$(zero_make) backbone PRETRAIN_ARGS="--epochs $(word 1,$(ZERO_EPOCHS)) --quiet"
	@echo "--- stage 1: six full modules, then six adapter modules, two at a time"
	@$(zero_make) -j2 hub KIND=full EPOCHS=$(word 2,$(ZERO_EPOCHS)) ARGS=--quiet
	@$(zero_make) -j2 hub KIND=adapter EPOCHS=$(word 2,$(ZERO_EPOCHS)) ARGS=--quiet
	@$(PY) hub.py list --hub $(ZERO)/hub
	@echo "--- stage 2: compose and fine-tune, three tasks, four methods, splits $(ZERO_SEEDS)"
	@$(zero_make) -j3 $(ZERO_TASKS:%=from-zero-%)
	@echo "--- predict two crystals that no task holds"
	@$(PY) -c "import demo; demo.write_examples('$(ZERO)/my_crystals')"
	$(PY) predict.py --model $(ZERO)/moma-full/demo_refractive_index/seed0 $(ZERO)/my_crystals --output $(ZERO)/predictions
	@cat $(ZERO)/predictions/predictions.csv
	@echo "--- test errors"
	@$(PY) benchmark.py --table --output $(ZERO)
	@echo "plots: $(ZERO)/heat_map_full.png $(ZERO)/heat_map_adapter.png $(ZERO)/moma-full/*/seed0/parity.png"

$(ZERO_TASKS:%=from-zero-%): from-zero-%:
	@echo "$*: progress in $(ZERO)/$*.log"
	@$(PY) benchmark.py --task $* --data demo --hub $(ZERO)/hub --output $(ZERO) \
	    --methods moma-full,moma-adapter,theta0,scratch --seeds $(ZERO_SEEDS) --quiet \
	    --epochs $(word 3,$(ZERO_EPOCHS)) > $(ZERO)/$*.log
	@grep -h "seed0$$" $(ZERO)/$*.log

# the same hub from a theta_0 that was hardly trained: how well its modules merge
from-zero-random: | $(VENV)/done
	$(zero_make) HUB=$(ZERO)/hub-random backbone PRETRAIN_ARGS="--epochs 1 --limit 64 --lr 1e-9 --quiet"
	$(zero_make) HUB=$(ZERO)/hub-random -j2 hub KIND=full EPOCHS=$(word 2,$(ZERO_EPOCHS)) ARGS=--quiet
	for task in $(ZERO_TASKS); do for hub in hub hub-random; do echo "== $$task, $$hub"; $(PY) compose.py --task $$task \
	    --data demo --hub $(ZERO)/$$hub --kind full --output $(ZERO)/$$hub-composed/$$task; done; done

# ------------------------------ all methods on the shipped tables (README, Results): published splits 0 to 2

RESULTS       = runs/results
RESULTS_TASKS = jarvis_2d_dielectric_opt jarvis_2d_eform jarvis_2d_exfoliation jarvis_2d_gap_opt mp_eps_electronic \
                mp_eps_total mp_phonons mp_poly_electronic mp_poly_total
FROZEN        = moma-svr,theta0-svr,mixture-svr
NETWORKS      = moma-full,moma-hinted,moma-adapter,best-module,theta0,theta0-adapter,scratch,cgcnn
METHODS      ?= $(NETWORKS),magpie,chgnet-svr,$(FROZEN)

results: | $(VENV)/done $(VENV)/teacher
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(RESULTS_TASKS:%=results-%)
	$(PY) benchmark.py --table --output $(RESULTS)

results-%: | $(VENV)/done
	@mkdir -p $(RESULTS)
	$(PY) benchmark.py --task $* --methods $(METHODS) --hub $(HUB) --output $(RESULTS) --quiet $(flags) \
	    --epochs $(or $(EPOCHS),20) > $(RESULTS)/$*.log

clean:
	rm -rf $(DEMO) $(ZERO) .cache .pytest_cache

.PHONY: help setup teacher test demo demo-compose demo-theta0 demo-others from-zero from-zero-random backbone hub compose finetune predict results clean
