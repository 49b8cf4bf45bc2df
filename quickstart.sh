#!/usr/bin/env bash
# See a function answer: ./quickstart.sh [--runtime crun] [--subnet 10.0.0.0/24] [other options of faasd.py --help]
#
# Starts faasd, deploys test_handler.py as the function `test-handler`, calls it five times and leaves it running until
# Ctrl-C; then it removes everything again, but for the packages that it had to install (runc or
# what --runtime names, iproute2, curl) and, where Docker made it, the image test-handler.
# The image comes from Docker where its daemon answers, else from `./faas pack`, which needs no Docker.
# --state-dir and --run-dir (or FAASD_STATE_DIR and FAASD_RUN_DIR) change the directories, by default /var/lib/faasd and
# /run/faasd.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
PATH=$PATH:/usr/sbin:/sbin       # su and cron may leave them out

case " $* " in *" -h "* | *" --help "*)
    sed -n '2,/^set /s/^# \{0,1\}//p' quickstart.sh
    exit ;;
esac

bold='' plain=''
if [ -t 1 ]; then
    bold=$'\033[1m' plain=$'\033[0m'
fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
die() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "faasd starts containers, which takes root; run this as root"
    echo "faasd needs root to start containers: going on with sudo."
    exec sudo --preserve-env=FAASD_STATE_DIR,FAASD_RUN_DIR,DOCKER_HOST -- "./$(basename "$0")" "$@"
fi

python=
for candidate in python3 /usr/bin/python3 python3.{11..19}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || die "faasd needs Python 3.11 or newer; found: $(python3 --version 2>&1 || true)"
faas() { "$python" ./faas --socket "$run/faasd.sock" "$@"; }

# The value that an option has among ours, or else its default.
option() {
    local name=$1 value=$2 previous=
    for argument in "${arguments[@]}"; do
        [ "$previous" != "$name" ] || value=$argument
        [[ $argument != "$name"=* ]] || value=${argument#*=}
        previous=$argument
    done
    echo "$value"
}
arguments=("$@")

runtime=$(option --runtime runc)
state=$(option --state-dir "${FAASD_STATE_DIR:-/var/lib/faasd}")
run=$(option --run-dir "${FAASD_RUN_DIR:-/run/faasd}")
needs=(ip:iproute2 curl:curl)
[[ $runtime == */* ]] || needs=("$runtime:$runtime" "${needs[@]}")      # of a path, faasd.py says if nothing is there
missing=()
for need in "${needs[@]}"; do
    command -v "${need%:*}" >/dev/null || missing+=("${need#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || die "please install first: ${missing[*]}"
    say "Installing with apt-get: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq </dev/null || echo "apt-get update failed; going on with the lists that are there"
    apt-get install -qq -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
fi

if faas version >/dev/null 2>&1; then
    die "a faasd is already running on $run/faasd.sock; use it: docker save IMAGE | ./faas new NAME"
fi

temporary=$(mktemp -d)
daemon= built=
new_directories=()
for directory in "$state" "$run"; do
    [ -e "$directory" ] || new_directories+=("$directory")
done

# shellcheck disable=SC2317  # called by the trap
cleanup() {
    local status=$?
    trap '' INT TERM
    if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
        say "Stopping"
        [ -z "${deployed:-}" ] || faas rm test-handler || true
        kill "$daemon"
        wait "$daemon" || echo "faasd ended with status $?:" "$(tail -n 5 "$temporary/faasd.log")"
    fi
    rm -rf --one-file-system "$temporary" "${new_directories[@]}"
    [ -z "$daemon" ] || echo "Nothing of it is left${missing[*]:+, but the packages installed above}."
    [ -z "$built" ] || echo "Docker keeps the image test-handler and what it was built from: docker rmi test-handler"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 0' INT TERM          # Ctrl-C is how it is meant to end

say "Starting faasd.py"
# A session of its own, so that Ctrl-C reaches only this script, which then stops it in order.
setsid "$python" ./faasd.py "$@" --state-dir "$state" --run-dir "$run" </dev/null >"$temporary/faasd.log" 2>&1 &
daemon=$!
deadline=$((SECONDS + 30))
until faas version >"$temporary/version" 2>/dev/null; do
    kill -0 "$daemon" 2>/dev/null || { cat "$temporary/faasd.log" >&2; daemon=; exit 1; }
    [ "$SECONDS" -lt "$deadline" ] ||
        die "faasd does not answer on $run/faasd.sock; its last lines: $(tail -n 5 "$temporary/faasd.log")"
    sleep 0.1
done
cat "$temporary/version"
grep -i warn "$temporary/faasd.log" || true
! faas ip test-handler >/dev/null 2>&1 || die "there is a function test-handler already; it is left alone"

image=$temporary/image.tar
packer="./faas pack test_handler.py > image.tar"
if docker version >/dev/null 2>&1; then
    say "docker build -f Dockerfile.test-handler -t test-handler . && docker save test-handler > image.tar"
    if ! { docker build -f Dockerfile.test-handler -t test-handler . && built=yes &&
        docker save test-handler >"$image"; }; then
        rm -f "$image"
        say "Docker could not do it. Without Docker: $packer"
    fi
else
    say "Docker does not answer. Without Docker: $packer"
fi
[ -e "$image" ] || faas pack test_handler.py >"$image"

say "./faas new test-handler < image.tar"
faas new test-handler <"$image"
deployed=yes
rm "$image"

url=$(faas url test-handler)/
say "curl $url"
for request in 1 2 3 4 5; do
    seconds=$(curl -sS --max-time 30 -o "$temporary/answer" -w '%{time_total}' "$url")
    [ "$request" -gt 1 ] || cat "$temporary/answer"
    echo "$seconds" | awk -v request="$request" '{printf "request %d: %.1f ms, in a container of its own\n", request, $1 * 1000}'
done

echo "A request takes the one container that waits, and faasd starts another. The next request comes before that one is"
echo "ready, and has to wait for it. Under load, or with --warm 8, more containers wait for clients."

socket=
[ "$run" = /run/faasd ] || socket=" --socket $run/faasd.sock"
say "It is running. In another terminal, try:"
cat <<TRY
    curl $url
    ./faas$socket list
    ./faas$socket logs test-handler
    docker save IMAGE | ./faas$socket new NAME
TRY
say "Ctrl-C stops it and cleans up."
wait "$daemon" || true
cat "$temporary/faasd.log" >&2
die "faasd has ended by itself"
