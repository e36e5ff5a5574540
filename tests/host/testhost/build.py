"""The stages between a bare Debian and a saved test host.

::

    qemu      a QEMU that can nest, or the distribution's
    kernel    the host's kernel and modules          (Debian stable)
    rootfs    the host's packages                    (Debian testing: containerd 2, crun, runsc)
    images    the images that tests run              (tests/images)
    tools     containerd 2.3, crictl and critest     (Go modules; `go` is the toolchain where none is installed)
    disk      rootfs + modules + tests/host/guest + images + tools, as one ext4 file system
    state     booted, images imported, runtimes warmed up, and saved
"""

from __future__ import annotations

import lzma
import os
import struct
import subprocess
import zlib
from pathlib import Path

from . import cache, debian, gotools, machine, qemu
from .errors import HostError

HERE = Path(__file__).resolve().parent.parent
IMAGES = HERE.parent / "images"
_SCRIPTS = HERE / "image"
# Testing has the containerd, crun and QEMU that are wanted; the kernel is a stable release's, because
# that is what a host under test is likely to run.
_USERLAND_SUITE = "forky"
_KERNEL_SUITE = "trixie"
_DISK_SIZE = "10G"
_TOOLS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "depmod": "kmod", "cpio": "cpio", "xz": "xz-utils", "zstd": "zstd", "gcc": "gcc"}
_COMMON = _SCRIPTS / "mmdebstrap.sh"


def saved_host() -> machine.Saved:
    """The saved host for these sources; whatever is missing for it is built first."""
    emulator = _qemu()
    kernel, disk = _kernel(), _disk()
    boot = qemu.Boot(kernel / "vmlinux", disk / "initrd")
    accelerator = _accelerator(emulator, disk, boot)

    def at(directory: Path) -> machine.Saved:
        return machine.Saved(emulator, accelerator, directory, boot)

    key = cache.key_of(
        accelerator,
        emulator.version,
        cache.build_id(disk),
        HERE / "testhost/qemu.py",
        HERE / "image/provision.sh",
        _processor() if accelerator == "kvm" else "",
    )
    directory = cache.ensure("state", key, f"saved test host ({accelerator})", lambda out: _save(at(out), disk))
    return at(directory)


def _qemu() -> qemu.Qemu:
    if found := qemu.system_qemu():
        return found
    script = _SCRIPTS / "qemu.sh"
    key = cache.key_of(script, _COMMON, _USERLAND_SUITE)
    directory = cache.ensure("qemu", key, f"QEMU of Debian {_USERLAND_SUITE}", lambda out: _run(script, out, SUITE=_USERLAND_SUITE))
    return qemu.unpacked_qemu(directory)


def _kernel() -> Path:
    script = _SCRIPTS / "kernel.sh"

    def build(out: Path) -> None:
        _run(script, out, SUITE=_KERNEL_SUITE)
        (out / "vmlinux").write_bytes(_decompressed((out / "vmlinuz").read_bytes()))

    return cache.ensure("kernel", cache.key_of(script, _COMMON, _KERNEL_SUITE), "the test host's kernel", build)


def _rootfs() -> Path:
    script, listing = _SCRIPTS / "rootfs.sh", _SCRIPTS / "packages"
    packages = [word for line in listing.read_text().splitlines() for word in line.partition("#")[0].split()]
    key = cache.key_of(script, _COMMON, _USERLAND_SUITE, *packages)
    return cache.ensure(
        "rootfs", key, f"the test host's {len(packages)} packages and what they need", lambda out: _run(script, out, SUITE=_USERLAND_SUITE, PACKAGES=",".join(packages))
    )


def _images() -> Path:
    script = IMAGES / "build"
    return cache.ensure("images", cache.key_of(IMAGES, _COMMON), "test images", lambda out: _run(script, out))


def _tools() -> Path:
    script = _SCRIPTS / "go.sh"

    def unpacked_go() -> Path:
        key = cache.key_of(script, _COMMON, _USERLAND_SUITE)
        directory = cache.ensure("go", key, f"Go of Debian {_USERLAND_SUITE}", lambda out: _run(script, out, SUITE=_USERLAND_SUITE))
        return next(directory.glob("root/usr/lib/go-*/bin/go"))

    return cache.ensure("tools", gotools.key(), "containerd 2.3 and the CRI tools", lambda out: gotools.build(out, unpacked_go))


def _disk() -> Path:
    kernel, rootfs, images, tools = _kernel(), _rootfs(), _images(), _tools()
    script, guest, leaks = _SCRIPTS / "disk.sh", HERE / "guest", HERE / "leaks"
    key = cache.key_of(script, guest, leaks, _DISK_SIZE, *map(cache.build_id, (kernel, rootfs, images, tools)))

    def build(out: Path) -> None:
        inputs = {"ROOTFS": rootfs / "rootfs.tar", "KERNEL": kernel, "GUEST": guest, "LEAKS": leaks, "IMAGES": images, "TOOLS": tools / "root", "SIZE": _DISK_SIZE}
        _run(script, out, **{name: str(value) for name, value in inputs.items()})

    return cache.ensure("disk", key, "the test host's disk", build)


def _save(saved: machine.Saved, disk: Path) -> None:
    """Fill `saved` twice booted: once to import the images and shut down cleanly, so that a fresh boot finds
    a clean disk; and once to warm up what every test uses, and save."""
    _overlay(saved, disk)
    name = f"build-{os.getpid()}"
    provision = (_SCRIPTS / "provision.sh").read_bytes()
    _empty(saved.memory)
    cache.say("  booting it for the first time")
    with machine.boot_for_saving(saved, name) as host:
        cache.say("  importing the test images")
        host.check(["bash", "-s", "import"], provision)
        machine.shut_down(host)
    # A new file: the memory of the first boot is of no use.
    saved.memory.unlink()
    _empty(saved.memory)
    cache.say("  booting it again")
    with machine.boot_for_saving(saved, name) as host:
        cache.say("  warming it up")
        host.check(["bash", "-s", "warm"], provision)
        cache.say("  saving it")
        machine.save(host, saved)
    subprocess.run(["fallocate", "--dig-holes", str(saved.memory)], check=False)
    # Whoever restores must not be able to write to them.
    for file in (saved.memory, saved.disk, saved.devices):
        file.chmod(0o444)


def _empty(memory: Path) -> None:
    with open(memory, "wb") as file:
        file.truncate(qemu.MEMORY_MIB << 20)


def _overlay(saved: machine.Saved, disk: Path) -> None:
    # Relative, so that the cache may be moved or restored elsewhere.
    backing = os.path.relpath(disk / "disk.raw", saved.directory)
    create = [*saved.qemu.img, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing, str(saved.disk)]
    done = subprocess.run(create, capture_output=True, text=True, env=qemu.environment())
    if done.returncode != 0:
        raise HostError(f"qemu-img could not create {saved.disk}: {done.stderr.strip()}", "is the disk full?")


def _accelerator(emulator: qemu.Qemu, disk: Path, boot: qemu.Boot) -> str:
    """`kvm` where this machine's KVM proved that it can nest, `tcg` elsewhere. The proof is kept."""
    chosen = os.environ.get(qemu.ACCELERATOR_VARIABLE)
    if chosen in ("kvm", "tcg"):
        return chosen
    if chosen:
        raise HostError(f"{qemu.ACCELERATOR_VARIABLE} is `{chosen}`", "it may be kvm or tcg, or unset")
    if not qemu.nesting_kvm():
        return "tcg"

    def probe(out: Path) -> None:
        trial = machine.Saved(emulator, "kvm", out, boot)
        _overlay(trial, disk)
        try:
            with machine.boot(trial, f"probe-{os.getpid()}", background=False) as host:
                host.check(["python3", "-c", "import fcntl; fcntl.ioctl(open('/dev/kvm'), 0xAE01, 0)"])
            verdict = "kvm"
        except HostError as error:
            verdict = "tcg"
            cache.say(f"hardware KVM does not nest here, so emulation is used: {error}")
        trial.disk.unlink()
        (out / "accelerator").write_text(verdict)

    key = cache.key_of(os.uname().release, _processor(), emulator.version, cache.build_id(disk))
    return (cache.ensure("accelerator", key, "trying nested hardware KVM", probe) / "accelerator").read_text()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def prepare() -> str:
    """Install what the build scripts use, and return the mirror for them."""
    debian.need(_TOOLS)
    return debian.mirror()


def _run(script: Path, out: Path, **variables: str) -> None:
    debian.run_script(script, {**variables, "MIRROR": prepare(), "OUT": str(out)}, out / "log")
    if os.geteuid() != 0:
        subprocess.run(debian.privileged(["chown", "-R", f"{os.getuid()}:{os.getgid()}", str(out)]), check=True)


def _decompressed(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage (Linux Documentation/arch/x86/boot.rst: payload_offset, payload_length).

    Under emulation the kernel's own decompression takes seconds of every fresh boot."""
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        # The last four bytes of the payload are its unpacked size, which zstd takes for garbage.
        return subprocess.run(["zstd", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout
    raise HostError(f"the kernel is packed in a way that is not known here (magic {payload[:4].hex()})", "add it to _decompressed() in tests/host/testhost/build.py")

