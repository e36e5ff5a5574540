"""docs/conformance.md, from what runs of the CRI conformance suite found and the reasons in reasons.toml."""

import collections
import fnmatch
import pathlib
import tomllib

REASONS = pathlib.Path(__file__).parent / "reasons.toml"
HEAD = """# CRI conformance

What critest {version}, the conformance suite of the Kubernetes container runtime interface, says about kata-rs, in the
emulated test host. Made by `make critest` from its results and `tests/critest/reasons.toml`; do not edit. Each spec runs in
a process of its own with a time limit; the images come from a registry in the test host and are made of Debian packages.
Where a run names several commits, some of its specs ran again later, or later than the others. Minutes say little: the
machine is emulated and shared.

"""
CRITEST = "1.36.0"
# How many specs this version has, without its benchmarks.
SPECS = 117
BAD = ("failed", "timedout")


def reasons():
    """Ordered (spec or its beginning, handlers or None, reason)."""
    entries = tomllib.loads(REASONS.read_text())["reason"]
    return [(entry["spec"], entry.get("handlers"), entry["why"]) for entry in entries]


def reasons_of_skips():
    """Beginning of the suite's words: reason."""
    return {entry["words"]: entry["why"] for entry in tomllib.loads(REASONS.read_text())["skip"]}


def reasons_of_what_is_left():
    """The leak checker's words, as a pattern: reason."""
    return {entry["words"]: entry["why"] for entry in tomllib.loads(REASONS.read_text())["left"]}


def reason_for(known, spec, handler):
    return next((why for start, handlers, why in known if spec.startswith(start) and (handlers is None or handler in handlers)), None)


def cell(text):
    return " ".join(text.split()).replace("|", "\\|")


def title(run):
    return f"containerd {run['containerd']}, {run['handler']}"


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]) + "\n\n"


def differing(run):
    """Specs that did not do the same in each whole run, with what they did, the last one at the end."""
    found = {}
    for spec in run["specs"]:
        states = [states[spec["spec"]] for states in run.get("before", []) if spec["spec"] in states] + [spec["state"]]
        if len(set(states)) > 1:
            found[spec["spec"]] = states
    return found


def summary(runs):
    rows = []
    for run in runs:
        count = collections.Counter("failed" if s["state"] in BAD else s["state"] for s in run["specs"])
        ran = count["passed"] + count["failed"]
        left = "not looked" if run["left"] is None else "nothing" if not run["left"] else f"{len(run['left'])}, below"
        origins = sorted({f"{s['commit']}, {s['date']}" for s in run["specs"]})
        minutes = round(sum(s["seconds"] for s in run["specs"]) / 60)
        times, unsteady = 1 + len(run.get("before", [])), len(differing(run))
        steady = "–" if times == 1 else f"{times}: " + (f"{unsteady} differed" if unsteady else "the same")
        rows.append([title(run), f"**{count['passed']} of {ran}**", str(count["skipped"]), str(SPECS - len(run["specs"])), steady, left, f"{minutes} min", "; ".join(origins)])
    return table(["run", "passed of those that ran", "skipped", "not run yet", "whole runs", "left behind at the end", "took", "commit"], rows)


def groups(runs):
    counts = {}
    for run in runs:
        for spec in run["specs"]:
            per_run = counts.setdefault(spec["group"], {}).setdefault(title(run), collections.Counter())
            per_run["failed" if spec["state"] in BAD else spec["state"]] += 1
    rows = []
    for group in sorted(counts):
        row = [group]
        for run in runs:
            count = counts[group].get(title(run), {})
            parts = [f"{count[state]} {state}" for state in ("passed", "failed", "skipped") if count.get(state)]
            row.append(", ".join(parts) or "–")
        rows.append(row)
    return table(["group", *map(title, runs)], rows)


def page(runs):
    """The page, and what has no explanation."""
    known = reasons()
    # runc is there to compare with.
    runs = sorted(runs, key=lambda run: (run["handler"] == "runc", run["containerd"], run["handler"]))
    text = HEAD.format(version=CRITEST) + summary(runs) + "## By group\n\n" + groups(runs)
    failures, skips, unexplained = {}, {}, []
    for run in runs:
        for spec in run["specs"]:
            if spec["state"] in BAD:
                why = reason_for(known, spec["spec"], run["handler"])
                if why is None:
                    unexplained.append(f"{title(run)}: {spec['spec']}")
                    why = f"**not explained**: {spec['message'].strip().splitlines()[0][:300] if spec['message'].strip() else spec['state']}"
                failures.setdefault((spec["spec"], why), []).append(title(run))
            elif spec["state"] == "skipped":
                of = skips.setdefault(spec["message"] or "skipped without a word", collections.defaultdict(set))
                of[title(run)].add(spec["spec"])
    text += "## What did not pass\n\n"
    if failures:
        text += table(["spec", "with", "why"], [[cell(spec), ("all runs" if len(where) == len(runs) else cell("; ".join(where))), cell(why)] for (spec, why), where in sorted(failures.items())])
    else:
        text += "Nothing.\n\n"
    unsteady = [[cell(spec), title(run), ", ".join(states)] for run in runs for spec, states in differing(run).items()]
    if unsteady:
        text += "## What differed between runs\n\n" + table(["spec", "with", "in each run, the last one at the end"], unsteady)
    text += "## What was skipped\n\nBy the suite itself, with these words:\n\n"
    rows = []
    for message, of in sorted(skips.items()):
        why = next((why for words, why in reasons_of_skips().items() if message.startswith(words)), None)
        if why is None:
            unexplained.append(f"skipped, {'; '.join(of)}: {message}")
        where = "all runs" if len(of) == len(runs) else "; ".join(of)
        specs = sorted(set().union(*of.values()))
        rows.append([cell(message), cell(where), cell(why or "**not explained**"), cell("; ".join(specs))])
    text += table(["the suite's words", "with", "why", "specs"], rows)
    rows = []
    for run in runs:
        for words in run["left"] or []:
            why = next((why for pattern, why in reasons_of_what_is_left().items() if fnmatch.fnmatchcase(words, pattern)), None)
            if why is None:
                unexplained.append(f"left behind, {title(run)}: {words}")
            rows.append([cell(words), title(run), cell(why or "**not explained**")])
    if rows:
        text += "## What was left behind\n\nFound by the leak checker when a run was over.\n\n" + table(["what", "with", "why"], rows)
    return text.rstrip() + "\n", unexplained
