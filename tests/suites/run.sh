#!/usr/bin/env bash
# Real programs and what tests them, in a sandbox: CPython's own tests of what a system gives
# a program, git, a C compiler, PostgreSQL under pgbench, and nginx with 10,000 requests.
#
#   tests/suites/run.sh [python|git|compiler|postgres|nginx]…   all of them if none is named
#
# Emulated, all of them take the better part of an hour. Needs `make build` and root.
set -Eeuo pipefail
export LC_ALL=C WALNUT_NETWORK=none
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

walnut=$PWD/out/bin/walnut
[ -x "$walnut" ] || { echo "suites: run 'make build' first" >&2; exit 1; }
image=walnut-suites:1
layout=$(tests/image/suites.sh | tail -n 1)
"$walnut" load --quiet -i "$layout" --name "$image" >/dev/null

# An init reaps orphans (--init): as the first process, CPython's tests would find them.
#
# Left out, each for what docs/compatibility.md says of an overlay of several file systems:
#   test_attributes   a directory's number in a listing is the one below the overlay
#   test_disk_usage   of a root to which nothing has been written nothing is in use
python=(
    test_asynchat test_asyncore test_dbm test_eintr test_epoll test_fcntl test_fileio test_fork1
    test_ftplib test_getpass test_grp test_httpservers test_import test_largefile test_logging
    test_mailbox test_mmap test_openpty test_os test_pathlib test_pipes test_poll test_popen
    test_poplib test_posix test_posixpath test_pty test_pwd test_queue test_resource test_sched
    test_select test_selectors test_shutil test_signal test_socket test_sqlite3 test_stat
    test_subprocess test_syslog test_tarfile test_tempfile test_thread test_threading
    test_threadsignals test_time test_wait3 test_wait4 test_xmlrpc test_zipfile
)

run() { "$walnut" run --rm --init -m 1g --shm-size 256m -v "$PWD/tests/suites:/suites:ro" "$image" "$@"; }

of_python() {
    run python3 -m test --timeout 1200 -i test_attributes -i test_disk_usage "${python[@]}"
}

of_git() {
    run sh -ec '
        git config --global user.email walnut@localhost
        git config --global user.name Walnut
        git config --global init.defaultBranch main
        git init -q /tmp/a && cd /tmp/a
        for i in $(seq 100); do
            mkdir -p "d$((i % 7))"
            echo "$i" >"d$((i % 7))/f$i"
            git add -A
            git commit -qm "c$i"
        done
        git checkout -q -b side HEAD~20
        echo x >y
        git add y
        git commit -qm side
        git merge -q -m merged main
        git gc -q --prune=now
        git fsck --strict
        git clone -q . /tmp/b
        cd /tmp/b
        test "$(git rev-list --count HEAD)" = 102
        test "$(git ls-files | wc -l)" = 101
        test -z "$(git status --porcelain)"
        git diff --quiet HEAD
    '
}

# A program of 151 files, built by make with four jobs, that checks itself.
of_compiler() {
    run sh -ec '
        mkdir /tmp/p && cd /tmp/p
        {
            echo "#include <stdio.h>"
            for i in $(seq 150); do echo "int f$i(int);"; done
            echo "int main(void) { long s = 0;"
            for i in $(seq 150); do echo "s += f$i($i);"; done
            echo "printf(\"%ld\", s); return s != 2300900; }"
        } >main.c
        for i in $(seq 150); do
            printf "#include <stdlib.h>\n#include <string.h>\nint f%s(int x) { int s = 0; for (int k = 0; k <= x; k++) s += 4 * k + x %% 2; return s; }\n" "$i" >"f$i.c"
        done
        printf "CFLAGS = -O2 -Wall -Werror\nprogram: \$(patsubst %%.c,%%.o,\$(wildcard *.c))\n\tcc -o \$@ \$^\n" >Makefile
        make -s -j4
        ./program
    '
}

of_postgres() {
    run sh -ec '
        mkdir -p /run/postgresql
        chown postgres /run/postgresql
        su postgres -c "
            set -e
            PATH=/usr/lib/postgresql/15/bin:\$PATH
            cd /tmp
            initdb -D /tmp/data >/dev/null
            pg_ctl -D /tmp/data -w -t 600 -l /tmp/log -o \"-h 127.0.0.1\" start >/dev/null
            pgbench -i -q -s 1 postgres
            pgbench -c 4 -j 2 -t 200 postgres
            pgbench -c 4 -j 2 -t 200 -S -C postgres
            pg_ctl -D /tmp/data -m fast stop
        "
    '
}

of_nginx() { run sh -ec 'nginx; python3 /suites/load.py 80'; }

all=(python git compiler postgres nginx)
(($#)) || set -- "${all[@]}"
failed=()
for suite; do
    [[ " ${all[*]} " == *" $suite "* ]] || { echo "suites: no suite $suite; there are: ${all[*]}" >&2; exit 2; }
    echo "==> $suite"
    "of_$suite" || failed+=("$suite ($?)")
done
if ((${#failed[@]})); then
    echo "suites: failed: ${failed[*]}" >&2
    exit 1
fi
echo "==> all suites passed: $*"
