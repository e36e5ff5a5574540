#!/usr/bin/env python3
"""Runs specs of critest, each in a process of its own with a limit, on the machine that has the containerd.

    specs.py --handler NAME [--focus REGEX]... [--skip REGEX]... [--exactly SPEC]... [--limit SECONDS] [--total SECONDS]

prints one JSON object per line: first {"specs": N}, then one per spec as it ends, {"spec", "group", "state", "message",
"seconds"}, where state is passed, failed, skipped or timedout; at last {"left": [...]}, what the leak checker found.
A process per spec costs a second each under emulation, and a spec that hangs costs its limit and no more.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

# Of a failure's message; the rest is a dump of objects.
MESSAGE = 2000
# Where a failure's events are, for who looks into it.
LOGS = pathlib.Path("/var/log/critest")


def critest(arguments, limit, log):
    """The report of one run, or None when it took longer than `limit` seconds."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory, "report.json")
        argv = ["critest", "-ginkgo.no-color", f"-ginkgo.json-report={report}", *arguments]
        with open(log, "wb") as output:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", start_new_session=True)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None
        if not report.exists():
            sys.exit(f"critest made no report; it said last:\n{log.read_text(errors='replace')[-3000:]}")
        return json.loads(report.read_text())[0]


def text_of(report):
    return " ".join([*(report["ContainerHierarchyTexts"] or []), report["LeafNodeText"]])


def named(text):
    """A spec's name as people read it."""
    return text.replace("[k8s.io] ", "").replace(" [Conformance]", "")


def specs(report):
    """Each spec's whole text and its group; hooks of the suite are reports too, and no specs."""
    return {text_of(r): named(r["ContainerHierarchyTexts"][0]) for r in report["SpecReports"] if r["LeafNodeType"] == "It"}


def pattern(text):
    """A regular expression of Go for exactly this spec."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text) + "$"


def outcome(report, text):
    """State and message of the one spec that ran."""
    if report is None:
        return "timedout", ""
    spec = next(r for r in report["SpecReports"] if r["LeafNodeType"] == "It" and text_of(r) == text)
    # Ginkgo knows more kinds of failure: panicked, interrupted, aborted and its own timedout.
    state = spec["State"] if spec["State"] in ("passed", "skipped") else "failed"
    failure = spec.get("Failure") or {}
    message = failure.get("Message", "") or failure.get("ForwardedPanic", "")
    return state, message[:MESSAGE]


def clear():
    """Pods that a failed or ended spec left behind, so that the next one finds its ports free."""
    subprocess.run(["timeout", "120", "crictl", "rmp", "--all", "--force"], stdin=subprocess.DEVNULL, capture_output=True)


def say(**event):
    print(json.dumps(event), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--handler", required=True)
    parser.add_argument("--focus", action="append", default=[])
    parser.add_argument("--exactly", action="append", default=[], metavar="SPEC")
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--limit", type=float, default=240)
    parser.add_argument("--total", type=float, default=5400)
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    # Dry runs print every spec and run none; the ginkgo options are the suite's own.
    listed = specs(critest(["-ginkgo.dry-run", "-ginkgo.skip=benchmark"], 300, LOGS / "list.log"))

    def wanted(text):
        if "benchmark" in text or any(re.search(skip, named(text)) for skip in options.skip):
            return False
        if options.exactly:
            return named(text) in options.exactly
        return not options.focus or any(re.search(focus, named(text)) for focus in options.focus)

    chosen = {text: group for text, group in listed.items() if wanted(text)}
    say(specs=len(chosen))
    end = time.monotonic() + options.total
    for number, (text, group) in enumerate(chosen.items()):
        limit = min(options.limit, end - time.monotonic())
        if limit <= 0:
            say(spec=named(text), group=group, state="timedout", message="the limit for all specs together was reached before this one", seconds=0.0)
            continue
        log = LOGS / f"{number:03}.log"
        began = time.monotonic()
        report = critest([f"-runtime-handler={options.handler}", f"-ginkgo.focus={pattern(text)}"], limit, log)
        state, message = outcome(report, text)
        if number == 0:
            # What the first pod of a host makes stays by design.
            clear()
            subprocess.run(["leaks", "snapshot", "/root/critest.leaks"], check=True)
        if state == "timedout":
            message = f"ended after {limit:.0f} seconds"
        if state in ("failed", "timedout"):
            clear()
        say(spec=named(text), group=group, state=state, message=message, seconds=round(time.monotonic() - began, 1), log=str(log))
    found = subprocess.run(["leaks", "compare", "/root/critest.leaks"], capture_output=True, text=True)
    say(left=[line.removeprefix("leaked ") for line in found.stdout.splitlines()])


if __name__ == "__main__":
    main()
