#!/usr/bin/env bash
# Walnut's main job on a real image: a Debian with python3, nginx and redis,
# from a real registry on loopback, run with a kernel of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

walnut=$PWD/out/bin/walnut
step() { printf '\n==> %s\n' "$*"; }
show() { printf '    $ walnut %s\n' "$*"; }

step "the image, and a registry that serves it"
ours=yes
tests/image/registry.sh url >/dev/null 2>&1 && ours=
image=$(tests/image/registry.sh start | tail -n 1)
web=
leave() {
    [[ -z $web ]] || "$walnut" rm -f "$web" >/dev/null 2>&1 || true
    [[ -z $ours ]] || tests/image/registry.sh stop >/dev/null
}
trap leave EXIT

step "this host"
show check
"$walnut" check

step "pull"
show "pull $image"
"$walnut" pull "$image"

step "compute"
show "run --rm $image python3 -c …"
"$walnut" run --rm "$image" python3 -c 'print("2**100 =", 2**100)'

step "serve"
show "run -d $image nginx -g 'daemon off;'"
web=$("$walnut" run -d "$image" nginx -g 'daemon off;')
show "exec ${web:0:12} python3 -c …"
"$walnut" exec "$web" python3 -c '
import time, urllib.request
for attempt in range(100):
    try:
        print(urllib.request.urlopen("http://127.0.0.1/").read().decode().strip())
        break
    except OSError:
        time.sleep(0.1)
else:
    raise SystemExit("nginx did not answer")
'
show ps
"$walnut" ps
show "stop ${web:0:12}"
"$walnut" stop "$web" >/dev/null
"$walnut" rm "$web" >/dev/null
web=

step "a database, measured by its own tool"
show "run --rm $image sh -c 'redis-server …; redis-benchmark …'"
"$walnut" run --rm "$image" sh -c '
redis-server --save "" --daemonize yes >/dev/null
until redis-cli ping >/dev/null 2>&1; do sleep 0.1; done
redis-benchmark --csv -t set,get -n 2000'

step "one kernel each"
guest=$("$walnut" run --rm "$image" uname -r)
printf '    host   %s\n    guest  %s\n' "$(uname -r)" "$guest"
if [[ $guest == "$(uname -r)" ]]; then
    echo "the guest runs the host's kernel" >&2
    exit 1
fi
printf '\nThe demo worked. Next: out/bin/walnut run --rm -it %s bash\n' "$image"
