#!/usr/bin/env bash
# Make the image of tests/serve/test_real_servers.py: this machine's own Debian release with servers as it has them, as a
# layer of an image. Kept in /var/cache/faasd-ci, and made only if it is not there.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
layer=/var/cache/faasd-ci/servers.tar

[ -e "$layer" ] && exit
work=$(mktemp -d /var/tmp/faasd-servers.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
"$here/bootstrap.sh" host "$work/root" nginx-light,apache2,lighttpd,redis-server,memcached,gunicorn,python3-flask
mkdir -p "$(dirname "$layer")"
tar --create --numeric-owner --directory "$work/root" \
    --exclude=./proc/'*' --exclude=./sys/'*' --exclude=./dev/'*' --exclude=./boot/'*' \
    --exclude=./var/cache/apt/'*' --exclude=./var/lib/apt/lists/'*' --exclude=./var/lib/dpkg/info/'*' \
    --exclude=./usr/share/{doc,info,locale,man,zoneinfo,perl}/'*' --exclude=./usr/lib/x86_64-linux-gnu/perl/'*' \
    --file "$layer.part" .
mv "$layer.part" "$layer"
