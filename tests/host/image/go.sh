#!/bin/bash
# Unpack a Go toolchain into $OUT/root; nothing is installed on this machine.
# Inputs: MIRROR, SUITE, OUT.
set -euo pipefail
. "$(dirname "$0")/mmdebstrap.sh"

debian "$SUITE" "$OUT/root.tar" --variant=extract --include=golang-go
mkdir "$OUT/root"
tar -C "$OUT/root" -xf "$OUT/root.tar" --wildcards './usr/lib/go-*' './usr/share/go-*'
rm "$OUT/root.tar"
