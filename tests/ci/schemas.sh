#!/usr/bin/env bash
# The published schemas of Kubernetes, Knative and Compose, with the programs that check documents by them, from PyPI:
# a virtual environment in /var/cache/faasd-ci/schemas.venv, for tests/manage/test_export.py. Made once.
set -euo pipefail
target=/var/cache/faasd-ci/schemas.venv
[ -d "$target" ] && exit
mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$work"' EXIT
/usr/bin/python3 -m venv "$work"
"$work/bin/python" -m pip install -qq --no-input --no-compile --disable-pip-version-check \
    kubernetes-validate check-jsonschema cloudcoil-models-knative-serving </dev/null
chmod 755 "$work"
mv -T "$work" "$target"             # its programs are called by `bin/python -m`, which works in any place
