#!/bin/sh
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Make a bootable disk from a root file system tar. Called by lab/image.py, in a mount namespace and a process
# namespace of its own: whatever way this ends, its mounts end with it, and the loop device with the mounts.
#
# usage: make-image.sh ROOTFS_TAR RAW_DISK SIZE_GIB OVERLAY_DIRECTORY
# The overlay directory holds the files that lab/image.py generates (keys, network, GRUB); they are copied over the
# root file system before the packages are installed.

set -eu

tar_file=$1
disk=$2
size_gib=$3
overlay=$4

export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C DEBIAN_FRONTEND=noninteractive

root=$(dirname "$disk")/root
mkdir -p "$root"

# One partition for GRUB's core image (BIOS), one for UEFI, one for everything.
truncate -s "${size_gib}G" "$disk"
sfdisk --quiet "$disk" <<TABLE
label: gpt
size=1MiB, type=21686148-6449-6E6F-744E-656564454649, name=bios
size=16MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=efi
type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=root
TABLE

loop=$(losetup --find --show --partscan "$disk")
detach() {
    umount --recursive "$root" 2>/dev/null || true
    losetup --detach "$loop" 2>/dev/null || true
}
trap detach EXIT
# A kernel without a parser for this table takes the partitions from here; --partscan still drops them at the end.
[ -e "/sys/class/block/${loop#/dev/}p1" ] || partx --add "$loop"

# The device nodes come from the kernel's own numbers, in a file system of our own: nothing here waits for udev, and
# GRUB finds the file system under /dev/disk/by-uuid, without which it writes the loop device into its configuration.
name=${loop#/dev/}
nodes=$(dirname "$disk")/nodes
mkdir -p "$nodes"
mount -t tmpfs -o mode=0755 nodes "$nodes"
for device in "$name" "${name}p1" "${name}p2" "${name}p3"; do
    tries=0
    until numbers=$(tr : ' ' <"/sys/class/block/$device/dev"); do
        tries=$((tries + 1))
        if [ "$tries" -gt 50 ]; then
            echo "partition $device does not appear" >&2
            exit 1
        fi
        sleep 0.1
    done
    # shellcheck disable=SC2086 # major and minor are two words
    mknod "$nodes/$device" b $numbers
done
for node in null zero full random urandom tty loop-control; do
    cp --archive "/dev/$node" "$nodes/$node"
done
ln -s /proc/self/fd "$nodes/fd"
mkdir -p "$nodes/pts" "$nodes/shm" "$nodes/disk/by-uuid"
mount --bind "$nodes" /dev

mkfs.ext4 -q -L root -E lazy_itable_init=1,lazy_journal_init=1 -O ^metadata_csum_seed "/dev/${name}p3"
mkfs.vfat -F 12 -n EFI "/dev/${name}p2" >/dev/null
root_uuid=$(blkid -s UUID -o value "/dev/${name}p3")
efi_uuid=$(blkid -s UUID -o value "/dev/${name}p2")
ln -s "../../${name}p3" "/dev/disk/by-uuid/$root_uuid"
ln -s "../../${name}p2" "/dev/disk/by-uuid/$efi_uuid"

mount "/dev/${name}p3" "$root"
# Detaches by itself when the last mount goes, so also when this script is killed.
losetup --detach "$loop"

tar --extract --file="$tar_file" --directory="$root" --numeric-owner --xattrs --xattrs-include='*'
mkdir -p "$root/boot/efi"

mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"

cp --recursive --no-dereference --preserve=mode,links "$overlay/." "$root/"
printf 'UUID=%s / ext4 errors=remount-ro 0 1\nUUID=%s /boot/efi vfat umask=0077,noauto 0 2\n' \
    "$root_uuid" "$efi_uuid" >"$root/etc/fstab"

rm -f "$root/etc/resolv.conf"
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
chroot "$root" apt-get -q -o Acquire::Retries=3 update
chroot "$root" apt-get -q -y --no-install-recommends -o Dpkg::Options::=--force-unsafe-io \
    -o Dpkg::Options::=--force-confold \
    install initramfs-tools linux-image-cloud-amd64 grub-pc grub-efi-amd64-bin python3-apt
chroot "$root" apt-get -q clean
rm -rf "$root"/var/log/apt/* "$root"/var/log/*.log
# A server has python3-apt and a package index of the last days. Under emulation they take a minute to come by.
chroot "$root" apt-cache -q gencaches

chroot "$root" grub-install --target=i386-pc --recheck "/dev/$name"
# For UEFI at the removable path, which needs no boot variables in the firmware. By hand and with mtools, since not
# every controller's kernel can mount FAT, and grub-install insists on that.
mkdir -p "$root/boot/grub/x86_64-efi"
cp "$root"/usr/lib/grub/x86_64-efi/*.mod "$root"/usr/lib/grub/x86_64-efi/*.lst "$root/boot/grub/x86_64-efi/"
# shellcheck disable=SC2016 # $root and $prefix are GRUB's variables
printf 'search.fs_uuid %s root\nset prefix=($root)/boot/grub\n' "$root_uuid" >"$root/tmp/early.cfg"
chroot "$root" grub-mkimage --format=x86_64-efi --output=/tmp/bootx64.efi --prefix=/boot/grub --config=/tmp/early.cfg \
    part_gpt fat ext2 search search_fs_uuid normal
mmd -i "/dev/${name}p2" ::EFI ::EFI/BOOT
mcopy -i "/dev/${name}p2" "$root/tmp/bootx64.efi" ::EFI/BOOT/BOOTX64.EFI
chroot "$root" update-grub
if grep -q "/dev/$name" "$root/boot/grub/grub.cfg"; then
    echo "GRUB's configuration names the loop device instead of the file system" >&2
    exit 1
fi
# A later upgrade of GRUB in the host writes to the host's own disk.
echo 'grub-pc grub-pc/install_devices multiselect /dev/vda' | chroot "$root" debconf-set-selections
chroot "$root" systemctl -q enable systemd-networkd systemd-resolved ssh
# Starting a second systemd for every first login takes seconds under emulation, and nobody uses it.
chroot "$root" systemctl -q mask user@0.service

rm -f "$root/tmp/early.cfg" "$root/tmp/bootx64.efi" "$root/etc/resolv.conf"
ln -s ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
cp --dereference "$root/vmlinuz" "$(dirname "$disk")/vmlinuz"
fstrim "$root" 2>/dev/null || true
umount "$root/proc" "$root/sys" "$root/dev" "$root"
