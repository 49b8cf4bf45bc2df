#!/usr/bin/env bash
# Unpack a small Debian into DIR: bootstrap.sh SUITE DIR PACKAGE,PACKAGE…  (SUITE "host" is this machine's own)
#
# From the mirror that apt is set up with here. In a mount namespace of its own, so that nothing that debootstrap mounts
# can remain.
set -euo pipefail
suite=$1 directory=$2 packages=$3

# The release's own archive; not its -security or -updates, which debootstrap cannot start from.
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
find_mirror() {
    # shellcheck disable=SC2016  # the $( ) are apt's
    apt-get indextargets --format '$(CODENAME) $(ORIGIN) $(SITE)' 'Created-By: Packages' |
        awk -v codename="$codename" '$1 == codename && $2 ~ /^(Debian|Ubuntu)$/ {print $3; exit}'
}
mirror=$(find_mirror)
if [ -z "$mirror" ]; then               # apt knows codenames only after an update
    apt-get update -qq </dev/null || true
    mirror=$(find_mirror)
fi
if [ -z "$mirror" ]; then
    echo "bootstrap.sh: apt-get indextargets names no mirror of ${codename:-this release}" >&2
    exit 1
fi
if [ "$suite" = host ]; then
    suite=$codename
fi

# Releases newer than this machine's debootstrap are made like sid.
script=()
[ -e "/usr/share/debootstrap/scripts/$suite" ] || script=(sid)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! unshare --mount --propagation private -- debootstrap --variant=minbase --include="$packages" \
        "$suite" "$directory" "$mirror" "${script[@]}" </dev/null >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "bootstrap.sh: debootstrap of $suite failed" >&2
    exit 1
fi
