"""Simulated patients on disk, in the layout of a challenge or a framework."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from delineate.core.limits import usable_cores
from delineate.core.text import near
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import SIMULATED
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms.abdomen import LIVER
from delineate.datasets.phantoms.anatomy import Anatomy
from delineate.datasets.phantoms.brain import EDEMA, ENHANCING, NON_ENHANCING
from delineate.datasets.phantoms.kinds import Kind, kind_named
from delineate.errors import OutputError, RecipeError
from delineate.io.files import writing_beside
from delineate.io.formats import write_label, write_volume
from delineate.io.overwriting import check_folder
from delineate.io.tables import read_table, write_table


def write_phantoms(
    out: Path,
    n: int,
    kind: str = "abdomen",
    *,
    seed: int = 0,
    layout: str | None = None,
    sites: Collection[str] | None = None,
    coarse: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Write ``n`` simulated patients of a kind, in its usual ``layout`` or another that can hold it.

    Patient i is a function of kind, seed and i, so more can be added later: patients in the folder's ``truth.csv`` stay
    as they are, so that what was interrupted resumes. With ``sites``, the patients who are imaged elsewhere are left
    out, so sets of different sites have no patient in common. ``coarse`` divides the number of voxels along each axis
    over the same field of view, down to 8. ``truth.csv`` holds each patient's true values: millilitres of the
    reference, and a liver's fat fraction. Raises :class:`RecipeError` for an unknown kind or site, a factor that is
    not from 1 to 16, or a layout that cannot hold the kind, :class:`OutputError` where ``out`` holds anything but
    simulated patients of this kind, seed, sites and factor.
    """
    chosen = kind_named(kind)
    if not 1 <= coarse <= _COARSEST:
        raise RecipeError(f"coarse is {coarse:g}", fix=f"give a factor from 1 (as they are) to {_COARSEST}")
    chosen, numbers = chosen.coarser(coarse), chosen.patients(n, sites)
    name = layout or chosen.layout
    holding = [other for other, arrangement in ARRANGEMENTS.items() if arrangement.holds(chosen)]
    if name not in holding:
        hint = "" if name in ARRANGEMENTS else near(name, holding)
        raise RecipeError(
            f"layout '{name}' cannot hold simulated scans of kind '{kind}'", fix=f"{', '.join(holding)} can{hint}"
        )
    arrangement = ARRANGEMENTS[name]
    drawn = {
        "kind": kind,
        "seed": seed,
        "sites": [site for site in chosen.sites if sites is None or site in sites],
        "coarse": float(coarse),
    }
    _check_alike(out, drawn, chosen.sites)
    # First, so that no folder of simulated scans is ever taken for patients.
    _write_json(out / SIMULATED, {"simulated": True, "description": chosen.description, **drawn, "patients": n})
    truth = out / "truth.csv"
    there = read_table(truth) if truth.exists() else []
    known: dict[str, Mapping[str, object]] = {row["subject"]: row for row in there}

    def write(i: int) -> Mapping[str, object]:
        scan, label, anatomy = chosen.simulate(seed, i)
        arrangement.write(out, chosen, i, scan, label)
        site = chosen.scanner_of(i).name
        return {"subject": arrangement.subject(chosen, i), "site": site, **_truth(chosen, label, anatomy)}

    subjects = {arrangement.subject(chosen, i): i for i in numbers}
    missing = [i for subject, i in subjects.items() if subject not in known]
    try:
        for done, row in enumerate(_each(write, missing), start=n - len(missing) + 1):
            known[str(row["subject"])] = row
            progress(done, n)
    finally:
        rows = [known[subject] for subject in subjects if subject in known]
        if rows:
            write_table(truth, list(rows[0]), rows)
    if not arrangement.sites_are_folders:
        write_table(out / "sites.csv", ("subject", "site"), rows)
    if arrangement.describe is not None:
        # Last: a folder without it is not a data set, so one that was interrupted is not taken for complete.
        _write_json(out / "dataset.json", arrangement.describe(chosen, numbers))
    if arrangement.by_patterns:
        return open_dataset(out, images=f"*/{chosen.channels[0]}.nii", labels="*/label.nii")
    return open_dataset(out)


def _each(work: Callable[[int], Mapping[str, object]], numbers: Sequence[int]) -> Iterator[Mapping[str, object]]:
    """What ``work`` makes of each number, as they are done, by a thread a core, at most eight: each holds a scan."""
    ahead, threads = iter(numbers), min(8, usable_cores())
    with ThreadPoolExecutor(threads) as pool:
        running: set[Future[Mapping[str, object]]] = set()
        while running := running | {pool.submit(work, i) for i in islice(ahead, threads - len(running))}:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in done)


_COARSEST = 16


def _check_alike(out: Path, drawn: Mapping[str, object], sites: Sequence[str]) -> None:
    """Raise :class:`OutputError` where files from elsewhere would be overwritten or mixed with simulated ones."""
    check_folder(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        about = {"sites": list(sites), "coarse": 1.0} | json.loads((out / SIMULATED).read_text(encoding="utf-8"))
        alike = all(about[name] == value for name, value in drawn.items())
    except (OSError, ValueError, KeyError, TypeError):
        alike = False
    if not alike:
        raise OutputError(
            f"'{out}' holds other files than simulated scans of kind '{drawn['kind']}', seed {drawn['seed']}, with "
            f"these sites and voxels",
            fix="name a new folder",
        )


@dataclass(frozen=True)
class Arrangement:
    """How to write a layout: which kinds it ``holds``, and a patient's files in it.

    ``describe`` makes its dataset.json, if it has one. Sites may be given by folders instead of
    sites.csv, and files by patterns where no layout recognises them.
    """

    holds: Callable[[Kind], bool]
    subject: Callable[[Kind, int], str]
    write: Callable[[Path, Kind, int, Volume, LabelVolume], None]
    describe: Callable[[Kind, Sequence[int]], Mapping[str, object]] | None = None
    sites_are_folders: bool = False
    by_patterns: bool = False


def _name(kind: Kind, i: int) -> str:
    return f"{kind.name.replace('-', '_')}_{i:03}"


def _channel(scan: Volume, k: int) -> Volume:
    return Volume(scan.voxels[k : k + 1], scan.grid)


def _write_msd(out: Path, kind: Kind, i: int, scan: Volume, label: LabelVolume) -> None:
    write_volume(out / "imagesTr" / f"{_name(kind, i)}.nii.gz", scan)
    write_label(out / "labelsTr" / f"{_name(kind, i)}.nii.gz", label)


def _describe_msd(kind: Kind, numbers: Sequence[int]) -> Mapping[str, object]:
    names = [_name(kind, i) for i in numbers]
    return {
        "name": f"simulated {kind.name}",
        "description": kind.description,
        "modality": {str(k): _modality(kind, channel) for k, channel in enumerate(kind.channels)},
        "labels": {"0": "background", **{str(value): part for part, value in _by_value(kind)}},
        "numTraining": len(names),
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": [],
    }


def _write_nnunet(out: Path, kind: Kind, i: int, scan: Volume, label: LabelVolume) -> None:
    for k in range(scan.channels):
        write_volume(out / "imagesTr" / f"{_name(kind, i)}_{k:04}.nii.gz", _channel(scan, k))
    write_label(out / "labelsTr" / f"{_name(kind, i)}.nii.gz", label)


def _describe_nnunet(kind: Kind, numbers: Sequence[int]) -> Mapping[str, object]:
    return {
        "channel_names": {str(k): channel for k, channel in enumerate(kind.channels)},
        "labels": {
            "background": 0,
            **{"ignore" if part in kind.ignored else part: value for part, value in _by_value(kind)},
        },
        "numTraining": len(numbers),
        "file_ending": ".nii.gz",
    }


def _write_promise12(out: Path, kind: Kind, i: int, scan: Volume, label: LabelVolume) -> None:
    write_volume(out / f"Case{i:02}.mhd", scan)
    write_label(out / f"Case{i:02}_segmentation.mhd", label)


def _write_wmh(out: Path, kind: Kind, i: int, scan: Volume, label: LabelVolume) -> None:
    folder = out / kind.scanner_of(i).name / f"{i:03}"
    for k, channel in enumerate(kind.channels):
        write_volume(folder / "pre" / f"{channel}.nii.gz", _channel(scan, k))
    write_label(folder / "wmh.nii.gz", label)


def _write_lits(out: Path, kind: Kind, i: int, scan: Volume, label: LabelVolume) -> None:
    write_volume(out / f"volume-{i}.nii", scan)
    write_label(out / f"segmentation-{i}.nii", label)


_BRATS_CHANNELS = {"FLAIR": "flair", "T1": "t1", "T1c": "t1ce", "T2": "t2"}
_BRATS_VALUES = {NON_ENHANCING: 1, EDEMA: 2, ENHANCING: 4}


def _write_brats(out: Path, kind: Kind, i: int, scan: Volume, label: LabelVolume) -> None:
    name = _name(kind, i)
    for k, channel in enumerate(kind.channels):
        write_volume(out / name / f"{name}_{_BRATS_CHANNELS[channel]}.nii.gz", _channel(scan, k))
    values = np.zeros(max(kind.values.values()) + 1, np.uint8)
    for part, value in kind.values.items():
        values[value] = _BRATS_VALUES[part]
    write_label(out / name / f"{name}_seg.nii.gz", LabelVolume(values[label.voxels], label.grid))


def _write_cases(out: Path, kind: Kind, i: int, scan: Volume, label: LabelVolume) -> None:
    write_volume(out / _name(kind, i) / f"{kind.channels[0]}.nii", scan)
    write_label(out / _name(kind, i) / "label.nii", label)


ARRANGEMENTS: dict[str, Arrangement] = {
    "msd": Arrangement(lambda kind: not kind.ignored, _name, _write_msd, _describe_msd),
    "nnunet": Arrangement(lambda kind: True, _name, _write_nnunet, _describe_nnunet),
    "promise12": Arrangement(
        lambda kind: kind.channels == ("T2",) and len(kind.values) == 1, lambda _, i: f"Case{i:02}", _write_promise12
    ),
    "wmh2017": Arrangement(
        lambda kind: kind.channels == ("FLAIR",),
        lambda kind, i: f"{kind.scanner_of(i).name}_{i:03}",
        _write_wmh,
        sites_are_folders=True,
    ),
    "lits": Arrangement(
        lambda kind: len(kind.channels) == 1 and LIVER in kind.values, lambda _, i: f"volume-{i}", _write_lits
    ),
    "brats": Arrangement(lambda kind: set(kind.values) == set(_BRATS_VALUES), _name, _write_brats),
    "cases": Arrangement(
        lambda kind: len(kind.channels) == 1 and not kind.ignored, _name, _write_cases, by_patterns=True
    ),
}
"""``cases`` has a folder for each patient with the scan and ``label.nii``, opened by patterns."""


def _by_value(kind: Kind) -> list[tuple[str, int]]:
    return sorted(kind.values.items(), key=lambda item: item[1])


def _modality(kind: Kind, channel: str) -> str:
    return channel if len(kind.channels) > 1 else {"MR": "MRI", "CT": "CT"}[kind.modality]


def _truth(kind: Kind, label: LabelVolume, anatomy: Anatomy) -> dict[str, str]:
    """A patient's true values, as columns."""
    truth = {
        f"{part}_ml": f"{np.count_nonzero(label.voxels == value) * label.grid.voxel_ml:.3f}"
        for part, value in kind.values.items()
    }
    if "fat_fraction" in kind.channels:
        truth["fat_fraction_percent"] = f"{100 * anatomy.tissue('liver').fat:.2f}"
    return truth


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    with writing_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
