#!/usr/bin/env bash
# Lint the contract and compare it with its last version. Needs npm; `make test` does not need this.
set -euo pipefail
cd "$(dirname "$0")/../.."
proto=protos/teacher/v1/teacher.proto

if ! command -v npm >/dev/null; then
    if [ "${CI:-}" = true ]; then
        echo "npm is not on PATH, and CI=true asks for every check; install Node.js, or unset CI to skip this one" >&2
        exit 1
    fi
    echo "skipped: npm is not on PATH, and buf comes from npm"
    exit 0
fi
npm ci --prefix tools/buf --ignore-scripts --no-audit --no-fund --loglevel=error
buf=$(compgen -G "tools/buf/node_modules/@bufbuild/buf-*/bin/buf" || true)
if [ -z "$buf" ]; then
    echo "tools/buf pins no build of buf for $(uname -sm); run this check on Linux, x86-64 or arm64" >&2
    exit 1
fi

"$buf" lint protos
echo "buf lint: ok"

# The version to compare with is the newest committed one that differs from the file as it lies here: that is the
# last commit while a change is being made, the commit before the change once it is committed, and stays so however
# many commits follow that leave the contract alone.
against=
while read -r commit; do
    if ! git cat-file -e "$commit:$proto" 2>/dev/null; then continue; fi # the commit deleted or moved it
    if ! git show "$commit:$proto" | cmp -s - "$proto"; then against=$commit; break; fi
done < <(git log --format=%H -- "$proto")
if [ -z "$against" ]; then
    if [ "$(git rev-parse --is-shallow-repository)" = true ]; then
        echo "buf breaking: this clone is shallow and holds no earlier version; fetch the whole history" >&2
        exit 1
    fi
    echo "buf breaking: nothing to compare, the contract has one version so far"
    exit 0
fi
earlier=$(mktemp -d)
trap 'rm -rf "$earlier"' EXIT
git archive "$against" protos | tar -x -C "$earlier"
"$buf" breaking protos --against "$earlier/protos"
echo "buf breaking: ok against ${against:0:12}"
