#!/bin/bash
# Unpack a QEMU with all libraries it needs into $OUT/root; nothing is installed on this machine.
# Inputs: MIRROR, SUITE, OUT.
set -euo pipefail
. "$(dirname "$0")/mmdebstrap.sh"

debian "$SUITE" "$OUT/root.tar" --variant=extract --include=qemu-system-x86,qemu-utils,seabios
mkdir "$OUT/root"
# Only what a headless x86-64 machine needs: the binaries, the loader, the libraries and the firmware.
tar -C "$OUT/root" -xf "$OUT/root.tar" --wildcards --no-anchored \
    './usr/bin/qemu-system-x86_64' './usr/bin/qemu-img' './usr/lib64/*' './usr/lib/x86_64-linux-gnu/*' './usr/share/qemu/*' './usr/share/seabios/*'
rm "$OUT/root.tar"
