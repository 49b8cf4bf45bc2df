#!/usr/bin/env bash
# Run all tests: sudo ./test.sh [-v] [--soak SECONDS] [tests/FOLDER/test_x.py…]
#
# Installs what they need if it is missing, and runs each file in a network namespace of its own, so that no address or
# connection of theirs meets this machine's network. The last line is `N passed, N failed[, N skipped]`.
# FAASD_TEST_RUNTIME=crun runs the daemons of the tests with crun in the place of runc.
# Tests of images made by docker, skopeo, podman, buildah or umoci are skipped where those are not installed.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

runtime=${FAASD_TEST_RUNTIME:-runc}
# command:package
needs=(python3:python3 "$runtime:$runtime" ip:iproute2 curl:curl unshare:util-linux ps:procps strace:strace zstd:zstd
    nft:nftables)

if [ "$(id -u)" -ne 0 ]; then
    echo "test.sh: the tests start containers and network addresses, which takes root: sudo ./test.sh" >&2
    exit 2
fi

missing=()
for need in "${needs[@]}"; do
    command -v "${need%:*}" >/dev/null || missing+=("${need#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        echo "test.sh: please install first: ${missing[*]}" >&2
        exit 2
    fi
    echo "Installing with apt-get: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq </dev/null || echo "apt-get update failed; going on with the lists that are there"
    apt-get install -qq -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
fi

# The one that the package runs too. Others on PATH, such as that of pyenv, may take three times as long to start.
python=
for candidate in /usr/bin/python3 python3 python3.{11..19}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "test.sh: faasd needs Python 3.11 or newer, and this is $(python3 --version)" >&2
    exit 2
fi

exec "$python" tests/run.py "$@"
