# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
STORE ?= local
RUN ?= sample
MLM ?= sample-mlm
ZH ?= sample-zh
ARGS ?=
TASKS := movies topics poems

PY := $(VENV)/bin/python
SETUP := $(VENV)/.installed
LM_EVAL := $(VENV)-lm-eval

.DEFAULT_GOAL := help
.PHONY: help setup promtool pretrain pretrain-mlm pretrain-zh finetune sweep labels test test-fast bench check docs picture k8s-check soak lm-eval constraints clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# $(call venv,PYTHON,FOLDER): where pip does not run there, as after a kill in the middle of this; of a pip that is there
# by half, venv takes what it finds for the whole unless the folder is cleared.
venv = for clear in "" --clear; do $(2)/bin/pip --version > /dev/null 2>&1 || $(1) -m venv $$clear $(2); done

setup: $(SETUP)  ## the virtual environment, made anew only when its inputs change

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 …" >&2; exit 1; }
	@$(call venv,$(PYTHON),$(VENV))
	@echo "installing into $(VENV) (about two minutes)"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The same commands on either store; the S3 server's address and keys reach them through the environment.
GENRES := news reviews dictionary dialogues
ifeq ($(STORE),s3)
  RAW := s3://corpus/shakespeare
  RAW_ZH := s3://corpus/chinese
  RUNS := s3://checkpoints/runs
  WITH_STORE := $(PY) cluster/local_s3.py --dir corpora/s3 --
  URIS := --corpus.uri $(RAW) --corpus.prepared s3://corpus/prepared --run.storage $(RUNS)
  URIS_ZH := $(foreach genre,$(GENRES),--corpus.sources.$(genre) $(RAW_ZH)/$(genre)) \
    --corpus.prepared s3://corpus/prepared-chinese --run.storage $(RUNS)
else
  RAW := corpora/shakespeare
  RAW_ZH := corpora/chinese
  RUNS := runs
  URIS :=
  URIS_ZH :=
endif

pretrain: $(SETUP)  ## the main job on the sample corpus; STORE=s3 uses a real S3 server on loopback
	@$(WITH_STORE) sh -c '$(PY) data/sample.py --output $(RAW) && exec $(PY) trainers/pretrain.py \
	  --config trainers/configs/sample.yaml --run.name $(RUN) $(URIS) $(ARGS)'

finetune: $(SETUP)  ## adapt the sample run's model to sentences of movie reviews, and judge it
	@$(PY) data/sample_tasks.py --output corpora/tasks movies
	@$(PY) trainers/finetune.py --run.task trainers/tasks/movies.yaml --run.name movies --backbone.uri runs/$(RUN)/export $(ARGS)

sweep: $(SETUP)  ## 20 trials of that task by Ray Tune
	@$(PY) data/sample_tasks.py --output corpora/tasks movies
	@$(PY) tune/sweep.py --config tune/configs/movies.yaml --base.backbone.uri runs/$(RUN)/export $(ARGS)

labels: $(SETUP)  ## how many labels pretraining saves: a backbone for three sample tasks, and a curve of each (1.5 hours)
	@$(PY) data/sample_tasks.py --output corpora/tasks $(TASKS)
	@$(foreach task,$(TASKS),$(PY) tune/domain_text.py --task trainers/tasks/$(task).yaml \
	  --unlabelled corpora/tasks/$(task)-unlabelled $(foreach other,$(filter-out $(task),$(TASKS)),--keep-out trainers/tasks/$(other).yaml) \
	  --output corpora/$(task)-text &&) $(PY) trainers/pretrain.py --config trainers/configs/sample-tasks.yaml
	@$(foreach task,$(TASKS),$(PY) tune/label_efficiency.py --config tune/configs/labels.yaml \
	  --base.run.task trainers/tasks/$(task).yaml $(ARGS) &&) true

pretrain-mlm: $(SETUP)  ## masked words and next sentences on the same corpus: an encoder as BERT; MLM=name of its run
	@$(WITH_STORE) sh -c '$(PY) data/sample.py --output $(RAW) && exec $(PY) trainers/pretrain.py \
	  --config trainers/configs/sample-mlm.yaml --run.name $(MLM) $(URIS) $(ARGS)'

pretrain-zh: $(SETUP)  ## the same on Chinese text, and a model that also continues text; ZH=name of the runs
	@$(WITH_STORE) sh -c '$(PY) data/sample.py --corpus chinese --output $(RAW_ZH) \
	  && $(PY) trainers/pretrain.py --config trainers/configs/sample-zh.yaml --run.name $(ZH) $(URIS_ZH) $(ARGS) \
	  && $(PY) trainers/pretrain.py --config trainers/configs/sample-zh-mixed.yaml --run.name $(ZH)-mixed $(URIS_ZH) $(ARGS) \
	  && $(PY) trainers/fill_mask.py --model $(RUNS)/$(ZH)/export --text "今天天气真[MASK]，我们去公园吧。" \
	    --word 好 --word 棒 --word 美 \
	  && $(PY) trainers/next_sentence.py --model $(RUNS)/$(ZH)/export --first 猫在沙发上睡觉。 \
	    --second 它看起来很舒服。 --second 太阳从东方升起。 \
	  && $(PY) trainers/generate.py --model $(RUNS)/$(ZH)-mixed/export --prompt 人工智能是 --max-new-tokens 60'

test: $(SETUP)  ## every test, on a real Ray cluster and a real S3 server, in two processes (30 to 45 minutes on 2 cores)
	@$(PY) -m pytest $(or $(ARGS),-n 2 --dist loadfile --no-loadscope-reorder)

test-fast: $(SETUP)  ## the tests that need no cluster and about a second each at most (about a minute on 2 cores)
	@$(PY) -m pytest -q -n 2 --dist loadfile -m "not cluster and not slow" $(ARGS)

check: $(SETUP)  ## lint, format and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

docs: $(SETUP)  ## the pages of docs/ as site/, with every configuration key; fails at a link that leads nowhere
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict --config-file docs/mkdocs.yml
	@echo "site/index.html"

picture:  ## draw the way of the data anew, with Graphviz
	@dot -Tsvg docs/way-of-the-data.dot -o docs/pages/way-of-the-data.svg

k8s-check: $(SETUP)  ## render every manifest and hold it against schemas and rules; tests each rule
	@$(PY) k8s/check.py
	@$(PY) -m pytest -q -m "not cluster" tests/test_k8s.py tests/test_k8s_rules.py

bench: $(SETUP)  ## the table of speeds, each as a ratio within one run
	@$(PY) benchmarks/run.py $(ARGS)

soak: $(SETUP)  ## 20 minutes of a run under faults, one a minute; ARGS='--minutes 5'
	@$(PY) benchmarks/soak.py $(ARGS)

# An environment of its own, which sees the packages of $(VENV) too: lm-eval needs Hugging Face's `evaluate`, and no file
# of this project may have the name of a package in $(VENV).
$(LM_EVAL)/.installed: $(SETUP) requirements-lm-eval.txt
	@$(call venv,$(PY),$(LM_EVAL))
	@$(PY) -c 'import sys, sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"), \
	  file=open(s.get_path("purelib", vars={"base": sys.argv[1]}) + "/with-project.pth", "w"))' $(LM_EVAL)
	@echo "installing lm-eval into $(LM_EVAL)"
	@$(LM_EVAL)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt -r requirements-lm-eval.txt
	@touch $@

promtool: $(VENV)/bin/promtool  ## what the alerts are tested with, from Debian's package; installs nothing

$(VENV)/bin/promtool: $(SETUP)
	@folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && cd $$folder && apt-get download -qq prometheus 2>/dev/null \
	  && dpkg -x prometheus_*.deb . && cp usr/bin/promtool $(abspath $@)

lm-eval: $(LM_EVAL)/.installed  ## the sample run's model in EleutherAI's lm-eval: as accurate as evaluate.py says
	@$(PY) data/sample_tasks.py --output corpora/tasks movies
	@$(LM_EVAL)/bin/python trainers/harness.py --model runs/$(RUN)/export --task trainers/tasks/movies.yaml --shots 0 4 $(ARGS)

constraints: $(SETUP)  ## write down the exact versions of what is installed now
	@$(VENV)/bin/pip freeze --exclude-editable | sed 's/+cpu//; s/ @ .*//' > constraints.txt

clean:  ## remove the environment, runs and prepared corpora
	rm -rf $(VENV) $(LM_EVAL) runs corpora
