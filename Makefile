# The two set-up commands: `make pretrain` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
EXPORT := exports/quickstart
# A port nobody listens on: two jobs on DeepSpeed's default port would join each other's ranks.
FREE_PORT = $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

.PHONY: install pretrain test test-parallel test-clients lint docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

pretrain: install  ## tokenizer, training, checkpoint, metrics, figure, export, sample: a few minutes on 2 CPU cores
	$(BIN)/deepspeed --num_accelerators 1 --master_port $(FREE_PORT) launch/pretrain.py recipes/quickstart.yaml
	rm -rf $(EXPORT)
	$(BIN)/python launch/export.py $(RUN) $(EXPORT)
	$(BIN)/python launch/generate.py $(EXPORT) --prompt "def" --max-new-tokens 100 --temperature 0.7 --top-p 0.9

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

test-parallel: install  ## gradients on 2 and 4 ranks: every ZeRO stage x context x accumulation x attention, 15-20 min
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m product tests/distributed/test_parallel.py tests/training/test_topologies.py

CLIENTS := .cache/clients
LLAMA_CPP := llama_cpp_python-0.3.36

test-clients: install $(CLIENTS)/installed  ## exports in transformers 4.57 and llama.cpp; compiling that takes 20 min
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m clients tests/huggingface

$(CLIENTS)/installed:  # the sources of llama-cpp-python hold llama.cpp's converter, which its wheels do not
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check torch 'transformers==4.57.*' sentencepiece gguf
	$(CLIENTS)/bin/pip download --quiet --no-deps --no-binary :all: --dest $(CLIENTS) $(subst _,-,$(subst -,==,$(LLAMA_CPP)))
	tar -xzf $(CLIENTS)/$(LLAMA_CPP).tar.gz -C $(CLIENTS)
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF" $(CLIENTS)/bin/pip install --quiet $(CLIENTS)/$(LLAMA_CPP)
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p dash_train

docs: install  ## the pages and pictures that are generated: from the recipe's classes and from docs/results
	$(BIN)/python -m dash_train.recipe.docs docs/recipe.md
	$(BIN)/python -m dash_train.recipe.editor docs/recipe.schema.json
	$(BIN)/python docs/figures/pictures.py
	$(BIN)/python docs/figures/speed.py
	$(BIN)/python docs/results/page.py

clean:
	rm -rf .venv .cache runs exports
