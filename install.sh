#!/usr/bin/env bash
# Install faasd on a system without dpkg, or take it away: sudo ./install.sh [--uninstall]
#
# What the Debian package does (packaging/build-deb), with the programs in /usr/local: service, /etc/default/faasd, the
# group `faas`, AppArmor profile where there is AppArmor, manual pages, completions. Run it again to upgrade: what
# serves clients goes on. --uninstall stops the daemon and leaves functions and options; --purge removes these too.
set -euo pipefail
top=$(dirname "$(readlink -f "$0")")
umask 022
unit=/etc/systemd/system/faasd.service list=/usr/local/share/faasd.files
die() { printf 'install.sh: %s\n' "$*" >&2; exit 2; }

[ "$(id -u)" -eq 0 ] || die "this installs for all users, which takes root: sudo ./install.sh"
[ ! -e /usr/sbin/faasd ] || die "faasd is installed as a package, which does the same: apt purge faasd first"

running_systemd() { [ -d /run/systemd/system ]; }
has_apparmor() {
    [ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ] && command -v apparmor_parser >/dev/null
}

install_all() {
    local python='' candidate program work=$1 missing=() fresh=yes
    for candidate in /usr/bin/python3 python3 python3.{11..19}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$(command -v "$candidate")
            break
        fi
    done
    [ -n "$python" ] || die "faasd needs Python 3.11 or newer"
    # shellcheck source=packaging/stage
    . "$top/packaging/stage"
    stage "$work/root" /usr/local "$work/made"
    install -d "$work/root/etc/systemd/system"
    sed "s|/usr/bin/python3 /usr/sbin/|$python /usr/local/sbin/|" "$top/packaging/faasd.service" >"$work/root$unit"
    [ ! -e "$unit" ] || fresh=
    [ ! -e /etc/default/faasd ] || rm "$work/root/etc/default/faasd"        # the operator's
    # What --uninstall removes: our files, and the directories that were not there before.
    {
        (cd "$work/root" && find . -type f | sed 's/^\.//' | grep -v '^/etc/default/')
        (cd "$work/root" && find . -type d) | while read -r directory; do
            [ -d "/$directory" ] || echo "${directory#.}/"
        done
        [ ! -e "$list" ] || grep '/$' "$list" || true
    } | sort -u >"$work/files"
    (cd "$work/root" && find . -type f -print0) | while IFS= read -r -d '' file; do
        # A running program, or a shell, keeps the file that it has open.
        install -D -m "$(stat -c %a "$work/root/$file")" "$work/root/$file" "/$file.new"
        mv "/$file.new" "/$file"
    done
    install -m 644 "$work/files" "$list"
    if ! getent group faas >/dev/null; then
        groupadd --system faas
        install -d -m 711 /var/lib/faasd
        touch /var/lib/faasd/group-made
    fi
    ! has_apparmor || apparmor_parser --replace --skip-read-cache --write-cache /etc/apparmor.d/faasd-default
    for program in runc ip; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -eq 0 ] || echo "Before it can run, install: ${missing[*]/ip/iproute2}"
    if running_systemd; then
        systemctl daemon-reload
        [ -z "$fresh" ] || systemctl enable --quiet faasd
        systemctl restart faasd || die "faasd did not start: see journalctl -u faasd"
    fi
    echo "Installed faasd $version. To let a user use it without sudo: sudo usermod -aG faas USER"
}

uninstall() {
    [ -e "$list" ] || die "install.sh has not installed anything here"
    if running_systemd; then
        systemctl disable --quiet --now faasd || true
    fi
    # A daemon that was killed has left containers. The next one takes them over, and when it stops nothing is left.
    if [ -d /run/faasd/containers ] && flock --nonblock /run/faasd/faasd.lock true; then
        rm -f /run/faasd/faasd.sock
        # As systemd reads it, which knows no shell: nor does a file of root's that is named 1:9000 match [::1]:9000.
        read -ra options < <(sed -n 's/^FAASD_OPTIONS=["'"'"']\{0,1\}\([^"'"'"']*\)["'"'"']\{0,1\}$/\1/p' /etc/default/faasd \
            2>/dev/null | tail -n 1) || true
        /usr/local/sbin/faasd "${options[@]}" --state-dir /var/lib/faasd --run-dir /run/faasd &
        while [ ! -e /run/faasd/faasd.sock ] && kill -0 $! 2>/dev/null; do
            sleep 0.1
        done
        kill $! 2>/dev/null || true
        wait $! || true
    fi
    if grep -q '^faasd-default ' /sys/kernel/security/apparmor/profiles 2>/dev/null; then
        apparmor_parser --remove /etc/apparmor.d/faasd-default || true
    fi
    rm -f /var/cache/apparmor/*/faasd-default           # as compiled, at each boot too
    grep -v '/$' "$list" | xargs -d '\n' rm -f
    grep '/$' "$list" | sort -r | xargs -r -d '\n' rmdir --ignore-fail-on-non-empty 2>/dev/null || true
    rm -f "$list"
    ! running_systemd || systemctl daemon-reload
    if [ "$1" != --purge ]; then
        echo "Removed faasd, but not the functions in /var/lib/faasd and the options in /etc/default/faasd (--purge does)."
        return
    fi
    for lock in /run/faasd/faasd.lock /var/lib/faasd/faasd.lock; do         # a daemon may have but one of them
        if [ -e "$lock" ] && ! flock --nonblock "$lock" true; then
            die "faasd still runs, so /var/lib/faasd and /run/faasd are left: stop it and remove them"
        fi
    done
    [ ! -e /var/lib/faasd/group-made ] || groupdel faas || true
    rm -rf --one-file-system /var/lib/faasd /run/faasd /etc/default/faasd
    echo "Removed faasd and all its functions."
}

case ${1:-} in
    '')
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        install_all "$work" ;;
    --uninstall | --purge) uninstall "$1" ;;
    *) die "usage: sudo ./install.sh [--uninstall | --purge]" ;;
esac
