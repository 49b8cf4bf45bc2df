#!/usr/bin/env bash
# Run the tests in the userland of Debian forky: newer Python, newer runc, this machine's kernel.
#   forky.sh [test_file…]
#
# A plain chroot is not enough: runc does pivot_root itself, which needs a root that is a mount. So forky becomes the real
# root of a private mount namespace, where ./test.sh runs. The pid namespace is private too: what a test leaves behind
# dies with pid 1, and no mount outlives it.
set -euo pipefail

if [ "${1:-}" = --inside ]; then
    root=$2 source=$3
    shift 3
    mount --bind "$root" "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    mount --rbind /sys "$root/sys"              # with the cgroup hierarchies
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
    mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs "$root/run"
    mkdir -p "$root/src" "$root/run/old-root"
    mount --bind "$source" "$root/src"
    mount -o remount,bind,ro "$root/src"
    if [ -d /var/cache/faasd-ci ]; then         # the base image of tests/test_docker.py
        mkdir -p "$root/var/cache/faasd-ci"
        mount --bind /var/cache/faasd-ci "$root/var/cache/faasd-ci"
        mount -o remount,bind,ro "$root/var/cache/faasd-ci"
    fi
    cd "$root"
    pivot_root . run/old-root
    # shellcheck disable=SC2016  # "$@" is for the inner shell
    exec chroot . /usr/bin/env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin \
        PYTHONDONTWRITEBYTECODE=1 bash -c '
            set -e
            umount -l /run/old-root
            rmdir /run/old-root
            cd /src
            echo "forky: $(python3 --version), $(runc --version | head -n 1), kernel $(uname -r)"
            ./test.sh "$@" || exit "$?"     # no exec: as pid 1, bash reaps orphans' forky "$@"
fi

here=$(dirname "$(readlink -f "$0")")
work=$(mktemp -d /var/tmp/faasd-forky.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
"$here/bootstrap.sh" forky "$work/root" \
    python3,runc,iproute2,curl,procps,strace,zstd,nftables,docker.io,docker-cli,skopeo,podman,buildah,umoci
unshare --mount --propagation private --pid --fork --kill-child -- \
    "$here/forky.sh" --inside "$work/root" "$(dirname "$(dirname "$here")")" "$@"
