#!/bin/bash
# Unpack the test host's kernel and modules into $OUT: `vmlinuz` and `modules/VERSION/`.
# Inputs: MIRROR, SUITE, OUT.
set -euo pipefail
. "$(dirname "$0")/mmdebstrap.sh"

debian "$SUITE" "$OUT/root.tar" --variant=extract --include=linux-image-cloud-amd64
mkdir "$OUT/root"
tar -C "$OUT/root" -xf "$OUT/root.tar" --wildcards './boot/vmlinuz-*' './usr/lib/modules/*'
mv "$OUT"/root/boot/vmlinuz-* "$OUT/vmlinuz"
mv "$OUT/root/usr/lib/modules" "$OUT/modules"
rm -r "$OUT/root" "$OUT/root.tar"
modules=("$OUT"/modules/*)

# Drivers for hardware that this machine cannot have, a third of all modules.
cd "${modules[0]}"
rm -rf kernel/drivers/{gpu,infiniband,media,net/ethernet,hwmon,staging} kernel/sound vmlinuz
# Loading a compressed module costs seconds under emulation.
find . -name '*.ko.xz' -print0 | xargs -0 -r -P2 -n64 xz -d
