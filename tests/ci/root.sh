#!/usr/bin/env bash
# Print the path of a directory with a small Debian: root.sh SUITE PACKAGE,PACKAGE…
#
# Kept in /var/cache/faasd-ci, one for each suite and list of packages, and made only if it is not there. Nobody may
# change one: others use it at the same time, as the lower layer of an overlay.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
suite=$1 packages=$2
roots=/var/cache/faasd-ci/roots
root=$roots/$suite.$(sha256sum <<<"$packages" | head -c 12)

mkdir -p "$roots"
chmod 700 "$roots"                  # there are setuid programs in it, of which nobody installs updates
exec {lock}>"$root.lock"
flock "$lock"
if [ ! -d "$root" ]; then
    rm -rf --one-file-system "$root.part"
    "$here/bootstrap.sh" "$suite" "$root.part" "$packages" >&2
    rm -f "$root.part"/var/cache/apt/archives/*.deb
    [ -e "$root.part/etc/hosts" ] || echo '127.0.0.1 localhost' >"$root.part/etc/hosts"
    touch "$root.part"              # .ci/run removes old ones
    mv "$root.part" "$root"
fi
echo "$root"
