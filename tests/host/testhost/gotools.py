"""What the test host runs that Debian does not have: containerd 2.3 and the CRI tools, built from Go modules.

The modules come through the machine's own Go settings (GOPROXY, GOFLAGS and so on) and are checked against the
sums below; what they need in turn is checked by Go against their own ``go.sum``. Go is this machine's, when it
is new enough to fetch the version that a module wants by itself, else one unpacked from Debian.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .errors import HostError

# From this version on a Go fetches the toolchain that a module asks for, as another module.
_OLDEST_GO = (1, 21)


@dataclass(frozen=True)
class Module:
    """A Go module and the programs of it: (package, file in the host, whether it is a package's tests)."""

    path: str
    version: str
    sum: str
    version_variable: str
    programs: tuple[tuple[str, str, bool], ...]


# The next containerd beside Debian's: `use-containerd 2.3` in the host. Two directories of one PATH, so that each
# version finds its own runc shim.
_CONTAINERD = "opt/containerd-2.3/bin"
MODULES = (
    Module(
        "github.com/containerd/containerd/v2",
        "v2.3.4",
        "h1:c2PJo/9UGVdiiw8SwrxuLxWGY+9b3jQ6Xp9zntneIvI=",
        "github.com/containerd/containerd/v2/version.Version",
        tuple((f"./cmd/{name}", f"{_CONTAINERD}/{name}", False) for name in ("containerd", "ctr", "containerd-shim-runc-v2")),
    ),
    Module(
        "sigs.k8s.io/cri-tools",
        "v1.36.0",
        "h1:Xt+LLvBVH1Fnp/AR2EyHApyWS/88y2KlWjlDc2HR+aw=",
        "sigs.k8s.io/cri-tools/pkg/version.Version",
        (("./cmd/crictl", "usr/local/bin/crictl", False), ("./cmd/critest", "usr/local/bin/critest", True)),
    ),
)


def key() -> str:
    """What the stage depends on: this file, with the versions in it."""
    return cache.key_of(Path(__file__))


def build(out: Path, unpacked_go: Callable[[], Path]) -> None:
    """Build all programs below `out`/root; `unpacked_go` gives a Go when this machine has none."""
    go = _installed_go() or unpacked_go()
    for module in MODULES:
        source = _download(go, module)
        for package, target, tests in module.programs:
            cache.say(f"  {target}")
            file = out / "root" / target
            file.parent.mkdir(parents=True, exist_ok=True)
            verb = ["test", "-c"] if tests else ["build"]
            # Static, because the host's C library is another one than this machine's; btrfs would need C.
            flags = ["-trimpath", "-mod=readonly", "-tags", "netgo,osusergo,static_build,no_btrfs", "-ldflags", f"-s -w -X {module.version_variable}={module.version}"]
            _go(go, [*verb, "-o", str(file), *flags, package], source)


def _installed_go() -> Path | None:
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go", "/usr/lib/go/bin/go"):
        if candidate and os.access(candidate, os.X_OK):
            said = subprocess.run([candidate, "version"], capture_output=True, text=True).stdout
            if (found := re.search(r"\bgo(\d+)\.(\d+)", said)) and (int(found[1]), int(found[2])) >= _OLDEST_GO:
                return Path(candidate)
    return None


def _download(go: Path, module: Module) -> Path:
    """The directory of a module's source, in Go's own cache."""
    told = json.loads(_go(go, ["mod", "download", "-json", f"{module.path}@{module.version}"], Path("/")))
    if told["Sum"] != module.sum:
        raise HostError(
            f"{module.path} {module.version} has the sum {told['Sum']}, not {module.sum}",
            "do not trust where GOPROXY leads to; if the version in tests/host/testhost/gotools.py was changed, change the sum too",
        )
    return Path(told["Dir"])


def _go(go: Path, arguments: list[str], directory: Path) -> str:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": os.environ.get("GOTOOLCHAIN", "auto")}
    environment.setdefault("HOME", str(cache.root()))
    done = subprocess.run([str(go), *arguments], cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-12:]
        raise HostError(f"`go {' '.join(arguments)}` failed:\n" + "\n".join(words), "without a network, set GOPROXY to where modules can be had")
    return done.stdout
