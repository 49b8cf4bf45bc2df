#!/usr/bin/env bash
# Make the image of tests/serve/test_real_servers.py: this machine's own Debian release with servers as it has them, and
# the programs of tests/handlers/servers in /srv, as a layer of an image. Kept in /var/cache/faasd-ci under a name that
# changes with this script and these programs, and made only if it is not there. With --path, only print that name.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
programs=$here/../handlers/servers
digest=$(cd "$here" && find servers_image.sh ../handlers/servers -type f | LC_ALL=C sort | xargs cat | sha256sum)
layer=/var/cache/faasd-ci/servers.${digest:0:12}.tar

if [ "${1:-}" = --path ]; then
    echo "$layer"
    exit
fi
[ ! -e "$layer" ] || exit 0
mkdir -p "$(dirname "$layer")"
exec 9>"$layer.lock"                    # the tests wait for it
flock 9
[ ! -e "$layer" ] || exit 0
work=$(mktemp -d /var/tmp/faasd-servers.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT
packages=nginx-light,apache2,lighttpd,caddy,busybox-static,redis-server,memcached,postgresql,dropbear-bin
packages+=,gunicorn,python3-flask,python3-uvicorn,python3-websockets,python3-django,puma,php-cli,php-fpm,nodejs
packages+=,default-jre-headless
compilers=golang-go,openssl
"$here/bootstrap.sh" host "$work/root" "$packages,$compilers"

cp -r "$programs/." "$work/root/srv"
# shellcheck disable=SC2016  # the $1 is that shell's
unshare --mount --propagation private -- sh -euc '
    mount -t proc proc "$1/proc"        # where a program finds its own libraries
    exec chroot "$1" sh -euc "cd /srv
        java -m jdk.compiler/com.sun.tools.javac.Main Hello.java
        HOME=/root CGO_ENABLED=0 go build -ldflags=-s -o hello hello.go
        openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out certificate.pem -days 3650 -subj /CN=faasd"
    ' sh "$work/root" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
libraries=./usr/lib/$(uname -m)-linux-gnu
# Nothing is compiled any more, in postgres neither (LLVM), and nobody reads manuals.
tar --create --numeric-owner --directory "$work/root" \
    --exclude=./proc/'*' --exclude=./sys/'*' --exclude=./dev/'*' --exclude=./boot/'*' --exclude=./root/'*' \
    --exclude=./var/cache/apt/'*' --exclude=./var/lib/apt/lists/'*' --exclude=./var/lib/dpkg/info/'*' \
    --exclude=./usr/share/{doc,info,locale,man,perl}/'*' --exclude="$libraries"/perl/'*' \
    --exclude=./usr/{lib,share}/go-'*' --exclude="$libraries"/libLLVM'*' \
    --exclude=./usr/lib/postgresql/'*'/lib/{bitcode,llvmjit'*'} \
    --file "$layer.part" .
mv "$layer.part" "$layer"
