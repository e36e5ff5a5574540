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
    # The other containerd makes its root directory and brings the databases up to date when it first starts.
    use-containerd 2.3
    use-containerd 2.1
    sync
    ;;
warm)
    # Programs and libraries that every test runs get into the page cache, and nothing stays behind.
    for binary in /usr/sbin/runc /usr/bin/crun; do
        ctr run --rm --runc-binary "$binary" localhost/busybox:1 "warm-$(basename "$binary")" /bin/true
    done
    ctr --namespace k8s.io run --rm localhost/busybox:1 warm /bin/true
    # A pod with a port of the host: the bridge, the chains and the modules of its network stay for good.
    printf '{"metadata": {"name": "warm", "namespace": "warm", "uid": "warm"}, "linux": {"cgroup_parent": "/warm"}, "port_mappings": [{"container_port": 80, "host_port": 12000}]}' > /run/warm.json
    crictl runp --runtime runc /run/warm.json
    crictl rmp --all --force
    rmdir /sys/fs/cgroup/warm
    rm /run/warm.json
    for tool in ip nft tar dd jq strace python3 mount findmnt dmsetup losetup; do
        "$tool" --version > /dev/null 2>&1 || true
    done
    leaks snapshot /run/warm.leaks
    rm /run/warm.leaks
    sync
    ;;
esac
