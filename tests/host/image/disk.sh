#!/bin/bash
# Put packages, kernel modules, our own files and the test images onto one ext4 disk, and make the
# initramfs that mounts it. No loop device and no mount: mke2fs copies a directory.
# Inputs: ROOTFS (tar), KERNEL (directory), GUEST (our files), LEAKS (script), IMAGES and TOOLS (directories), SIZE, OUT.
set -euo pipefail

root=$OUT/root
mkdir "$root"
tar -C "$root" -xpf "$ROOTFS" --numeric-owner
mkdir -p "$root/usr/lib/modules"
cp -a "$KERNEL"/modules/* "$root/usr/lib/modules/"
version=$(basename "$KERNEL"/modules/*)
chroot "$root" depmod "$version"

# Our own files, owned by root whoever owns the checkout.
for tree in "$GUEST" "$TOOLS"; do
    tar -C "$tree" --owner=0 --group=0 --numeric-owner -cf - . | tar -C "$root" -xpf - --no-overwrite-dir --keep-directory-symlink
done
install -m 755 "$LEAKS" "$root/usr/local/sbin/leaks"
# containerd reads config.toml; use-containerd makes it lead to the configuration of the version it starts.
for containerd in 2.1 2.3; do
    cat "$root/usr/lib/testhost/containerd/"{common,$containerd}.toml > "$root/etc/containerd/config-$containerd.toml"
done
sed "/snapshotter.v1.erofs/a default_size = '256MiB'" "$root/etc/containerd/config-2.3.toml" > "$root/etc/containerd/config-2.3-rwlayer.toml"
ln -sfn config-2.1.toml "$root/etc/containerd/config.toml"
echo testhost > "$root/etc/hostname"
printf '127.0.0.1 localhost testhost\n' > "$root/etc/hosts"
echo 0123456789abcdef0123456789abcdef > "$root/etc/machine-id"
rm -f "$root/etc/resolv.conf"
: > "$root/etc/resolv.conf"
mkdir -p "$root/var/lib/kata-rs-test/images"
cp -a "$IMAGES"/. "$root/var/lib/kata-rs-test/images/"
rm -f "$root/var/lib/kata-rs-test/images/"{build-id,log}
mv "$root/var/lib/kata-rs-test/images/registry" "$root/var/lib/kata-rs-test/registry"

# The blockfile snapshotter copies this file for every snapshot.
truncate -s 64M "$root/var/lib/containerd-blockfile-scratch"
mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1 "$root/var/lib/containerd-blockfile-scratch"

# The disk's driver is a module; everything else on the way to the root file system is built in.
initrd=$OUT/initrd-root
mkdir -p "$initrd"/{bin,dev,proc,newroot}
cp "$root/usr/bin/busybox" "$initrd/bin/busybox"
cp "$root/usr/lib/modules/$version/kernel/drivers/block/virtio_blk.ko" "$initrd/"
install -m 755 "$root/usr/lib/testhost/initramfs-init" "$initrd/init"
(cd "$initrd" && find . | cpio -o -H newc --quiet) > "$OUT/initrd"

truncate -s "$SIZE" "$OUT/disk.raw"
mke2fs -q -t ext4 -F -m 0 -O ^resize_inode -E lazy_itable_init=1,lazy_journal_init=1 -L testhost -d "$root" "$OUT/disk.raw"
rm -rf "$root" "$initrd"
