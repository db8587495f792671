"""Delineate beside nnU-Net and MONAI, on one machine and the same scans.

    python benchmarks/peers/run.py --data DATA --out OUT [--only PART,…] [--sets SET,…] [--peers nnunet,monai]
    python benchmarks/peers/run.py --out OUT --write docs/peers.md
    python benchmarks/peers/run.py --out OUT --supersede "prediction: 50 hippocampi" --because "…"

DATA holds the folders ``hippocampus``, ``prostate``, ``sarcoma`` and ``brats``. OUT receives the peers' environments,
all that is made once, a log of every run and ``results.json``. What is measured is kept: the same command again makes
only the runs that are missing. ``--supersede`` is for runs that were not fair, or are of a Delineate of long ago: they
stay in ``results.json`` with the reason, but no longer count. Tools take turns: each case once with every tool, then
all cases a second time, and a third. Runs that fail are named at the end and are tried again next time.

=============  ====================================================================================================
preparation    from a folder of scans to the first step: inspection, planning, preprocessing
steps          training steps per second, of one network with one tile and batch, with each tool's loader
prediction     50 subjects, and one scan of 240×240×155: equal settings with the same weights, and each one's own
evaluation     Dice and HD95 of pairs of files
memory         the peak of each of these; measured in every run, so this makes one run of those that have none
dice           Dice of fold 0 after minutes of wall time, from the scans to the weights; takes hours
=============  ====================================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from cases import SETS, Bench, Case, CaseFailed, cases_of
from environments import PEERS, python_of
from tables import write
from watching import watch

from delineate.io.files import writing_beside

PARTS = ("preparation", "steps", "evaluation", "prediction", "memory", "dice")
ROUNDS = 3
LONGEST_SECONDS = 2 * 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="measure here; what is there is kept")
    parser.add_argument(
        "--only", type=some_of(PARTS), default=list(PARTS), help="these parts, such as steps,prediction"
    )
    parser.add_argument("--sets", type=some_of(SETS), default=list(SETS), help="these data sets (default: all four)")
    parser.add_argument("--peers", type=some_of(PEERS), default=list(PEERS), help="beside these (default: both)")
    parser.add_argument("--minutes", type=numbers, default=[10.0, 30.0], help="budgets of dice (default: 10,30)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each case and tool (default: {ROUNDS})")
    parser.add_argument("--stop-after", type=float, metavar="MINUTES", help="end then, and discard the run under way")
    parser.add_argument("--setup", action="store_true", help="make what the parts need, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny data, only to check that all works; in OUT/quick")
    parser.add_argument("--supersede", metavar="START", help="the runs whose key starts so no longer count")
    parser.add_argument("--because", metavar="TEXT", help="why, with --supersede")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write tables of what is measured into this page")
    options = parser.parse_args()
    end = float("inf") if options.stop_after is None else time.monotonic() + 60 * options.stop_after
    # Folders are absolute from here on: commands are shown without them.
    bench = Bench(options.data and options.data.resolve(), options.out.resolve(), options.peers, quick=options.quick)
    results = Results(bench.base / "results.json")
    failed: list[str] = []
    if (options.supersede is None) != (options.because is None):
        parser.error("--supersede and --because go together")
    if options.supersede is not None:
        print(f"{results.supersede(options.supersede, options.because)} runs no longer count")
    if options.data is not None:
        bench.need_environments()
        results.begin(machine(), versions(bench))
        cases = {part: cases_of(bench, part, options.sets, options.minutes) for part in options.only}
        if not options.setup:
            failed = measure(bench, results, cases, options.rounds, end)
    elif options.write is None and options.supersede is None:
        parser.error("give --data to measure, --write for the tables, or --supersede for what is to be measured again")
    if options.write is not None:
        write(options.write, results.content)
    for message in failed:
        print(f"failed: {message}", file=sys.stderr)
    return int(bool(failed))


def some_of(known: Sequence[str]) -> Any:
    """Reads words joined by commas, in the order of ``known``."""

    def words(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [word for word in given if word not in known]:
            raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(known)}")
        return [word for word in known if word in given]

    return words


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


class Results:
    """``results.json``: the machine, versions, and every run, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": {}, "versions": {}, "runs": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))

    def begin(self, machine: dict[str, Any], versions: dict[str, str]) -> None:
        """Refuse to mix what was measured under other conditions."""
        for what, now in (("machine", machine), ("versions", versions)):
            before = self.content[what]
            both = before.keys() & now.keys()
            differing = [
                f"{name} {before[name]}, now {now[name]}" for name in sorted(both) if before[name] != now[name]
            ]
            if self.content["runs"] and differing:
                sys.exit(
                    f"'{self.path}' was measured with {'; '.join(differing)}; use another --out, or the same again"
                )
            self.content[what] = {**before, **now}

    def done(self) -> set[tuple[str, int]]:
        return {(run["key"], run["round"]) for run in self.content["runs"] if "superseded" not in run}

    def supersede(self, start: str, because: str) -> int:
        """Mark the runs whose key starts so; returns how many these are."""
        marked = [run for run in self.content["runs"] if run["key"].startswith(start) and "superseded" not in run]
        for run in marked:
            run["superseded"] = because
        self.write()
        return len(marked)

    def add(self, run: dict[str, Any]) -> None:
        self.content["runs"].append(run)
        self.write()

    def write(self) -> None:
        with writing_beside(self.path) as path:
            path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.exists():
        lines = about.read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    memory = round(psutil.virtual_memory().total / 2**30)
    return {"processor": model, "cores": os.cpu_count(), "memory, GiB": memory, "system": platform.system()}


def versions(bench: Bench) -> dict[str, str]:
    found = {name: version(name) for name in ("delineate", "torch", "numpy", "openvino")}
    asked = {"nnunet": "nnunetv2", "monai": "monai"}
    for peer in ("nnunet", *(peer for peer in bench.peers if peer != "nnunet")):
        code = f"from importlib.metadata import version; print(version({asked[peer]!r}))"
        command = [str(python_of(bench.environments, peer)), "-c", code]
        found[asked[peer]] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"Python": platform.python_version(), **found}


def commit() -> str:
    """The commit of this checkout, with a + if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def turns(cases: Iterable[Case], rounds: int, done: set[tuple[str, int]]) -> Iterator[tuple[int, Case]]:
    """The runs that are missing: each case once with every tool, then all of them again."""
    cases = list(cases)
    for number in range(1, rounds + 1):
        for case in cases:
            if (case.key, number) not in done:
                yield number, case


def planned(cases: dict[str, list[Case]], rounds: int, done: set[tuple[str, int]]) -> list[tuple[int, Case]]:
    """All runs in order. The hours of ``dice`` come last, and ``memory`` adds one run where there is none."""
    quick = [case for part in cases if part not in ("dice", "memory") for case in cases[part]]
    runs = list(turns(quick, rounds, done))
    known = {case.key for case in quick} | {key for key, _ in done}
    runs += turns([case for case in cases.get("memory", ()) if case.key not in known], 1, done)
    return [*runs, *turns(cases.get("dice", ()), rounds, done)]


def measure(bench: Bench, results: Results, cases: dict[str, list[Case]], rounds: int, end: float) -> list[str]:
    """Make the missing runs until ``end``; returns what failed."""
    failed, code = [], commit()
    for number, case in planned(cases, rounds, results.done()):
        left = end - time.monotonic()
        if left < 1:
            print("time is up; the same command makes the runs that are missing")
            break
        bench.empty_scratch()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        command, environment = case.command, bench.variables(case.command, case.variables)
        watched = watch(command, bench.log, environment, min(left, LONGEST_SECONDS))
        name = f"{len(results.content['runs']) + 1:04}_{case.part}_{case.tool}_{number}.txt"
        kept = bench.base / "logs" / name.replace(" ", "_").replace(",", "")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bench.log, kept)
        if watched.status is None and left < LONGEST_SECONDS:
            print(f"{case.key}: not finished in time, discarded")
            break
        try:
            if watched.status != 0:
                raise CaseFailed(f"status {watched.status}")
            values = case.read()
        except CaseFailed as error:
            failed.append(f"{case.key}: {error}; see {kept}")
            print(failed[-1], flush=True)
            continue
        results.add(
            {
                **{"key": case.key, "part": case.part, "what": [case.what, *case.also], "tool": case.tool},
                **{"round": number, "started": started, "seconds": watched.seconds, "peak_gb": watched.peak_gb},
                **{"others_percent": watched.others_percent, "values": values},
                **{"command": bench.shown(command), "log": str(kept.relative_to(bench.base)), "commit": code},
            }
        )
        print(f"{number}. {case.key}: {watched.seconds:.1f} s, {watched.peak_gb:.2f} GB {values or ''}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
