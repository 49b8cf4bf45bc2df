#!/usr/bin/env bash
# Run the tests in a virtual machine with what this one may lack: cgroup v2, AppArmor, a systemd of its own, crun.
#   [RUNTIME=crun] [ACCELERATION=kvm] vm.sh [test_file…]
#
# A Debian of this machine's release with its own kernel, below QEMU. Emulated unless KVM is asked for, and then some ten
# times slower than here, so it is no part of .ci/run. Needs root, and
#   apt install qemu-system-x86 debootstrap e2fsprogs
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
top=$(dirname "$(dirname "$here")")
work=$(mktemp -d /var/tmp/faasd-vm.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT

echo "vm: installing Debian"
"$here/bootstrap.sh" host "$work/root" \
    systemd-sysv,linux-image-cloud-amd64,initramfs-tools,apparmor,sudo,python3,runc,crun,iproute2,curl,procps,strace,zstd,nftables,busybox-static
echo '/dev/vda / ext4 defaults 0 1' >"$work/root/etc/fstab"
echo '127.0.0.1 localhost' >"$work/root/etc/hosts"
[ -z "${RUNTIME:-}" ] || ln -s "/usr/bin/$RUNTIME" "$work/root/usr/local/sbin/runc"
mkdir "$work/root/src"
tar -C "$top" --exclude=.git -c . | tar -C "$work/root/src" -x
# What a tty would do to lines is not wanted: each \n would get a \r.
cat >"$work/root/src/job" <<JOB
stty -F /dev/ttyS1 -onlcr
exec >/dev/ttyS1 2>&1
cd /src
apparmor_parser -r packaging/apparmor-faasd-default
echo "vm: \$(python3 --version), \$(runc --version | head -n 1), kernel \$(uname -r), \$(stat -f -c %T /sys/fs/cgroup)"
PYTHONUNBUFFERED=1 ./test.sh $(printf '%q ' "$@")
JOB
cat >"$work/root/etc/systemd/system/job.service" <<UNIT
[Service]
Type=oneshot
Environment=HOME=/root LANG=C.UTF-8
ExecStart=/bin/bash /src/job
ExecStopPost=/bin/systemctl poweroff --force
UNIT
mkdir -p "$work/root/etc/systemd/system/multi-user.target.wants"
ln -s ../job.service "$work/root/etc/systemd/system/multi-user.target.wants/"
truncate -s 8G "$work/disk"
mke2fs -q -t ext4 -d "$work/root" "$work/disk"

accelerate=(-accel tcg,thread=multi -cpu max)
[ "${ACCELERATION:-}" != kvm ] || accelerate=(-accel kvm -cpu host)
echo "vm: starting"
qemu-system-x86_64 "${accelerate[@]}" -smp "$(nproc)" -m 6G -nodefaults -display none -no-reboot -nic none \
    -kernel "$work"/root/boot/vmlinuz-* -initrd "$work"/root/boot/initrd.img-* -append "root=/dev/vda rw console=ttyS0 quiet" \
    -drive "file=$work/disk,format=raw,if=virtio" -serial "file:$work/console" -serial stdio </dev/null | tee "$work/log"
tail -n 1 "$work/log" | grep -q ' 0 failed' || { tail -n 5 "$work/console"; exit 1; }
