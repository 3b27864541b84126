#!/usr/bin/env bash
# Builds the sandbox kernel: out/lib/walnut/vmlinux and vmlinux.config.
#
#   guest/kernel/build.sh            build, or take the finished one from the cache
#   guest/kernel/build.sh --config   only make and check the configuration
#
# WALNUT_KERNEL_SOURCE  a kernel tarball or source directory
#                       (default: /usr/src/linux-source-6.1.tar.xz, else the newest there)
# WALNUT_CACHE          where finished kernels are kept (default: ~/.cache/walnut)
# WALNUT_OUT            where the result goes (default: out/ in the checkout)
# WALNUT_JOBS           parallel compilers (default: one per CPU)
# WALNUT_KEEP_BUILD=1   leave the object tree for inspection
#
# The cache's key is a hash of all that decides the result: fragments, patches,
# this script, the source and the compiler. Runs at the same time wait for one another.
set -Eeuo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=${WALNUT_CACHE:-$HOME/.cache/walnut}/kernel
out=${WALNUT_OUT:-$root/out}/lib/walnut
jobs=${WALNUT_JOBS:-$(nproc)}
# A kernel of this configuration compiles about so many objects; for progress only.
expected_objects=1580

say() { printf 'kernel: %s\n' "$*" >&2; }
die() { printf 'kernel: error: %s\n' "$*" >&2; exit 1; }

config_only=no
case "${1:-}" in
    '') ;;
    --config) config_only=yes ;;
    *) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac

# ---------------------------------------------------------------- what is needed

need() { command -v "$1" >/dev/null || missing+=("$2"); }
missing=()
need gcc gcc; need make make; need flex flex; need bison bison; need bc bc; need xz xz-utils
need flock util-linux; need objcopy binutils; need perl perl; need patch patch
[ -e /usr/include/gelf.h ] || missing+=(libelf-dev)
[ ${#missing[@]} = 0 ] || die "these packages are missing: apt-get install ${missing[*]}"

find_source() {
    local found
    if [ -n "${WALNUT_KERNEL_SOURCE:-}" ]; then
        [ -e "$WALNUT_KERNEL_SOURCE" ] || die "WALNUT_KERNEL_SOURCE=$WALNUT_KERNEL_SOURCE does not exist"
        realpath "$WALNUT_KERNEL_SOURCE"
        return
    fi
    for found in /usr/src/linux-source-6.1.tar.xz /usr/src/linux-source-6.1; do
        [ -e "$found" ] && { echo "$found"; return; }
    done
    found=$(find /usr/src -maxdepth 1 -name 'linux-source-*.tar.xz' | sort -V | tail -n1)
    [ -n "$found" ] || die "no kernel source in /usr/src: apt-get install linux-source"
    echo "$found"
}
source=$(find_source)

# A tarball is known by its SHA-256; it is read again only when size or time changed.
# A directory is known by the names, sizes and times of its files.
source_identity() {
    if [ -d "$source" ]; then
        (cd "$source" && find . -type f -printf '%P %s %T@\n' | sort | sha256sum | cut -c1-64)
        return
    fi
    local key memo
    key=$(stat -Lc '%n %s %Y %i' "$source" | sha256sum | cut -c1-16)
    memo=$cache/sources/$key
    if [ ! -s "$memo" ]; then
        mkdir -p "$cache/sources"
        sha256sum <"$source" | cut -c1-64 >"$memo.$$"
        mv "$memo.$$" "$memo"
    fi
    cat "$memo"
}

# The series ("6.1") decides which of versions/ and patches/ apply. Debian's tarballs
# carry it in their name, a directory in its Makefile.
source_series() {
    local name
    if [ -d "$source" ]; then
        awk -F'= *' '/^VERSION/{v=$2} /^PATCHLEVEL/{print v "." $2; exit}' "$source/Makefile"
        return
    fi
    name=$(basename "$source")
    [[ $name =~ ^linux-(source-)?([0-9]+\.[0-9]+) ]] || die "cannot tell the version of $source by its name"
    echo "${BASH_REMATCH[2]}"
}
series=$(source_series)
[ -e "$here/versions/$series.config" ] ||
    die "Linux $series is not supported; supported: $(cd "$here/versions" && echo *.config | sed 's/\.config//g')"

fragments=("$here"/config.d/*.config "$here/versions/$series.config")
patches=()
[ -d "$here/patches/$series" ] && patches=("$here/patches/$series"/*.patch)

mkdir -p "$cache" "$out"
identity=$(source_identity)
hash=$(
    {
        echo "$series $identity"
        gcc --version | head -n1
        ld --version | head -n1
        cat "${fragments[@]}" "${patches[@]}" "${BASH_SOURCE[0]}"
    } | sha256sum | cut -c1-32
)
entry=$cache/$hash

# ---------------------------------------------------------------- the result

publish() {
    local file
    for file in vmlinux vmlinux.config; do
        cmp -s "$entry/$file" "$out/$file" && continue
        cp "$entry/$file" "$out/.$file.$$"
        mv "$out/.$file.$$" "$out/$file"
    done
    say "$(cat "$entry/release") is ready: $out/vmlinux ($(($(stat -c %s "$entry/vmlinux") / 1000000)) MB)"
}

if [ $config_only = no ] && [ -e "$entry/vmlinux" ]; then
    publish
    exit 0
fi

exec 9>"$cache/lock"
if ! flock -n 9; then
    say "another build is running; waiting for it"
    flock 9
fi
if [ $config_only = no ] && [ -e "$entry/vmlinux" ]; then
    publish
    exit 0
fi

# The lock is ours, so what other builds left behind belongs to nobody.
rm -rf "$cache"/.build-*
work=$(mktemp -d "$cache/.build-XXXXXX")
log=$cache/$hash.log
pid=
finish() {
    local code=$?
    trap - EXIT
    if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        kill -- "-$pid" 2>/dev/null || kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    fi
    if [ "${WALNUT_KEEP_BUILD:-}" = 1 ]; then say "object tree kept: $work"; else rm -rf "$work"; fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

failed() {
    printf '\n' >&2
    grep -nE '(error|Error|undefined reference|No such file)' "$log" | head -n 10 >&2 || true
    printf -- '--- last lines of %s\n' "$log" >&2
    tail -n 20 "$log" >&2
    die "$1; the whole log is $log"
}

# ---------------------------------------------------------------- source and configuration

tree=$work/linux
mkdir "$tree"
: >"$log"
say "Linux $series: unpacking $source"
if [ -d "$source" ]; then
    cp -a "$source/." "$tree/"
    make -s -C "$tree" mrproper >>"$log" 2>&1 || failed "the source directory cannot be cleaned"
else
    # Half of the tarball is for other machines. Kconfig files stay: they are all read.
    tar -xf "$source" -C "$tree" --strip-components=1 \
        --exclude='*/arch/[abcd-wyz]*/*.[chSs]' --exclude='*/arch/[abcd-wyz]*/*.dts*' \
        --exclude='*/drivers/gpu/*.[ch]' --exclude='*/drivers/media/*.[ch]' \
        --exclude='*/sound/*.[ch]' --exclude='*/Documentation/*.rst' --exclude='*/Documentation/*.yaml' \
        2>>"$log" || failed "$source cannot be unpacked"
fi
for patch in "${patches[@]}"; do
    patch -d "$tree" -p1 -s --no-backup-if-mismatch <"$patch" >>"$log" 2>&1 || failed "$(basename "$patch") does not apply"
done

doubles=$(sed -n 's/^\(CONFIG_[A-Z0-9_a-z]*\)=.*/\1/p' "${fragments[@]}" | sort | uniq -d)
[ -z "$doubles" ] || die "asked for more than once: $doubles"
cat "${fragments[@]}" >"$work/wanted"

# Same bits from the same input, wherever and whenever.
export KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970' KBUILD_BUILD_USER=walnut KBUILD_BUILD_HOST=walnut
export KBUILD_BUILD_VERSION=1 ARCH=x86_64
unset MAKEFLAGS MAKELEVEL CROSS_COMPILE KCFLAGS

make -s -C "$tree" KCONFIG_ALLCONFIG="$work/wanted" allnoconfig >>"$log" 2>&1 || failed "the configuration failed"

# Kconfig drops what it cannot satisfy without a word, so every wish is compared.
find "$tree" -name 'Kconfig*' -type f -print0 | xargs -0 cat |
    sed -nE 's/^[[:space:]]*(menu)?config[[:space:]]+([A-Za-z0-9_]+).*/CONFIG_\2/p' | sort -u >"$work/known"
awk -v known="$work/known" -v final="$tree/.config" '
    BEGIN {
        while ((getline line < known) > 0) exists[line] = 1
        while ((getline line < final) > 0)
            if (line ~ /^CONFIG_/) { i = index(line, "="); got[substr(line, 1, i - 1)] = substr(line, i + 1) }
    }
    /^CONFIG_/ {
        i = index($0, "="); name = substr($0, 1, i - 1); want = substr($0, i + 1)
        have = (name in got) ? got[name] : "n"
        if (!(name in exists)) print "  " name ": unknown to this kernel"
        else if (have != want) print "  " name ": wanted " want ", got " have
    }' "$work/wanted" >"$work/unmet"
if [ -s "$work/unmet" ]; then
    cat "$work/unmet" >&2
    die "Linux $series does not give what the fragments ask for (above)"
fi
say "configuration: $(grep -c '^CONFIG_' "$work/wanted") options asked for, all present"
if [ $config_only = yes ]; then
    rm -f "$log"
    exit 0
fi

# ---------------------------------------------------------------- compile

say "compiling with $jobs jobs (some minutes; once per configuration)"
started=$SECONDS
set -m
make -C "$tree" -j"$jobs" vmlinux >>"$log" 2>&1 &
pid=$!
set +m
announced=0
while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    elapsed=$((SECONDS - started))
    if [ -t 2 ] || [ $((elapsed - announced)) -ge 30 ]; then
        done_objects=$(grep -cE '^  (CC|AS) ' "$log" || true)
        total=/$expected_objects
        [ "$done_objects" -le $expected_objects ] || total=
        if [ -t 2 ]; then
            printf '\r\033[Kkernel: compiling %s%s objects, %d s' "$done_objects" "$total" "$elapsed" >&2
        else
            announced=$elapsed
            say "compiling $done_objects$total objects, $elapsed s"
        fi
    fi
done
if [ -t 2 ]; then printf '\r\033[K' >&2; fi
wait "$pid" || { pid=; failed "the kernel did not compile"; }
pid=

mkdir "$work/entry"
objcopy -S --remove-section=.comment "$tree/vmlinux" "$work/entry/vmlinux"
cp "$tree/.config" "$work/entry/vmlinux.config"
cp "$tree/System.map" "$work/entry/System.map"
cat "$tree/include/config/kernel.release" >"$work/entry/release"
# The PVH entry point (Xen note 0x12) is how every VMM of ours starts this file.
readelf -n "$work/entry/vmlinux" 2>/dev/null | grep -q '0x00000012' || failed "the kernel has no PVH entry"
rm -rf "$entry"
mv -T "$work/entry" "$entry"
rm -f "$log"
say "compiled in $((SECONDS - started)) s"
publish
