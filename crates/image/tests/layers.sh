#!/bin/sh
# Makes three layers that hold every kind of thing a layer may hold, as tars
# in the current directory. Needs root (owners, devices), tar, attr, busybox-static.
set -eu
mkdir a b c

# The base, as PAX.
mkdir -p a/usr/bin a/etc a/dev a/tmp a/var/lib/old/deep a/many a/wasdir a/gone 'a/!bang' a/-dash a/.hidden
cp /bin/busybox a/usr/bin/busybox
ln a/usr/bin/busybox a/usr/bin/sh
ln -s usr/bin a/bin
chmod 4755 a/usr/bin/busybox
chmod 1777 a/tmp
chmod 2750 a/var/lib
echo secret >a/etc/secret
echo keep >a/etc/keep
echo low >a/etc/low
ln a/etc/low a/etc/low2
ln -s keep a/etc/link
ln a/etc/link a/etc/link2
chown -h 7:8 a/etc/link
chown 1000:2000 a/etc/keep
chown 4000000:3000000 a/etc/low
mknod a/dev/null c 1 3
mknod a/dev/big b 259 74565
mkfifo -m 600 a/dev/fifo
head -c 5000000 /dev/urandom >a/var/lib/old/data
echo x >a/var/lib/old/deep/x
for size in 0 1 3999 4031 4032 4033 4095 4096 4097 8191 8192 8193 100000; do
    head -c "$size" /dev/urandom >"a/etc/size-$size"
done
touch -d '2001-02-03 04:05:06.123456789' a/etc/keep
touch -d '1960-01-01 00:00:00.5' a/etc/size-1
touch -d '2100-01-01 00:00:00' a/etc/size-4096
touch -h -d '1999-12-31 23:59:59.999999999' a/etc/link
setfattr -n user.color -v blue a/etc/keep
setfattr -n user.empty a/etc/keep
setfattr -n trusted.walnut -v x a/etc/keep
setfattr -n user.dir -v d a/many
setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' z)" a/etc/size-8193
setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' z)" a/etc/size-3999
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 a/usr/bin/busybox
i=0
while [ $i -lt 1500 ]; do
    i=$((i + 1))
    echo $i >"a/many/file-with-a-longer-name-$i"
done
long=$(printf 'n%.0s' $(seq 1 250))
echo long >"a/many/$long"
ln -s "$long/$long/$long" a/many/longlink
deep=a
for i in 1 2 3 4 5; do
    deep="$deep/$(printf "d$i%.0s" $(seq 1 60))"
done
mkdir -p "$deep"
echo deep >"$deep/file"
echo x >a/wasdir/f
echo y >a/wasfile
echo z >a/gone/z
tar --format=posix --xattrs --xattrs-include='*' --numeric-owner --sort=name -C a -cf 1.tar .

# Over it, as GNU with sparse files: whiteouts, replacements, links across layers.
mkdir -p b/etc b/var/lib/old b/wasfile b/many
: >b/etc/.wh.secret
: >b/.wh.gone
: >b/var/lib/old/.wh..wh..opq
echo new >b/var/lib/old/new
echo now-a-file >b/wasdir
echo inside >b/wasfile/inside
echo over >b/etc/low
truncate -s 10M b/sparse
echo mid | dd of=b/sparse bs=1 seek=5000000 conv=notrunc status=none
truncate -s 9000 b/hole
i=0
truncate -s 4M b/islands
while [ $i -lt 40 ]; do
    i=$((i + 1))
    echo $i | dd of=b/islands bs=1 seek=$((i * 100000)) conv=notrunc status=none
done
: >"b/many/.wh.file-with-a-longer-name-7"
find b -exec touch -h -d '2010-01-01' {} +

tar --format=gnu -S --numeric-owner --sort=name -C b -cf 2.tar .
# umoci, the reference, knows no sparse files: the same without.
tar --format=posix --numeric-owner --sort=name -C b -cf plain2.tar .

# And over that, PAX sparse files, and a path that leads through a symlink.
mkdir -p c/bin c/etc
echo '#!/bin/sh' >c/bin/tool
truncate -s 3M c/etc/pax-sparse
echo end >>c/etc/pax-sparse
tar --format=posix -S --sparse-version=1.0 --numeric-owner -C c -cf 3.tar bin/tool etc/pax-sparse
tar --format=posix --numeric-owner -C c -cf plain3.tar bin/tool etc/pax-sparse
