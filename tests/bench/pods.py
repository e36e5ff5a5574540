"""Pods through CRI: RunPodSandbox, CreateContainer and StartContainer by one crictl."""

import contextlib
import json
import os
import shutil

from common import IMAGE, WORK, Failure, command, failed, timed


def prepared(runtimes):
    """The runtimes whose handler CRI has; one pod of each that does not count."""
    if not shutil.which("crictl"):
        raise Failure("not installed on this machine: crictl")
    os.makedirs(WORK, exist_ok=True)
    handlers = []
    for runtime in runtimes:
        try:
            pod(runtime, "warm")
            handlers.append(runtime)
        except Failure as failure:
            failed("pod_start", runtime, failure)
    return handlers


def pod(runtime, number):
    """Seconds from the start of crictl to its end, which is when the pod's container runs."""
    name = f"bench-{runtime}-{number}"
    sandbox = {"metadata": {"name": name, "namespace": "bench", "uid": name}, "log_directory": WORK, "linux": {}}
    container = {"metadata": {"name": "c"}, "image": {"image": IMAGE}, "command": ["sleep", "3600"], "log_path": f"{name}.log"}
    for file, content in (("pod.json", sandbox), ("container.json", container)):
        with open(f"{WORK}/{file}", "w") as out:
            json.dump(content, out)
    try:
        seconds = timed(
            lambda: command("crictl", "run", "--no-pull", "--runtime", runtime, f"{WORK}/container.json", f"{WORK}/pod.json")
        )
    except Failure:
        # It says what was wrong; that the remains cannot be removed either does not.
        with contextlib.suppress(Failure):
            remove(name)
        raise
    remove(name)
    return seconds


def remove(name):
    """Removes a pod."""
    for sandbox_id in command("crictl", "pods", "-q", "--name", name).split():
        away(sandbox_id)


def away(sandbox_id):
    """Removes a pod; a busy machine may need more time than one call waits."""
    for attempt in range(5):
        try:
            command("crictl", "--timeout", "120s", "rmp", "-f", sandbox_id)
            return
        except Failure:
            if attempt == 4:
                raise


def round_of(handlers, number, results):
    """One pod per runtime."""
    for runtime in handlers:
        try:
            results.setdefault(runtime, []).append(pod(runtime, number))
        except Failure as failure:
            failed("pod_start", runtime, failure)
