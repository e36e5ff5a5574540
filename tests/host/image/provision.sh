#!/bin/bash
# Runs inside the test host while it is being saved: provision.sh import|warm
set -euo pipefail
images=/var/lib/kata-rs-test/images

case $1 in
import)
    for archive in "$images"/*.oci.tar; do
        ctr images import "$archive"
        # The big one takes half a minute; a CRI test that wants it imports it.
        case $archive in
        */debian.*) ;;
        *) ctr --namespace k8s.io images import "$archive" ;;
        esac
    done
    sync
    ;;
warm)
    # Programs and libraries that every test runs get into the page cache, and nothing stays behind.
    for binary in /usr/sbin/runc /usr/bin/crun; do
        ctr run --rm --runc-binary "$binary" localhost/busybox:1 "warm-$(basename "$binary")" /bin/true
    done
    ctr --namespace k8s.io run --rm localhost/busybox:1 warm /bin/true
    for tool in ip nft tar dd jq strace python3 mount findmnt dmsetup losetup; do
        "$tool" --version > /dev/null 2>&1 || true
    done
    leaks snapshot /run/warm.leaks
    rm /run/warm.leaks
    sync
    ;;
esac
