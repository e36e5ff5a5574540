"""Block and file access: random reads of 4 KiB, each block of a file in the image once, with the host's cache warm."""

import json
import os
import pathlib
import subprocess
import sys

from common import WORK, Failure, ctr, failed, note, tools

IMAGE = "localhost/kata-rs-bench-file:1"
SIZE_MIB = 16
# Which snapshotters give a runtime its root file system here. gVisor's runs on overlayfs only.
CASES = [
    ("kata-rs", "overlayfs"),
    ("runc", "overlayfs"),
    ("runsc", "overlayfs"),
    ("kata-rs", "devmapper"),
    ("runc", "devmapper"),
    ("kata-rs", "erofs"),
    ("runc", "erofs"),
]


def prepared(runtimes, oci):
    """Makes and imports the image; returns the cases that this machine can run, with ctr's flags for each."""
    mounts = tools("fio")
    layer = pathlib.Path(WORK, "layer")
    (layer / "bin").mkdir(parents=True, exist_ok=True)
    for directory in ("tools", "proc", "sys", "dev", "tmp"):
        (layer / directory).mkdir(exist_ok=True)
    busybox = next((path for path in ("/usr/bin/busybox", "/bin/busybox") if os.path.exists(path)), None)
    if busybox is None:
        raise Failure("not installed on this machine: busybox")
    subprocess.run(["cp", busybox, layer / "bin/sh"], check=True)
    with open(layer / "data", "wb") as data:
        for _ in range(SIZE_MIB):
            data.write(os.urandom(1 << 20))
    subprocess.run([sys.executable, oci, WORK, "file", IMAGE, "--layer", layer, "--plain"], check=True, stdout=subprocess.DEVNULL)
    snapshotters = {}
    for _, snapshotter in CASES:
        if snapshotter not in snapshotters:
            try:
                ctr("images", "import", "--local", "--snapshotter", snapshotter, f"{WORK}/file.oci.tar")
                snapshotters[snapshotter] = True
            except Failure as failure:
                note(f"random reads, {snapshotter}: {failure}")
                snapshotters[snapshotter] = False
    return [
        (runtime, snapshotter, [*runtimes[runtime], "--snapshotter", snapshotter, *mounts])
        for runtime, snapshotter in CASES
        if runtime in runtimes and snapshotters[snapshotter]
    ]


def round_of(cases, number, results):
    """One run per case in a fresh container: reads per second and mean latency in µs."""
    for runtime, snapshotter, flags in cases:
        try:
            text = ctr(
                "run", "--rm", *flags, IMAGE, f"bench-read-{runtime}-{snapshotter}-{number}",
                "/tools/fio", "--name=read", "--filename=/data", "--readonly", "--rw=randread", "--bs=4k",
                f"--size={SIZE_MIB}m", "--ioengine=psync", "--invalidate=0", "--randrepeat=0", "--output-format=json",
            )
        except Failure as failure:
            failed("random_read", f"{runtime} {snapshotter}", failure)
            continue
        read = json.loads(text[text.index("{"):])["jobs"][0]["read"]
        note(f"random reads, {runtime} on {snapshotter}: {read['iops']:.0f}/s")
        results.setdefault(f"{runtime} {snapshotter}", []).append({"iops": read["iops"], "mean_us": read["lat_ns"]["mean"] / 1000})


def close(cases):
    """Removes the image."""
    if cases:
        ctr("images", "rm", IMAGE)
