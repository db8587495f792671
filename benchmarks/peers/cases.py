"""What is measured: the cases of each part, with the command of each tool, and what has to be there beforehand."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from environments import make, python_of
from raw import NUMBERS, folder_name, link_scans, write_moved, write_raw
from tables import DEFAULTS

from delineate.datasets.layouts import open_dataset
from delineate.evaluation.table import Evaluation
from delineate.io.formats import read_label
from delineate.recipe import packaged_recipes

HERE = Path(__file__).parent
CONFIGURATION = "3d_fullres"
LARGE = "brats"
"""Scans of 240×240×155, one of which is predicted."""

TRAINED = ("hippocampus", "prostate", "sarcoma")
"""Data sets whose Dice is measured."""

SETS = (*TRAINED, LARGE)

SUBJECTS = 50
CORES = str(os.cpu_count() or 1)

PREDICTING = 1
"""Processes that read scans, and that write labels, in nnU-Net's prediction; with two cores, fewest are fastest."""

SPARE = {"delineate": 4, "nnunet": 5, "monai": 1}
"""Seconds of a budget of minutes that are kept for the last step under way, and for writing the weights."""

WARM = 2
"""Steps before the first that is timed: compilation, and loaders that start."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A command of one tool. ``what`` is the same for those that are compared; ``also`` names other such rows.

    ``read`` returns what was measured besides time and memory, once the command has ended.
    """

    part: str
    what: str
    tool: str
    command: tuple[str, ...]
    read: Callable[[], Values] = dict
    variables: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.part}: {self.what}: {self.tool}"


class Bench:
    """The folder that all is measured in, and what is made there once."""

    def __init__(self, data: Path, out: Path, peers: Sequence[str], *, quick: bool) -> None:
        self.data, self.peers, self.quick = data, peers, quick
        self.environments = out / "environments"
        self.base = out / "quick" if quick else out
        self.scratch = self.base / "scratch"
        self.log = self.scratch / "log.txt"

    # ---- folders and variables

    def raw(self, name: str) -> Path:
        return self.base / "raw" / folder_name(name)

    def plans(self, name: str) -> Path:
        return self.base / "preprocessed" / folder_name(name) / "nnUNetPlans.json"

    def model(self, name: str, results: Path | None = None) -> Path:
        trained = f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
        return (results or self.base / "results") / folder_name(name) / trained

    def variables(self, command: Sequence[str], more: Mapping[str, str]) -> dict[str, str]:
        """The environment variables of a command."""
        folders = {f"nnUNet_{name}": str(self.base / name) for name in ("raw", "preprocessed", "results")}
        own = {
            # What a run converts and compiles is gone before the next.
            **{"DELINEATE_HOME": str(self.scratch / "home"), "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "compiled")},
            # nnU-Net starts eight processes unless it is told.
            "nnUNet_def_n_proc": CORES,
        }
        found = {**os.environ, **own, **folders, **more}
        found.pop("PYTHONDONTWRITEBYTECODE", None)  # Delineate's modules are kept compiled, as all installed ones are
        if str(self.environments) in shlex.join(command):
            found.pop("PYTHONPATH", None)  # a peer's packages are those of its own environment
        return found

    # ---- commands

    def kept(self) -> dict[str, str]:
        """Variables of a command that finds what an earlier one converted and compiled."""
        folder = self.base / "kept"
        return {"DELINEATE_HOME": str(folder / "home"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}

    def delineate(self, *words: object) -> tuple[str, ...]:
        return (sys.executable, "-m", "delineate", *map(str, words))

    def nnunet(self, program: str, *words: object) -> tuple[str, ...]:
        path = python_of(self.environments, "nnunet").with_name(program)
        return (str(path), *map(str, words))

    def nnunet_side(self, *words: object) -> tuple[str, ...]:
        return self.nnunet("python", HERE / "nnunet_side.py", *words)

    def monai(self, work: str, *words: object) -> tuple[str, ...]:
        return (str(python_of(self.environments, "monai")), str(HERE / "monai_side.py"), work, *map(str, words))

    def shown(self, command: Sequence[str]) -> str:
        """A command as the page shows it: without this machine's folders."""
        shortened = shlex.join(command)
        for path, name in (
            (self.scratch, "SCRATCH"),
            (self.environments, "ENVIRONMENTS"),
            (self.base, "OUT"),
            (HERE, "benchmarks/peers"),
            (Path(sys.executable), "python"),
        ):
            shortened = shortened.replace(str(path), name)
        return shortened

    # ---- what is made once

    def empty_scratch(self) -> None:
        """What one command writes there, the next may refuse to overwrite."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    def do(self, what: str, *command: str, variables: Mapping[str, str] | None = None) -> Path:
        """Run a command that is not measured; returns its log."""
        log = self.base / "logs" / "made" / f"{what}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {what}", flush=True)
        with log.open("w", encoding="utf-8") as file:
            environment = self.variables(command, variables or {})
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode:
            raise CaseFailed(f"{what}: {shlex.join(command)} ended with {done.returncode}; see {log}")
        return log

    def need_environments(self) -> None:
        for peer in ("nnunet", *(peer for peer in self.peers if peer != "nnunet")):
            make(self.environments, peer)  # nnU-Net's always: its plans are everybody's network

    def need_raw(self, name: str) -> Path:
        raw = self.raw(name)
        if not raw.exists():
            print(f"writing {raw.name}", flush=True)
            write_raw(self.data / name, raw, few=self.quick)
        return raw

    def splits(self, name: str) -> Path:
        """nnU-Net's file of one fold, which holds out what ours does."""
        return self.raw(name) / "splits_final.json"

    def need_plans(self, name: str) -> None:
        raw = self.need_raw(name)
        splits = self.plans(name).with_name("splits_final.json")
        if splits.exists():
            return
        self.do(f"plans of {name}", *self.planning(name))
        if self.quick:
            plans = json.loads(self.plans(name).read_text(encoding="utf-8"))
            configuration = plans["configurations"][CONFIGURATION]
            configuration.update(batch_size=2, patch_size=[min(64, side) for side in configuration["patch_size"]])
            self.plans(name).write_text(json.dumps(plans), encoding="utf-8")
        fold = json.loads((raw / "fold_0.json").read_text(encoding="utf-8"))
        self.splits(name).write_text(
            json.dumps([{"train": fold["training"], "val": fold["held_out"]}]), encoding="utf-8"
        )
        shutil.copy(self.splits(name), splits)

    def planning(self, name: str) -> tuple[str, ...]:
        words = ("-d", NUMBERS[name], "-c", CONFIGURATION, "--verify_dataset_integrity", "-npfp", CORES, "-np", CORES)
        return self.nnunet("nnUNetv2_plan_and_preprocess", *words)

    def need_precision(self, name: str, network: str) -> str:
        """Which precision MONAI's network is faster in here, by a trial that no prediction is charged for."""
        file = self.base / "precision" / f"{name}_{network}.json"
        if not file.exists():
            words = ("try", self.raw(name), self.plans(name), "--network", network)
            values = said(self.do(f"precision of {network} on {name}", *self.monai(*words)))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values), encoding="utf-8")
        return "bf16" if json.loads(file.read_text(encoding="utf-8"))["bf16"] else "fp32"

    def need_model(self, name: str) -> Path:
        """A model that nnU-Net trained for minutes, and its bundle.

        Its time does not depend on how good it is. But a network of few steps is undecided about many voxels, and
        OpenVINO refuses to run one that it decides otherwise for.
        """
        self.need_plans(name)
        bundle = self.base / "bundles" / f"{name}_nnunet"
        if not bundle.exists():
            # Small batches and patches: a step of the plans' own takes most of a minute on a CPU.
            small = ("--patch", 64, 64, 64) if name == LARGE else ()
            steps = 2 if self.quick else 150
            number = NUMBERS[name]
            self.do(f"model of {name}", *self.nnunet_side(number, "--steps", steps, "--batch", 2, *small))
            self.do(f"bundle of {name}", *self.delineate("import", "nnunet", self.model(name), "-o", bundle))
        return bundle

    def need_own(self, name: str) -> Path:
        """A bundle of the recipe that Delineate derives, likewise trained for minutes."""
        raw, run = self.need_raw(name), self.base / "bundles" / f"{name}_auto"
        if not (run / "report.html").exists():
            words = ("train", "auto", "--data", raw, "--fold", 0, "--split", raw / "split.json", "--out", run)
            short = ("--steps", 2 if self.quick else 300, "--compile", "off", "--no-evaluate")
            self.do(f"Delineate's own model of {name}", *self.delineate(*words, *short))
        return run / "bundle"

    def need_scans(self, name: str) -> Path:
        """The scans to predict: 50 of a set, or one large one."""
        raw, scans = self.need_raw(name), self.base / "scans" / name
        names = sorted(file.name.removesuffix(".nii.gz") for file in (raw / "labelsTr").glob("*.nii.gz"))
        link_scans(raw, names[: 1 if name == LARGE else SUBJECTS], scans)
        return scans

    def need_held_out(self, name: str) -> Path:
        raw, scans = self.need_raw(name), self.base / "held_out" / name
        fold = json.loads((raw / "fold_0.json").read_text(encoding="utf-8"))
        link_scans(raw, fold["held_out"], scans)
        return scans

    def need_moved(self, name: str) -> Path:
        raw, moved = self.need_raw(name), self.base / "moved" / name
        if not moved.exists():
            write_moved(raw, moved)
        return moved

    def of(self, tools: Mapping[str, Case]) -> list[Case]:
        """The cases of Delineate and of the peers that were chosen."""
        return [case for peer, case in tools.items() if peer.startswith("delineate") or peer in self.peers]


class CaseFailed(Exception):
    """A command failed, or left something else than it should."""


# ---- (a) preparation


def preparation(bench: Bench, sets: Sequence[str]) -> Iterator[Case]:
    for name in sets:
        bench.need_plans(name)
        raw, scratch = bench.raw(name), bench.scratch
        count = len(list((raw / "labelsTr").glob("*.nii.gz")))
        what = f"{name}, {count} subjects"
        words = (
            "train",
            "auto",
            "--data",
            raw,
            "--fold",
            "all",
            "--out",
            scratch / "run",
            "--cache",
            scratch / "cache",
        )
        one_step = ("--steps", 1, "--compile", "off", "--no-evaluate", "--set", "training.validation.subjects=0")
        prepared = {"nnUNet_preprocessed": str(scratch / "preprocessed")}
        prepare = ("prepare", raw, bench.plans(name), "--cache", scratch / "cache")
        yield from bench.of(
            {
                "delineate": Case("preparation", what, "Delineate", bench.delineate(*words, *one_step)),
                "nnunet": Case("preparation", what, "nnU-Net", bench.planning(name), variables=prepared),
                "monai": Case("preparation", what, "MONAI", bench.monai(*prepare)),
            }
        )


# ---- (b) training steps


def steps(bench: Bench, sets: Sequence[str]) -> Iterator[Case]:
    for name in [name for name in sets if name == "hippocampus"]:
        recipe = bench.need_model(name) / "recipe.yaml"
        raw, scratch, plans = bench.raw(name), bench.scratch, bench.plans(name)
        configuration = json.loads(plans.read_text(encoding="utf-8"))["configurations"][CONFIGURATION]
        sides, batch = "×".join(map(str, configuration["patch_size"])), configuration["batch_size"]
        what = f"{name}, batches of {batch} of {sides}"
        ours, theirs = (5, 4) if bench.quick else (20, 8)
        words = ("train", recipe, "--data", raw, "--fold", 0, "--split", raw / "split.json", "--out", scratch / "run")
        long = ("--cache", scratch / "cache", "--steps", ours, "--compile", "on", "--no-evaluate")
        same = ("--set", f"training.batch_size={batch}", "--set", "training.validation.subjects=0")
        options = ("--split", raw / "fold_0.json", "--weights", scratch / "weights.pt", "--steps", theirs)
        yield from bench.of(
            {
                "delineate": Case(
                    *("steps", what, "Delineate"),
                    bench.delineate(*words, *long, *same),
                    lambda: rate(logged_steps(bench.scratch / "run/logs/tensorboard")),
                ),
                "nnunet": Case(
                    *("steps", what, "nnU-Net"),
                    bench.nnunet_side(NUMBERS[name], "--steps", theirs),
                    lambda: rate(said(bench.log)["ended"]),
                    {"nnUNet_results": str(scratch / "results")},
                ),
                "monai": Case(
                    *("steps", what, "MONAI"),
                    bench.monai("train", raw, plans, *options, "--network", "dynunet"),
                    lambda: {**rate(said(bench.log)["ended"]), "bf16": said(bench.log)["bf16"]},
                ),
            }
        )


def rate(ended: Sequence[float]) -> Values:
    """Steps per second, from when each of them ended."""
    timed = ended[WARM:]
    if len(timed) < 2:
        raise CaseFailed(f"only {len(ended)} steps were made")
    return {"steps_per_second": (len(timed) - 1) / (timed[-1] - timed[0]), "steps": len(timed) - 1}


def logged_steps(folder: Path) -> list[float]:
    """When each step ended, by the events that Delineate logs for TensorBoard."""
    from tensorboard.compat.proto.event_pb2 import Event

    ended = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            # A record is its length in eight bytes, four to check that, the event, and four to check it.
            length = int.from_bytes(content[:8], "little")
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if any(value.tag == "loss" for value in event.summary.value):
                ended.append(event.wall_time)
    return ended


def said(log: Path) -> Values:
    """What a script of ours printed at its end."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith("measured: ")]
    if not found:
        raise CaseFailed("it printed nothing that was measured")
    return dict(json.loads(found[-1].removeprefix("measured: ")))


# ---- (c) Dice after minutes of wall time


def dice(bench: Bench, sets: Sequence[str], minutes: Sequence[float]) -> Iterator[Case]:
    for name in [name for name in sets if name in TRAINED]:
        bench.need_plans(name)
        bench.need_held_out(name)
        raw, scratch, plans = bench.raw(name), bench.scratch, bench.plans(name)
        preprocessed = scratch / "preprocessed"
        folders = {"nnUNet_preprocessed": str(preprocessed), "nnUNet_results": str(scratch / "results")}
        for budget in minutes:
            what = f"{name}, {budget:g} minutes"
            training = bench.nnunet_side(NUMBERS[name])
            copied = ("cp", str(bench.splits(name)), str(preprocessed / folder_name(name)))
            planned = f"{shlex.join(bench.planning(name))} && {shlex.join(copied)}"
            nnunet = f"{_until(budget, SPARE['nnunet'])} && {planned} && {shlex.join(training)} --until $until"
            written = ("--split", raw / "fold_0.json", "--weights", scratch / "weights.pt", "--batch", 2)
            monai = shlex.join(bench.monai("train", raw, plans, *written))
            cases = {
                "nnunet": Case(
                    *("dice", what, "nnU-Net"),
                    ("sh", "-c", nnunet),
                    lambda name=name: held_out_dice(bench, name, nnunet_predicts(bench, name)),
                    folders,
                ),
                "monai": Case(
                    *("dice", what, "MONAI"),
                    ("sh", "-c", f"{_until(budget, SPARE['monai'])} && {monai} --until $until"),
                    lambda name=name: held_out_dice(bench, name, monai_predicts(bench, name)),
                ),
            }
            own = {}
            for recipe in ("auto", *({name} & packaged_recipes().keys())):
                own[f"delineate {recipe}"] = Case(
                    *("dice", what, f"Delineate, {recipe}"),
                    delineate_trains(bench, name, recipe, budget),
                    lambda name=name: held_out_dice(bench, name, delineate_predicts(bench, name)),
                )
            yield from bench.of({**own, **cases})


def _until(minutes: float, spare: int) -> str:
    return f"until=$(($(date +%s) + {round(60 * minutes)} - {spare}))"


def delineate_trains(bench: Bench, name: str, recipe: str, budget: float) -> tuple[str, ...]:
    raw, scratch = bench.raw(name), bench.scratch
    left = max(0.01, budget - overhead(bench, name, recipe) - SPARE["delineate"] / 60)
    words = ("train", recipe, "--data", raw, "--fold", 0, "--split", raw / "split.json", "--minutes", f"{left:.3f}")
    return bench.delineate(*words, "--no-evaluate", "--out", scratch / "run", "--cache", scratch / "cache")


def overhead(bench: Bench, name: str, recipe: str) -> float:
    """Minutes of a training besides ``--minutes``: starting up, preparation, writing. A very short one tells."""
    file = bench.base / "overhead" / f"{name}_{recipe}.json"
    if not file.exists():
        bench.empty_scratch()
        raw, run, cache = bench.raw(name), bench.scratch / "run", bench.scratch / "cache"
        words = ("train", recipe, "--data", raw, "--fold", 0, "--split", raw / "split.json", "--minutes", 0.05)
        started = time.perf_counter()
        command = bench.delineate(*words, "--no-evaluate", "--out", run, "--cache", cache)
        bench.do(f"short training of {recipe} on {name}", *command)
        took = (time.perf_counter() - started) / 60
        lines = (run / "logs/events.jsonl").read_text(encoding="utf-8").splitlines()
        [trained] = [event for event in map(json.loads, lines) if event["kind"] == "trained"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"minutes": took - trained["minutes"]}), encoding="utf-8")
    return float(json.loads(file.read_text(encoding="utf-8"))["minutes"])


def delineate_predicts(bench: Bench, name: str) -> tuple[str, ...]:
    words = ("predict", bench.scratch / "run/bundle", bench.need_held_out(name), "-o", bench.scratch / "predicted")
    return bench.delineate(*words)


def nnunet_predicts(bench: Bench, name: str) -> tuple[str, ...]:
    model = bench.model(name, bench.scratch / "results")
    return nnunet_predict(bench, bench.need_held_out(name), model, bench.scratch / "predicted")


def monai_predicts(bench: Bench, name: str) -> tuple[str, ...]:
    words = (bench.raw(name), bench.plans(name), bench.need_held_out(name), "--out", bench.scratch / "predicted")
    precision = ("--precision", bench.need_precision(name, "unet"))
    return bench.monai("predict", *words, "--weights", bench.scratch / "weights.pt", "--equal", *precision)


def nnunet_predict(bench: Bench, scans: Path, model: Path, out: Path, *more: str) -> tuple[str, ...]:
    processes = ("-npp", PREDICTING, "-nps", PREDICTING)
    words = ("-i", scans, "-o", out, "-m", model, "-f", 0, "-device", "cpu", *processes, *more)
    return bench.nnunet("nnUNetv2_predict_from_modelfolder", *words)


def held_out_dice(bench: Bench, name: str, predict: tuple[str, ...]) -> Values:
    """Predict the held-out subjects and measure them, which is not timed; all by the same evaluation."""
    bench.do(f"predictions of {name}", *predict)
    predicted, tables = references_named(bench, name, bench.scratch / "predicted"), bench.scratch / "tables"
    evaluate = ("evaluate", predicted, bench.raw(name) / "labelsTr", "-o", tables)
    bench.do(f"evaluation of {name}", *bench.delineate(*evaluate, "--targets", targets(bench, name)))
    low, high = Evaluation.read(tables).overall()["dice"].ci95
    return {**means(tables), "dice_from": low, "dice_to": high}


def references_named(bench: Bench, name: str, predicted: Path) -> Path:
    """A folder with the predictions alone, named as the references are, as MONAI names them after the scans."""
    folder = bench.scratch / "named"
    folder.mkdir()
    for scan in sorted(bench.need_held_out(name).glob("*_0000.nii.gz")):
        subject = scan.name.removesuffix("_0000.nii.gz")
        files = [predicted / f"{subject}.nii.gz", predicted / scan.name]
        found = [file for file in files if file.exists()]
        if not found:
            raise CaseFailed(f"there is no prediction of {subject}")
        (folder / f"{subject}.nii.gz").symlink_to(found[0])
    return folder


def targets(bench: Bench, name: str) -> str:
    about = json.loads((bench.raw(name) / "dataset.json").read_text(encoding="utf-8"))
    return ",".join(f"{label}={value}" for label, value in about["labels"].items() if value)


def means(tables: Path) -> Values:
    """Means over subjects and targets, by metric, of Delineate's own table."""
    with (tables / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found: Values = {"subjects": len({row["subject"] for row in rows})}
    for metric in ("dice", "hd95_mm"):
        values = [float(row[metric]) for row in rows if row[metric]]
        found[metric] = float(np.mean([value for value in values if np.isfinite(value)]))
        found[f"{metric}_undefined"] = len(rows) - int(np.isfinite(values).sum())
    return found


# ---- (d) prediction


def prediction(bench: Bench, sets: Sequence[str]) -> Iterator[Case]:
    plain, mirrored, defaults = [], [], []
    for name in [name for name in sets if name in ("hippocampus", LARGE)]:
        bundle, own, scans = bench.need_model(name), bench.need_own(name), bench.need_scans(name)
        raw, plans, out = bench.raw(name), bench.plans(name), bench.scratch / "predicted"
        scan = next(iter(open_dataset(scans).subjects))
        count = len(list(scans.glob("*_0000.nii.gz")))
        size = "×".join(map(str, shape_of(next(iter(scan.scans.values())))))
        about = f"{count} hippocampi" if name == "hippocampus" else f"one scan of {size}, {len(scan.scans)} channels"
        usual = f"{about}, {DEFAULTS}"
        for cases, what, flips, tta, mirror in (
            (plain, f"{about}, not mirrored", ("--flips", ""), ("--disable_tta",), ()),
            (mirrored, f"{about}, mirrored along all axes", (), (), ("--mirror",)),
        ):
            read = Agreement(bench, what, count)
            engines = {
                f"delineate {engine}": Case(
                    *("prediction", what, f"Delineate, {shown}"),
                    bench.delineate("predict", bundle, scans, "-o", out, "--engine", engine, *flips),
                    read.of(f"delineate_{engine}"),
                )
                for engine, shown in (("torch", "PyTorch"), ("openvino", "OpenVINO"))
            }
            precision = bench.need_precision(name, "dynunet")
            network = ("--network", "dynunet", "--equal", *mirror, "--precision", precision)
            theirs = {
                "nnunet": Case(
                    *("prediction", what, "nnU-Net"),
                    nnunet_predict(bench, scans, bench.model(name), out, *tta),
                    read.of("nnunet"),
                    also=() if tta else (usual,),
                ),
                "monai": Case(
                    *("prediction", what, "MONAI"),
                    bench.monai("predict", raw, plans, scans, "--out", out, *network),
                    read.of("monai"),
                ),
            }
            # nnU-Net first, whose labels the others' are compared with.
            cases += bench.of({"nnunet": theirs["nnunet"], **engines, "monai": theirs["monai"]})
        read = Agreement(bench, usual, count)
        predicts, kept = bench.delineate("predict", own, scans, "-o", out), bench.kept()
        bench.empty_scratch()
        bench.do(f"first prediction of {name}", *predicts, variables=kept)
        defaults += bench.of(
            {
                "delineate": Case("prediction", usual, "Delineate", predicts, read.of("delineate")),
                "delineate again": Case(
                    "prediction", usual, "Delineate, not for the first time", predicts, read.of("delineate"), kept
                ),
                "monai": Case(
                    *("prediction", usual, "MONAI"),
                    bench.monai(
                        *("predict", raw, plans, scans, "--out", out),
                        *("--precision", bench.need_precision(name, "unet")),
                    ),
                    read.of("monai"),
                ),
            }
        )
    # What takes longest comes last, so that a run that is stopped has measured the most.
    yield from [*defaults, *plain, *mirrored]


@dataclass(frozen=True)
class Agreement:
    """Checks that every scan was predicted, and compares labels of the same weights with nnU-Net's."""

    bench: Bench
    what: str
    count: int

    def of(self, tool: str) -> Callable[[], Values]:
        return lambda: self.read(tool)

    def read(self, tool: str) -> Values:
        found = sorted((self.bench.scratch / "predicted").glob("*.nii.gz"))
        if len(found) != self.count:
            raise CaseFailed(f"{len(found)} of {self.count} scans were predicted")
        log = self.bench.log.read_text(encoding="utf-8", errors="replace")
        if tool == "delineate_openvino" and (refused := re.search(r"^engine: PyTorch .*", log, re.MULTILINE)):
            raise CaseFailed(refused[0])  # a time of PyTorch's is none of OpenVINO's
        kept = self.bench.base / "labels" / self.what.replace(",", "").replace(" ", "_")
        if tool == "nnunet":
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir(parents=True)
            for file in found:
                shutil.copy(file, kept)
        if not tool.startswith("delineate_") or not kept.exists():
            return {}
        same = [np.mean(read_label(file).voxels == read_label(kept / file.name).voxels) for file in found]
        return {"least_same_voxels": float(min(same))}


def shape_of(scan: Path) -> tuple[int, ...]:
    from delineate.io.formats import read_header

    return tuple(read_header(scan).grid.shape)


# ---- (f) evaluation


def evaluation(bench: Bench, sets: Sequence[str]) -> Iterator[Case]:
    for name in [name for name in sets if name in ("hippocampus", LARGE)]:
        bench.need_plans(name)
        moved, raw, scratch = bench.need_moved(name), bench.raw(name), bench.scratch
        references, named = raw / "labelsTr", targets(bench, name)
        files = sorted(references.glob("*.nii.gz"))
        size = "×".join(map(str, shape_of(files[0])))
        about = f"{size}, {named.count('=')} labels" if name == LARGE else name
        what = f"{len(files)} pairs: {about}"
        words = (
            "evaluate",
            moved,
            references,
            "--metrics",
            "dice,hd95_mm",
            "--targets",
            named,
            "-o",
            scratch / "tables",
        )
        scores = ("--labels", named.count("="), "--out", scratch / "scores.csv")
        theirs = ("-djfile", raw / "dataset.json", "-pfile", bench.plans(name), "-o", scratch / "summary.json")
        yield from bench.of(
            {
                "delineate": Case(
                    *("evaluation", what, "Delineate"),
                    bench.delineate(*words),
                    lambda: means(bench.scratch / "tables"),
                ),
                "nnunet": Case(
                    *("evaluation", what, "nnU-Net, which has no HD95"),
                    bench.nnunet("nnUNetv2_evaluate_folder", references, moved, *theirs),
                ),
                "monai": Case(
                    *("evaluation", what, "MONAI"),
                    bench.monai("evaluate", moved, references, *scores),
                    lambda: said(bench.log),
                ),
            }
        )


def cases_of(bench: Bench, part: str, sets: Sequence[str], minutes: Sequence[float]) -> list[Case]:
    """The cases of a part. That of memory is every other but ``dice``: memory is measured in each run."""
    if part == "dice":
        return list(dice(bench, sets, minutes))
    parts = {"preparation": preparation, "steps": steps, "evaluation": evaluation, "prediction": prediction}
    chosen = parts.values() if part == "memory" else [parts[part]]
    return [case for make_cases in chosen for case in make_cases(bench, sets)]
