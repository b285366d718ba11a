#!/usr/bin/env bash
# Check the images' recipes, then build every overlay, with and without TLS, and check what comes out. Needs .venv-deploy: `make lint-deploy` makes it.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools=$PWD/.venv-deploy/bin
built=build/deploy

"$tools/yamllint" --strict --config-file .yamllint deploy docker compose.yaml compose.gpu.yaml
echo "yamllint: ok"

"$tools/hadolint" docker/*.Dockerfile
echo "hadolint: ok"

rm -rf "$built"
mkdir -p "$built"
for overlay in cpu gpu ray; do
    "$tools/kubectl" kustomize "deploy/overlays/$overlay" >"$built/$overlay.yaml"
    # as docs/deploy.md has it: a kustomization of one's own on top of an overlay
    mkdir "$built/$overlay-tls"
    cat >"$built/$overlay-tls/kustomization.yaml" <<YAML
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../../../deploy/overlays/$overlay]
components: [../../../deploy/components/tls]
YAML
    "$tools/kubectl" kustomize "$built/$overlay-tls" >"$built/$overlay-tls.yaml"
    rm -r "${built:?}/$overlay-tls"
done
cp deploy/volume-loader.yaml "$built"
echo "kustomize: ok"

"$tools/python" tools/deploy/validate.py "$built"/*.yaml
echo "kubernetes-validate: ok"

"$tools/checkov" --config-file deploy/.checkov.yaml --directory "$built"
echo "checkov: ok"
