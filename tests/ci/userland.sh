#!/usr/bin/env bash
# Run tests in the userland of another Debian: its Python, runtime and tools, this machine's kernel.
#   userland.sh SUITE [--runtime crun] [--workers N] [test_file…]   ./test.sh, with the image tools and a Docker engine
#   userland.sh SUITE [--runtime crun] --newcomer [test_file…]
#       as a new user who has nothing but python3 and systemd, which does not run: ./quickstart.sh,
#       tests/manage/test_quickstart.py, then ./test.sh
#   userland.sh SUITE --runtime crun --bench [--quick]     bench/run --runtime crun: that runtime beside runc
#
# SUITE is bookworm, trixie, forky … A plain chroot is not enough: runc does pivot_root itself, which needs a root that
# is a mount. So the suite becomes the real root of a private mount namespace, where the tests run. The pid namespace is
# private too: what a test leaves behind dies with pid 1, and no mount outlives it.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
source=$(dirname "$(dirname "$here")")
complete=python3,runc,crun,iproute2,curl,procps,strace,zstd,nftables
complete+=,docker.io,skopeo,podman,buildah,umoci,prometheus,apparmor,systemd,busybox-static,git,openssl,nodejs
newcomer=python3,systemd-sysv
bench=python3,runc,crun,iproute2,curl

usage() {
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
}

# In the private namespaces: make the root and go on there, with bare hands.
enter() {
    local lower=$1 work=$2 root=$2/root runtime=$4
    shift 2
    # What is changed in the root is in memory and gone in the end. /var/tmp is on a disk, as on other machines.
    mkdir "$work/changes" "$root" "$work/var-tmp"
    mount -t tmpfs tmpfs "$work/changes"
    mkdir -m 755 "$work/changes/upper" "$work/changes/work"
    mount -t overlay -o "lowerdir=$lower,upperdir=$work/changes/upper,workdir=$work/changes/work" overlay "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    mount --rbind /sys "$root/sys"              # with the cgroup hierarchies
    [ "$runtime" != crun ] || show_one_cgroup_version "$root/sys/fs/cgroup"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
    mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs "$root/run"
    chmod 1777 "$work/var-tmp"
    mount --bind "$work/var-tmp" "$root/var/tmp"
    mkdir -p "$root/src" "$root/run/old-root"
    mount --bind "$source" "$root/src"
    mount -o remount,bind,ro "$root/src"
    if [ -d /var/cache/faasd-ci ]; then         # the base image of tests/images/test_docker.py
        mkdir -p "$root/var/cache/faasd-ci"
        mount --bind /var/cache/faasd-ci "$root/var/cache/faasd-ci"
        mount -o remount,bind,ro "$root/var/cache/faasd-ci"
    fi
    cd "$root"
    pivot_root . run/old-root
    exec chroot . /usr/bin/env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin \
        bash /src/tests/ci/userland.sh --inside "$@"
}

# crun from 1.21 on refuses a machine with both versions of cgroups. So where both are, only v1 is mounted, as after
# `umount /sys/fs/cgroup/unified`. But on a tmpfs of our own, for crun leaves files in that directory.
show_one_cgroup_version() {
    local top=$1 name
    mountpoint -q "$top/unified" || return 0
    mkdir "$work/cgroup"
    mount -t tmpfs -o mode=0755,nosuid,nodev,noexec tmpfs "$work/cgroup"
    for name in $(ls "$top"); do
        mkdir "$work/cgroup/$name"
        [ "$name" = unified ] || mount --bind "$top/$name" "$work/cgroup/$name"
    done
    umount --recursive "$top"
    mount --move "$work/cgroup" "$top"
}

# In the new root. No exec in here: as pid 1, bash reaps orphans.
inside() {
    local suite=$1 runtime=$2 kind=$3
    shift 3
    umount -l /run/old-root
    rmdir /run/old-root
    [ "$runtime" = runc ] || export FAASD_TEST_RUNTIME=$runtime
    run_"$kind" "$@"
}

run_complete() {
    cd /src
    announce
    ./test.sh "$@"
}

run_newcomer() {
    local options=()
    [ "$runtime" = runc ] || options=(--runtime "$runtime")
    mkdir /root/faasd
    tar -C /src --exclude=./.git -c . | tar -C /root/faasd -x
    cd /root/faasd
    # Only its installing, by apt and so in this machine's network; no daemon with --version, which has no business there.
    ./quickstart.sh "${options[@]}" --version || true
    announce
    # Not ./test.sh: nothing may be there but what quickstart.sh has installed.
    python3 tests/run.py tests/manage/test_quickstart.py
    # Whatever is installed or removed here is gone in the end.
    [ $# -eq 0 ] || FAASD_TEST_BARE=yes ./test.sh "$@"
}

run_bench() {
    announce
    python3 /src/bench/run --runtime "$runtime" "$@"
}

announce() {
    echo "$suite: $(python3 --version), $("$runtime" --version | head -n 1), kernel $(uname -r)"
}

run_suite() {
    local suite=$1 runtime=runc kind=complete root work
    shift
    while [[ ${1:-} == --* ]]; do
        case $1 in
            --runtime) runtime=${2:?}; shift 2 ;;
            --newcomer) kind=newcomer; shift ;;
            --bench) kind=bench; shift; break ;;
            --soak | --workers) break ;;        # test.sh's
            *) usage ;;
        esac
    done
    [ "$suite" = bookworm ] || complete+=,docker-cli        # there it is in docker.io
    root=$("$here/root.sh" "$suite" "${!kind}")
    work=$(mktemp -d "/var/tmp/faasd-$suite.XXXXXX")
    # shellcheck disable=SC2064  # now: $work is local
    trap "rm -rf --one-file-system '$work'" EXIT
    unshare --mount --propagation private --pid --fork --kill-child -- \
        "$0" --enter "$root" "$work" "$suite" "$runtime" "$kind" "$@"
}

case ${1:-} in
    --enter) shift; enter "$@" ;;
    --inside) shift; inside "$@" ;;
    '' | -*) usage ;;
    *) run_suite "$@" ;;
esac
exit
