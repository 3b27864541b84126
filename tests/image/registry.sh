#!/usr/bin/env bash
# A real registry on loopback which serves the test images as walnut/demo:latest and
# walnut/programs:latest. IMAGE is `demo` unless another is named.
#
#   tests/image/registry.sh start [IMAGE]   start it if it is not running, push the image if
#                                           it is not there, print the image's reference
#   tests/image/registry.sh url             print HOST:PORT of the running registry
#   tests/image/registry.sh image [IMAGE]   print the image's reference
#   tests/image/registry.sh stop            stop it; what it stores stays
#
# WALNUT_REGISTRY_PORT  the port (default: 5055, or the next free one above it)
# WALNUT_CACHE          its state is in test-registry/ there (default: ~/.cache/walnut)
set -Eeuo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=${WALNUT_CACHE:-$HOME/.cache/walnut}/test-registry
image=${2:-demo}
name=walnut/$image:latest
config=$state/config.yml

say() { printf 'registry: %s\n' "$*" >&2; }
die() { printf 'registry: error: %s\n' "$*" >&2; exit 1; }

# The pid file's process, if it is our registry and not a later process of that number.
running() {
    local pid
    pid=$(cat "$state/pid" 2>/dev/null) || return 1
    [[ $pid =~ ^[0-9]+$ ]] || return 1
    tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qxF "$config" || return 1
    echo "$pid"
}

# One HTTP request to HOST PORT PATH; prints the status line.
status_of() {
    local line
    { exec 3<>"/dev/tcp/$1/$2"; } 2>/dev/null || return 1
    printf 'GET %s HTTP/1.0\r\nHost: %s\r\n\r\n' "$3" "$1" >&3
    IFS= read -r -t 5 line <&3 || line=
    exec 3<&- 3>&-
    printf '%s\n' "$line"
}

free_port() {
    local port
    if [ -n "${WALNUT_REGISTRY_PORT:-}" ]; then
        echo "$WALNUT_REGISTRY_PORT"
        return
    fi
    for port in $(seq 5055 5099); do
        if ! status_of 127.0.0.1 "$port" / >/dev/null; then
            echo "$port"
            return
        fi
    done
    die "no port between 5055 and 5099 is free"
}

launch() {
    local port deadline pid
    port=$(free_port)
    mkdir -p "$state/storage"
    cat >"$config" <<CONFIG
version: 0.1
log:
  level: warn
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: $state/storage
http:
  addr: 127.0.0.1:$port
CONFIG
    # 9 is the lock: the registry must not keep it.
    OTEL_TRACES_EXPORTER=none setsid docker-registry serve "$config" \
        </dev/null >"$state/log" 2>&1 9>&- &
    pid=$!
    echo "$pid" >"$state/pid"
    echo "127.0.0.1:$port" >"$state/address"
    deadline=$((SECONDS + 30))
    until [[ $(status_of 127.0.0.1 "$port" /v2/ || true) == *' 200 '* ]]; do
        if ! kill -0 "$pid" 2>/dev/null; then
            tail -n 5 "$state/log" >&2
            die "docker-registry did not start on port $port; its log is $state/log"
        fi
        [ "$SECONDS" -lt "$deadline" ] || die "docker-registry does not answer; its log is $state/log"
        sleep 0.05
    done
    say "started on 127.0.0.1:$port"
}

digest_of() {
    skopeo --insecure-policy inspect --tls-verify=false --no-tags --format '{{.Digest}}' "$1" 2>/dev/null
}

start() {
    local oci wanted address
    command -v docker-registry >/dev/null || die "docker-registry is missing: apt-get install docker-registry"
    command -v skopeo >/dev/null || die "skopeo is missing: apt-get install skopeo"
    case $image in
        demo) oci=$("$here/build.sh") ;;
        programs) oci=$("$here/programs.sh") ;;
        *) die "there is no image $image: use demo or programs" ;;
    esac
    mkdir -p "$state"
    exec 9>"$state/lock"
    flock 9
    running >/dev/null || launch
    address=$(cat "$state/address")
    wanted=$(digest_of "oci:$oci:latest") || die "$oci is not a readable image"
    if [ "$(digest_of "docker://$address/$name" || true)" != "$wanted" ]; then
        say "pushing $name"
        skopeo --insecure-policy copy --quiet --dest-tls-verify=false \
            "oci:$oci:latest" "docker://$address/$name" || die "the image cannot be pushed"
    fi
    say "serves $address/$name ($wanted)"
    echo "$address/$name"
}

stop() {
    local pid deadline
    if ! pid=$(running); then
        rm -f "$state/pid" "$state/address"
        say "is not running"
        return
    fi
    kill "$pid"
    deadline=$((SECONDS + 10))
    while running >/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || { kill -9 "$pid"; break; }
        sleep 0.05
    done
    rm -f "$state/pid" "$state/address"
    say "stopped"
}

case "${1:-}" in
    start) start ;;
    stop) stop ;;
    url | image)
        running >/dev/null || die "is not running: tests/image/registry.sh start"
        if [ "$1" = url ]; then cat "$state/address"; else echo "$(cat "$state/address")/$name"; fi
        ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
