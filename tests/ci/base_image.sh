#!/usr/bin/env bash
# Make the base image of tests/images/test_docker.py, where no registry can be reached: this machine's own Debian release
# with python3-minimal, as a tar for `docker import`. Kept in /var/cache/faasd-ci, and made only if it is not there.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
image=/var/cache/faasd-ci/base.tar

[ -e "$image" ] && exit
work=$(mktemp -d /var/tmp/faasd-base.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
"$here/bootstrap.sh" host "$work/root" python3-minimal
mkdir -p "$(dirname "$image")"
# Without what only perl, apt and dpkg have a use for: tests import and unpack it a dozen times.
tar --create --numeric-owner --xattrs --directory "$work/root" \
    --exclude=./var/cache/apt/'*' --exclude=./var/lib/apt/lists/'*' --exclude=./var/lib/dpkg/info/'*' \
    --exclude=./usr/share/{doc,info,locale,man,perl5,zoneinfo}/'*' --exclude=./usr/{bin/perl,lib/apt/,sbin/debug}'*' \
    --exclude=./usr/lib/'*'/{gconv,perl-base,lib{apt,db,gnutls,p11,stdc,unistring}}'*' --file "$image.part" .
mv "$image.part" "$image"
