#!/usr/bin/env bash
# Write the locks, every distribution with its hashes. Arguments go to `uv pip compile`, e.g. --upgrade.
#   tools.lock     programs that set-up and tests call
#   isolated.lock  what single tests need, apart from the rest
#   deploy.lock    what checks deploy/, in an environment of its own: `make lint-deploy`
#   cpu.lock       the CPU environment, less torch and what only torch's CUDA build needs: pip installs torch,
#                  from whichever build the machine offers
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
compile pyproject.toml --extra cpu --extra dev --override requirements/cpu-overrides.txt \
    --no-emit-package gkd --no-emit-package torch --no-emit-package triton \
    --output-file requirements/cpu.lock "$@"
python3 - requirements/cpu.lock <<'PY'
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
