#!/usr/bin/env bash
# Run the tests in a virtual machine with what this one may lack: cgroup v2, AppArmor, a systemd of its own.
#   [SUITE=trixie] [ACCELERATION=kvm] vm.sh [--runtime crun] [test_file…]
#   [SUITE=trixie] [ACCELERATION=kvm] vm.sh --package
#       no tests: install the package, with its AppArmor profile; deploy, reboot, upgrade under load, purge
#
# Debian 13 with its own kernel and systemd, or another SUITE, below QEMU. By default only what may differ there: see
# `files`. Emulated unless KVM is asked for, and then some ten times slower than here, so it is no part of .ci/run.
# Needs root, and
#   apt install qemu-system-x86 debootstrap e2fsprogs
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
top=$(dirname "$(dirname "$here")")
packages=systemd-sysv,linux-image-cloud-amd64,initramfs-tools,apparmor,sudo,python3,runc,crun,iproute2,curl,procps
packages+=,strace,zstd,nftables,busybox-static
suite=${SUITE:-trixie} runtime=runc package= off="poweroff --force"
if [ "${1:-}" = --package ]; then
    package=yes off="poweroff --no-block"       # as an administrator does it
elif [ "${1:-}" = --runtime ]; then
    runtime=${2:?}
    shift 2
fi

# What is asked at start; profiles, cgroups and their limits, out of memory; what the kernel refuses and counts;
# networks; the unit below systemd 257, which does not run with cgroup v1, and what outlives the daemon.
files=()
for name in machine isolation packaging restart network hostile invocation; do
    files+=("$(cd "$top" && echo tests/*/"test_$name.py")")
done
[ $# -gt 0 ] || set -- "${files[@]}"

accelerate=(-accel "tcg,thread=multi" -cpu max) patience=10
[ "${ACCELERATION:-}" != kvm ] || accelerate=(-accel kvm -cpu host) patience=1

work=$(mktemp -d /var/tmp/faasd-vm.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
echo "vm: installing Debian $suite"
root=$("$here/root.sh" "$suite" "$packages")
mkdir "$work/root"
cp -a "$root/." "$work/root"
echo '/dev/vda / ext4 defaults 0 1' >"$work/root/etc/fstab"
mkdir "$work/root/src"
tar -C "$top" --exclude=./.git -c . | tar -C "$work/root/src" -x
# What a tty would do to lines is not wanted: each \n would get a \r.
cat >"$work/root/src/job" <<JOB
stty -F /dev/ttyS1 -onlcr
exec >/dev/ttyS1 2>&1
cd /src
[ -n "$package" ] || apparmor_parser -r packaging/apparmor-faasd-default
echo "vm: \$(python3 --version), \$($runtime --version | head -n 1), \$(systemctl --version | head -n 1)," \
    "kernel \$(uname -r)," \
    "\$(stat -f -c %T /sys/fs/cgroup), AppArmor \$(cat /sys/module/apparmor/parameters/enabled)"
[ -z "$package" ] || exec tests/ci/package_job.sh /src
[ "$runtime" = runc ] || export FAASD_TEST_RUNTIME=$runtime
PYTHONUNBUFFERED=1 FAASD_TEST_PATIENCE=$patience ./test.sh --workers 1 $(printf '%q ' "$@")
JOB
cat >"$work/root/etc/systemd/system/job.service" <<UNIT
[Service]
Type=oneshot
Environment=HOME=/root LANG=C.UTF-8
ExecStart=/bin/bash /src/job
ExecStopPost=/bin/systemctl $off
UNIT
mkdir -p "$work/root/etc/systemd/system/multi-user.target.wants"
ln -s ../job.service "$work/root/etc/systemd/system/multi-user.target.wants/"
truncate -s 8G "$work/disk"
mke2fs -q -t ext4 -d "$work/root" "$work/disk"

run() {
    qemu-system-x86_64 "${accelerate[@]}" -smp "$(nproc)" -m 6G -nodefaults -display none -no-reboot -nic none \
        -kernel "$work"/root/boot/vmlinuz-* -initrd "$work"/root/boot/initrd.img-* \
        -append "root=/dev/vda rw console=ttyS0 quiet" -drive "file=$work/disk,format=raw,if=virtio" \
        -serial "file:$work/console" -serial stdio </dev/null | tee "$work/log"
}

echo "vm: starting"
run
if [ -n "$package" ]; then
    echo "vm: starting again"
    run
fi
tail -n 1 "$work/log" | grep -q ' 0 failed' || { tail -n 5 "$work/console"; exit 1; }
