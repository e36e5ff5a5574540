#!/bin/bash
# Install the packages of the test host into $OUT/rootfs.tar.
# Inputs: MIRROR, SUITE, OUT, PACKAGES (comma separated).
set -euo pipefail
. "$(dirname "$0")/mmdebstrap.sh"

debian "$SUITE" "$OUT/rootfs.tar" --variant=minbase --include="$PACKAGES"
