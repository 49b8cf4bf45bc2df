#!/usr/bin/env bash
# A Docker engine for the tests, with everything it has under DIR: docker_engine.sh DIR
#
# Its API is on DIR/docker.sock, its configuration in DIR/daemon.json if there is one. It runs until its standard input
# closes, so also when the program that started it is killed, and needs no network but the namespace it is started in. Its
# mounts and processes are in namespaces of their own and cannot outlive it; this machine's own Docker, if there is one,
# neither sees it nor is seen by it.
set -euo pipefail
directory=$1

if [ "${2:-}" != --inside ]; then
    exec unshare --mount --propagation private --pid --mount-proc --fork --kill-child -- "$0" "$directory" --inside
fi

mount -t tmpfs tmpfs /run           # containerd's shims have their sockets in /run/containerd, wherever its state is
if [ -d /etc/docker ]; then
    mount -t tmpfs tmpfs /etc/docker    # key.json is written there, wherever the configuration is
fi
cri='"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"'
printf 'version = 2\ndisabled_plugins = [%s]\n' "$cri" >"$directory/containerd.toml"
[ -e "$directory/daemon.json" ] || echo '{}' >"$directory/daemon.json"

containerd --config "$directory/containerd.toml" --root "$directory/containerd" --state "$directory/containerd-state" \
    --address "$directory/containerd.sock" </dev/null >"$directory/containerd.log" 2>&1 &
containerd=$!
for _ in {1..100}; do
    [ -S "$directory/containerd.sock" ] && break
    kill -0 "$containerd"
    sleep 0.1
done
dockerd --config-file "$directory/daemon.json" --data-root "$directory/data" --exec-root "$directory/exec" \
    --pidfile "$directory/docker.pid" --host "unix://$directory/docker.sock" \
    --containerd "$directory/containerd.sock" --cgroup-parent "/$(basename "$directory")" \
    --iptables=false --ip6tables=false --ip-forward=false --bridge=none </dev/null >"$directory/dockerd.log" 2>&1 &
dockerd=$!
cat <&0 >/dev/null &
wait -n || true                     # standard input closed, or an engine that did not stay up
kill "$dockerd" 2>/dev/null || true
wait "$dockerd" || true
kill "$containerd" 2>/dev/null || true
wait "$containerd" || true
find /sys/fs/cgroup -depth -type d -path "*/$(basename "$directory")*" -exec rmdir {} + || true
