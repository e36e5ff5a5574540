#!/usr/bin/env python3
"""Pack root directories into a container image.

    oci.py OUT NAME REFERENCE --layer DIR|TAR [--layer ...] --config JSON [--plain] [--docker] [--layout] [--serve NAME:TAG ...]
    oci.py OUT --layer ... --config JSON [--plain] --serve NAME:TAG ...

writes OUT/NAME.oci.tar, an OCI archive (OCI image-spec 1.1, image-layout.md) that `ctr images import`
takes; with --layout also OUT/NAME/, the same as a directory; with --docker also OUT/NAME.docker.tar, as
`docker save` writes it; with --serve also what the test host's registry gives out under these names, in
OUT/registry (tests/host/guest/usr/lib/testhost/registry.py). A layer that is a directory is packed sorted, root-owned and with one timestamp;
a tar file is taken as it is. Layers are gzipped, or with --plain left as they are. The same input gives the same bytes.
"""

import argparse
import gzip
import hashlib
import io
import json
import pathlib
import tarfile

# The creation date inside images and layers: it says nothing, and it never changes.
EPOCH = 1767225600
CREATED = "2026-01-01T00:00:00Z"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OCI = "application/vnd.oci.image"


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer_tar(source):
    """The uncompressed bytes of one layer."""
    if source.is_file():
        return source.read_bytes()

    def plain(entry):
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = EPOCH
        return entry

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(source.rglob("*")):
            archive.add(path, str(path.relative_to(source)), recursive=False, filter=plain)
    return buffer.getvalue()


def encode(value):
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def write_archive(path, files):
    """A tar of `files`, a mapping of names to contents, in its order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), 0o644, EPOCH
            archive.addfile(entry, io.BytesIO(data))


def serve(registry, reference, manifest, blobs):
    """Add an image to the directory that the registry serves."""
    name, _, tag = reference.rpartition(":")
    write(registry / "tags" / name / tag, manifest.encode())
    for key, blob in blobs.items():
        write(registry / "blobs" / key.replace(":", "/"), blob)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("name", nargs="?")
    parser.add_argument("reference", nargs="?")
    parser.add_argument("--layer", action="append", type=pathlib.Path, required=True)
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--docker", action="store_true")
    parser.add_argument("--layout", action="store_true")
    parser.add_argument("--serve", action="append", default=[], metavar="NAME:TAG")
    options = parser.parse_args()

    layers = [layer_tar(source) for source in options.layer]
    packed = layers if options.plain else [gzip.compress(layer, compresslevel=6, mtime=0) for layer in layers]
    kind = f"{OCI}.layer.v1.tar" if options.plain else f"{OCI}.layer.v1.tar+gzip"
    config = encode(
        {
            "created": CREATED,
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": [PATH], "WorkingDir": "/", **options.config},
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
            "history": [{"created": CREATED, "created_by": f"kata-rs tests/images, layer {n}"} for n in range(1, len(layers) + 1)],
        }
    )
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": {"mediaType": f"{OCI}.config.v1+json", "digest": digest(config), "size": len(config)},
            "layers": [{"mediaType": kind, "digest": digest(blob), "size": len(blob)} for blob in packed],
        }
    )
    blobs = {digest(blob): blob for blob in (manifest, config, *packed)}
    for reference in options.serve:
        serve(options.out / "registry", reference, digest(manifest), blobs)
    if not options.name:
        return
    index = encode(
        {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.index.v1+json",
            "manifests": [
                {
                    "mediaType": f"{OCI}.manifest.v1+json",
                    "digest": digest(manifest),
                    "size": len(manifest),
                    "platform": {"architecture": "amd64", "os": "linux"},
                    "annotations": {"io.containerd.image.name": options.reference, "org.opencontainers.image.ref.name": options.reference.rpartition(":")[2]},
                }
            ],
        }
    )
    files = {"oci-layout": encode({"imageLayoutVersion": "1.0.0"}), "index.json": index}
    files |= {"blobs/" + name.replace(":", "/"): blob for name, blob in blobs.items()}
    write_archive(options.out / f"{options.name}.oci.tar", files)
    if options.layout:
        for name, data in files.items():
            write(options.out / options.name / name, data)
    if options.docker:
        docker = {f"{digest(config)[7:]}.json": config}
        names = [f"{digest(layer)[7:]}/layer.tar" for layer in layers]
        docker |= dict(zip(names, layers))
        docker["manifest.json"] = encode([{"Config": f"{digest(config)[7:]}.json", "RepoTags": [options.reference], "Layers": names}])
        write_archive(options.out / f"{options.name}.docker.tar", docker)


if __name__ == "__main__":
    main()
