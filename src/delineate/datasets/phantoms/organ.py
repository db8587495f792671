"""Simulated abdomens: an organ like a liver with one to three lesions, and data sets of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms.anatomy import Anatomy, Ellipsoid, Point, SmoothField
from delineate.datasets.phantoms.scanner import LESION, ORGAN, SCANNERS, Scanner
from delineate.io.files import writing_beside
from delineate.io.formats import write_label, write_volume

_TALL = 500.0  # mm: what leaves the field of view above and below


def simulate(rng: np.random.Generator, scanner: Scanner = SCANNERS[0]) -> tuple[Volume, LabelVolume]:
    """A scan (1, X, Y, Z) and its label (1 organ, 2 lesion): another patient for each state of ``rng``."""
    return scanner.acquire(draw_anatomy(rng), rng)


def write_phantoms(out: Path, n: int, seed: int = 0) -> Dataset:
    """Write ``n`` simulated patients as an MSD, with the scanner as the site in sites.csv.

    Patient i is a function of (seed, i), so that more can be added. Raises :class:`OutputError`.
    """
    names = [f"phantom_{i:03}" for i in range(n)]
    for i, name in enumerate(names):
        scan, label = simulate(np.random.default_rng((seed, i)), SCANNERS[i % len(SCANNERS)])
        write_volume(out / "imagesTr" / f"{name}.nii.gz", scan)
        write_label(out / "labelsTr" / f"{name}.nii.gz", label)
    with writing_beside(out / "sites.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        rows = ((name, SCANNERS[i % len(SCANNERS)].name) for i, name in enumerate(names))
        csv.writer(file, lineterminator="\n").writerows([("subject", "site"), *rows])
    about = {
        "name": "simulated abdomen",
        "description": "Simulated scans of two scanners; no patient was imaged.",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", str(ORGAN): "organ", str(LESION): "lesion"},
        "numTraining": n,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": [],
    }
    # Last: a folder without it is no data set, so that one that was stopped half-way is not taken for whole.
    with writing_beside(out / "dataset.json") as path:
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return open_dataset(out)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """An abdomen: about 330 × 230 mm across; the organ 1 to 2 l, on the patient's right."""
    scale = rng.normal(1, 0.05)
    width, depth = scale * rng.normal(165, 8), scale * rng.normal(115, 7)
    fat = rng.uniform(10, 24)
    cavity = Ellipsoid("visceral fat", (0, 4, 0), (width - fat - 9, depth - fat - 8, _TALL), 2.4)
    shift = rng.normal(0, (5, 5, 12))
    size = scale * rng.normal(1, 0.07)
    turn = (rng.normal(0, 8), rng.normal(0, 8))
    right = Ellipsoid("organ", _moved((width - fat - 85, 0, 5), shift), _sized((74, 84, 78), size), 2.2, turn)
    left = Ellipsoid("organ", _moved((8, 42, 28), shift), _sized((rng.normal(68, 9), 34, 42), size), 2, turn)
    return Anatomy(
        surroundings=(
            Ellipsoid("fat", (0, 0, 0), (width, depth, _TALL), 2.4),
            Ellipsoid("muscle", (0, 2, 0), (width - fat, depth - fat, _TALL), 2.4),
            cavity,
            *_skeleton_and_muscles(depth),
            *_other_organs(rng, width - fat, scale),
        ),
        cavity=cavity,
        lobes=(right, left),
        inclusions=_vessels(rng, right),
        lesions=_lesions(rng, right, left),
        covering=(Ellipsoid("fluid", _moved((42, 38, -32), shift), (12, 17, 24), 2, (30, 20)),),  # gallbladder
        deformation=SmoothField.draw(rng, (90.0, 260.0), components=3),
        deformation_mm=rng.uniform(3.0, 5.0),
    )


def _skeleton_and_muscles(depth: float) -> tuple[Ellipsoid, ...]:
    back = 45 - depth  # y of the spine's centre
    return (
        Ellipsoid("muscle", (34, back - 14, 0), (28, 20, _TALL), 2.5),
        Ellipsoid("muscle", (-34, back - 14, 0), (28, 20, _TALL), 2.5),
        Ellipsoid("marrow", (0, back, 0), (22, 18, _TALL), 2.5),
        Ellipsoid("fluid", (0, back - 24, 0), (9, 7, _TALL)),
        Ellipsoid("blood", (-9, back + 27, 0), (10, 10, _TALL)),
        Ellipsoid("blood", (16, back + 26, 0), (11, 9, _TALL)),
    )


def _other_organs(rng: np.random.Generator, width: float, scale: float) -> tuple[Ellipsoid, ...]:
    def near(x: float, y: float, z: float) -> Point:
        return _moved((x, y, z), rng.normal(0, 4, size=3))

    loops = (
        Ellipsoid(
            ("gut", "full gut")[loop % 2],
            (rng.uniform(-100, 80), rng.uniform(-10, 70), rng.uniform(-110, -10)),
            (rng.uniform(18, 36), rng.uniform(12, 18), rng.uniform(12, 24)),
            2,
            (rng.uniform(-70, 70), 0),
        )
        for loop in range(18)
    )
    return (
        *loops,
        Ellipsoid("air", near(65, 0, 145), _sized((70, 80, 70), scale)),  # lungs
        Ellipsoid("air", near(-70, 0, 135), _sized((68, 80, 72), scale)),
        Ellipsoid("kidney", near(60, -42, -55), _sized((27, 24, 52), scale), 2, (25, 8)),
        Ellipsoid("visceral fat", near(50, -40, -55), (9, 8, 24)),
        Ellipsoid("kidney", near(-62, -42, -40), _sized((27, 24, 52), scale), 2, (-25, 8)),
        Ellipsoid("visceral fat", near(-52, -40, -40), (9, 8, 24)),
        Ellipsoid("gut", near(-48, 42, 22), _sized((42, 30, 46), scale), 2, (25, 0)),  # stomach
        Ellipsoid("air", near(-46, 60, 26), (26, 9, 24)),
        Ellipsoid("spleen", near(46 - width, -28, 22), _sized((28, 46, 48), scale), 2, (-20, 0)),
    )


def _vessels(rng: np.random.Generator, lobe: Ellipsoid) -> tuple[Ellipsoid, ...]:
    """Thin and long, running outwards from near the middle of a lobe."""
    return tuple(
        Ellipsoid(
            "blood",
            _moved(lobe.centre_mm, rng.normal(0, 14, size=3)),
            (rng.uniform(30, 48), rng.uniform(3.5, 5.5), rng.uniform(3.5, 5.5)),
            2,
            (angle + rng.normal(0, 12), rng.normal(0, 25)),
        )
        for angle in (10, 70, 130)
    )


def _lesions(rng: np.random.Generator, *lobes: Ellipsoid) -> tuple[Ellipsoid, ...]:
    """One to three, 7 to 24 mm in radius, small ones more often; centres within 0.6 of a lobe's radii."""
    found = []
    for _ in range(rng.integers(1, 4)):
        lobe = lobes[int(rng.random() > 0.75)]
        radius = float(np.clip(rng.lognormal(np.log(13), 0.35), 7, 24))
        direction = rng.normal(size=3)
        place = direction / np.linalg.norm(direction) * 0.6 * rng.random() ** (1 / 3) * lobe.radii_mm
        radii = radius * rng.uniform(0.8, 1.25, size=3)
        found.append(Ellipsoid("lesion", _moved(lobe.centre_mm, place), _moved((0, 0, 0), radii)))
    return tuple(found)


def _moved(point: Point, by: Sequence[float] | NDArray[np.float64]) -> Point:
    x, y, z = (float(a + b) for a, b in zip(point, by, strict=True))
    return x, y, z


def _sized(radii: Point, factor: float) -> Point:
    x, y, z = (float(radius * factor) for radius in radii)
    return x, y, z
