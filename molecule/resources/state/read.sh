#!/bin/sh
# Prints what the collection could change on a host, a line each: files, links (of enabled units, too), accounts, memory
# settings. It asks no daemon, which a busy machine may keep waiting for longer than its own timeout.
set -eu
set -- /etc /opt /srv /usr/local /var/lib/cpullm
find /boot/grub "$@" -xdev -type f -printf 'file %p %m %U:%G\n' 2>/dev/null || true
find /boot/grub "$@" -xdev -type f -exec sha256sum -- {} + 2>/dev/null | sed 's/\([^ ]*\)  \(.*\)/file \2 \1/' || true
find "$@" -xdev -type l -printf 'link %p %l\n' 2>/dev/null || true
getent passwd | sed 's/^/account /'
getent group | sed 's/^/group /'
findmnt --list --noheadings --types hugetlbfs --output TARGET | sed 's/^/hugetlbfs /'
for path in /proc/cmdline /proc/sys/vm/swappiness /proc/sys/vm/zone_reclaim_mode /proc/sys/vm/overcommit_memory \
  /proc/sys/kernel/numa_balancing /sys/kernel/mm/transparent_hugepage/enabled /sys/kernel/mm/transparent_hugepage/defrag \
  /sys/devices/system/node/node*/hugepages/hugepages-1048576kB/nr_hugepages; do
  [ ! -e "$path" ] || echo "kernel $path $(cat "$path")"
done
