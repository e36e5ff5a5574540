"""Network: one TCP stream of iperf3 between a container and the host's side of its link, both ways."""

import json
import subprocess
import time

from common import IMAGE, WORK, Failure, command, ctr, note, remove, tools

SECONDS = 3


def prepared(runtimes):
    """Starts one container per runtime with CNI's network; returns their names. Failures are told and left out."""
    mounts = tools("iperf3")
    names = {}
    for runtime, flags in runtimes.items():
        if runtime == "runsc":
            # The wrapper that the other cases use gives it no network.
            wrapper = f"{WORK}/runsc-with-network"
            with open(wrapper, "w") as script:
                script.write('#!/bin/sh\nexec runsc --platform=systrap --network=sandbox "$@"\n')
            subprocess.run(["chmod", "755", wrapper], check=True)
            flags = ["--runc-binary", wrapper]
        name = f"bench-network-{runtime}"
        try:
            ctr("run", "-d", "--cni", *flags, *mounts, IMAGE, name, "sleep", "3600")
            names[runtime] = name
            inside(name, "gateway", "ip", "route")
        except Failure as failure:
            note(f"network, {runtime}: {failure}")
            if runtime in names:
                close({runtime: names.pop(runtime)})
    return names


def inside(name, exec_id, *words):
    """Runs a command in a container."""
    return ctr("task", "exec", "--exec-id", exec_id, name, *words)


def gateway(name, number):
    """The host's address on the container's link."""
    for line in inside(name, f"gateway{number}", "ip", "route").splitlines():
        words = line.split()
        if words[:2] == ["default", "via"]:
            return words[2]
    raise Failure(f"{name} has no default route")


def round_of(names, number, results):
    """One measurement per runtime and direction, in bits per second as the receiver saw them."""
    for runtime, name in names.items():
        address = gateway(name, number)
        for direction, flag in (("out", []), ("in", ["-R"])):
            server = subprocess.Popen(["iperf3", "-s", "-1", "-B", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                wait_for_listener(address)
                text = inside(name, f"{direction}{number}", "/tools/iperf3", "-J", "-c", address, "-t", str(SECONDS), *flag)
            finally:
                server.terminate()
                server.wait()
            rate = json.loads(text)["end"]["sum_received"]["bits_per_second"]
            results.setdefault(direction, {}).setdefault(runtime, []).append(rate)


def wait_for_listener(address):
    """Until somebody listens on iperf3's port."""
    for _ in range(300):
        if f"{address}:5201" in command("ss", "-Htln"):
            return
        time.sleep(0.05)
    raise Failure(f"iperf3 does not listen on {address}:5201")


def close(names):
    """Removes the containers."""
    for name in names.values():
        remove(name)
