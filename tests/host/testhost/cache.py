"""Build stages kept under a key made from their inputs.

A stage's directory is ``ROOT/STAGE/KEY``. It appears by one rename when it is complete, so a
directory that exists is whole. Each build gets a random id; a later stage that was built on top of
an earlier one puts that id into its own key, because the same inputs fetched on another day give
other bytes. What a stage does is in ``build``, not here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# Builds of one stage that stay on disk: the current one, and the one a `git checkout` goes back to.
KEEP = 2
_ID_FILE = "build-id"


def root() -> Path:
    """The directory of everything the test host stores."""
    base = os.environ.get("KATA_RS_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "kata-rs")
    path = Path(base).absolute() / "test-host"
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(message: str) -> None:
    """A progress line. Standard output belongs to the command that runs in the host."""
    print(f"test host: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`; `waiting` is said when somebody else has it."""
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def key_of(*inputs: str | Path) -> str:
    """A key over strings and files; a directory counts with all names, modes and contents below it."""
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, str):
            digest.update(f"text {len(item)} {item}\n".encode())
            continue
        files = sorted(p for p in item.rglob("*") if p.name != "__pycache__" and p.suffix != ".pyc") if item.is_dir() else [item]
        for file in files:
            name = str(file.relative_to(item)) if item.is_dir() else file.name
            if file.is_symlink():
                digest.update(f"link {name} {os.readlink(file)}\n".encode())
            elif file.is_file():
                content = file.read_bytes()
                digest.update(f"file {name} {file.stat().st_mode & 0o111:o} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()[:16]


def build_id(stage_directory: Path) -> str:
    """The id that distinguishes this build of a stage from any other one."""
    return (stage_directory / _ID_FILE).read_text()


def existing(stage: str, key: str) -> Path | None:
    """The finished directory for `key`, and a note that it is in use."""
    directory = root() / stage / key
    if not (directory / _ID_FILE).exists():
        return None
    with contextlib.suppress(PermissionError):
        os.utime(directory)
    return directory


def ensure(stage: str, key: str, what: str, build: Callable[[Path], None]) -> Path:
    """The directory of `stage` for `key`; `build` fills it when it is not there yet."""
    if found := existing(stage, key):
        return found
    parent = root() / stage
    parent.mkdir(exist_ok=True)
    with locked(root() / f"{stage}.lock", f"waiting for another build of {what}"):
        if found := existing(stage, key):
            return found
        say(f"{what} ...")
        began = time.monotonic()
        partial = parent / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            build(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / _ID_FILE).write_text(uuid.uuid4().hex)
        directory = parent / key
        partial.rename(directory)
        say(f"{what}: done in {time.monotonic() - began:.0f} s")
        _prune(parent, directory)
    return directory


def _prune(parent: Path, current: Path) -> None:
    others = [p for p in parent.iterdir() if p.is_dir() and p != current]
    others.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    for old in others[KEEP - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
