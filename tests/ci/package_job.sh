#!/usr/bin/env bash
# Install the package in a Debian that is there for nothing else, deploy, reboot, upgrade under load, purge:
# package_job.sh SOURCES
#
# For tests/ci/vm.sh --package, which runs it after each of two boots. systemd is the init; python3, runc, iproute2 and
# curl are there. The second time it prints its counts.
set -uo pipefail
sources=$1
state=/root/package-job             # outlives the reboot
next=99.0.0

# check WHAT COMMAND…: count whether it succeeds, and show what it says if it does not.
check() {
    local what=$1 said
    shift
    if said=$("$@" 2>&1); then
        echo "    ok       $what"
        echo passed >>"$state/counts"
    else
        printf '    FAILED   %s: %s\n' "$what" "$said"
        echo failed >>"$state/counts"
    fi
}

# wait_for COMMAND…: until it succeeds, for five minutes at most: this may be emulated.
wait_for() {
    for _ in {1..300}; do
        "$@" >/dev/null 2>&1 && return
        sleep 1
    done
    echo "still not so after five minutes: $*"
    return 1
}

has_apparmor() { [ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ]; }
is_loaded() { grep '^faasd-default (enforce)' /sys/kernel/security/apparmor/profiles; }
install() { DEBIAN_FRONTEND=noninteractive apt-get -y -q install "$1"; }
answers() { curl -fsS --max-time 300 "$(faas url f)/" | grep 'Hello from FaaS handler!'; }
# All that carries our name, but what this job has brought, and what says that something was installed.
left() {
    find / -xdev \( -path "$sources" -o -path "$state" -o -path /var/log -o -path /var/lib/dpkg -o -path /var/lib/apt \
        -o -path /var/cache/apt \) -prune -o -iname '*faas*' -print
    find /run /sys/fs/cgroup -iname '*faas*' -not -path "*/job.service/*"
    getent group faas || true
    ! has_apparmor || grep '^faasd' /sys/kernel/security/apparmor/profiles
}
nothing_left() { [ -z "$(left)" ] || { left; return 1; }; }

check_apparmor() {
    if has_apparmor; then
        check "the profile is loaded $1" is_loaded
        check "containers run under it $1" bash -o pipefail -c 'faas info f --isolation | grep "faasd-default (enforce)"'
    else
        echo "    skipped  the profile $1: this kernel has no AppArmor"
    fi
}

build() {
    "$sources/packaging/build-deb" "$state" && cp -a "$sources" "$state/next" &&
        sed -i "s/^__version__ = .*/__version__ = \"$next\"/" "$state/next/faas" "$state/next/faasd.py" &&
        sed -i "1i ## $next (2099-01-01)\n" "$state/next/CHANGELOG.md" && "$state/next/packaging/build-deb" "$state"
}

# With times for a machine that may be ten times slower.
deploy() (
    cd "$sources" && set -o pipefail &&
        faas pack test_handler.py | faas new f --start-timeout 5m --queue-timeout 5m --timeout 5m
)

ask_without_pause() {
    local url
    url=$(faas url f)
    while [ -e "$state/load" ]; do
        curl -fsS --max-time 300 "$url/" >/dev/null 2>>"$state/errors" || echo "curl: $?" >>"$state/errors"
        echo >>"$state/asked"
    done
}

upgrade_under_load() {
    touch "$state/load"
    : >"$state/errors"
    for _ in 1 2 3 4; do
        ask_without_pause &
    done
    check "the next version is installed" install "$state"/faasd_${next}_all.deb
    rm "$state/load"
    wait
    check "clients asked meanwhile" [ "$(wc -l <"$state/asked")" -ge 8 ]
    check "and no request failed" bash -c "! cat $state/errors | grep ."
    check "the next version runs" bash -o pipefail -c "faas version | grep 'faasd $next'"
}

first_boot() {
    mkdir "$state"
    check "two versions are built" build
    check "the package is installed" install "$(find "$state" -name 'faasd_*.deb' -not -name "*_${next}_*")"
    check "systemd runs it" systemctl is-active faasd
    check "a function is deployed" deploy
    check "it answers" answers
    check_apparmor "after the installation"
}

second_boot() {
    check "faasd has started by itself" wait_for test -S /run/faasd/faasd.sock
    check "the function answers after a reboot" wait_for answers
    check_apparmor "after the reboot"
    upgrade_under_load
    check "the function answers after the upgrade" answers
    check "the package is purged" env DEBIAN_FRONTEND=noninteractive apt-get -y -q purge faasd
    check "nothing is left" nothing_left
    echo "$(grep -c passed "$state/counts") passed, $(grep -c failed "$state/counts") failed"
}

if [ -d "$state" ]; then second_boot; else first_boot; fi
