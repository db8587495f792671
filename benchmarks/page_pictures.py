"""The pages as shown in docs/images/page-*.png, opened in Chromium at 390 and 1280 pixels.

    python benchmarks/page_pictures.py docs/images [WORK]

All scans are simulated and all trainings are short: the run, the study and the adaptation are real but small, the fat
fractions and the comparison measure references that were shifted and eroded on purpose. What is finished in WORK
(default: a temporary folder) is kept; on two cores it takes some ten minutes. Needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import load_label, load_scan
from delineate.datasets.layouts import open_dataset
from delineate.io.formats import write_label

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HEIGHTS = {390: 2200, 1280: 1700}
"""How much of each page is shown, by width (pixels)."""
COLOURS = 96
STUDY = {
    "name": "losses",
    "question": "Which loss outlines simulated livers better after a few steps?",
    "recipe": "demo",
    "arms": {
        "dice": {"set": ["loss={kind: dice}"]},
        "cross-entropy": {"set": ["loss={kind: cross_entropy}"]},
    },
    "design": {"kind": "cross_validation", "folds": 2},
    "sizes": {"quick": {"set": ["training.minutes=null", "training.steps=60"]}},
}


def delineate(*arguments: object, made: Path) -> None:
    """Run a command, unless what it makes is there."""
    if not made.exists():
        subprocess.run([sys.executable, "-m", "delineate", *map(str, arguments)], check=True)


def degrade(scans: Path, out: Path, *, shift: int, erode: int) -> Path:
    """Write the references of a data set, shifted and eroded by voxels that differ from subject to subject."""
    dataset = open_dataset(scans)
    out.mkdir(exist_ok=True)
    for i, subject in enumerate(dataset.subjects):
        label = load_label(subject, dataset.targets, load_scan(subject, subject.channels[:1]).grid)
        kept = label.voxels > 0
        if n := (i + erode) % 4:
            kept = ndimage.binary_erosion(kept, iterations=n)
        moved = np.roll(label.voxels * kept, shift * (1 + i % 3), axis=0)
        write_label(out / f"{subject.id}.nii.gz", LabelVolume(moved, label.grid))
    return out


def pages(work: Path) -> dict[str, Path]:
    """Every kind of page."""
    livers, fat, new = work / "livers", work / "fat", work / "new"
    delineate("data", "phantom", "abdomen", "-n", 20, "-o", livers, made=livers)
    delineate("data", "phantom", "liver-fat", "-n", 18, "--coarse", 2, "-o", fat, made=fat)
    delineate("data", "phantom", "abdomen", "-n", 6, "--seed", 7, "-o", new, made=new)
    run, study, adapted = work / "run", work / "study", work / "adapted"
    short = ["--set", "training.minutes=null", "--set", "training.steps=300", "--set", "training.validation.times=12"]
    delineate("train", "demo", "--data", livers, "-o", run, *short, made=run / "report.html")
    delineate("adapt", run, "--data", new, "--steps", 20, "-o", adapted, made=adapted / "report.html")
    written = work / "study.yaml"
    written.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    delineate("study", "run", written, "--data", livers, "-o", study, made=study / "report.html")
    measured = {}
    for name, (shift, erode) in {"careful": (0, 0), "hasty": (2, 1)}.items():
        predicted, page = degrade(fat, work / name, shift=shift, erode=erode), work / f"{name}.html"
        read = ["--quantity", "fat_fraction", "--margin-mm", 3]
        measured[name] = work / f"measured-{name}"
        delineate("evaluate", predicted, fat, *read, "-o", measured[name], "--report", page, made=page)
    compared = work / "compared.html"
    both = [f"{name}={folder}" for name, folder in measured.items()]
    delineate("compare", *both, "--report", compared, made=compared)
    return {
        "run": run / "report.html",
        "fat": work / "hasty.html",
        "comparison": compared,
        "study": study / "report.html",
        "adaptation": adapted / "report.html",
    }


def photograph(page: Path, width: int, out: Path) -> None:
    """Write a picture of the top of a page, ``width`` pixels wide."""
    assert BROWSER is not None, "there is no Chromium to open pages in; apt-get install chromium"
    height = HEIGHTS[width]
    with tempfile.TemporaryDirectory() as folder:
        # A window cannot be as narrow as a phone; a frame within it can.
        frame, taken = Path(folder) / "frame.html", Path(folder) / "taken.png"
        style = f"border: 0; display: block; width: {width}px; height: {height}px"
        shown = f'<body style="margin: 0"><iframe src="{page.resolve().as_uri()}" style="{style}"></iframe>'
        frame.write_text(shown, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=4000"]
        options += [f"--window-size={max(width, 600)},{height}", f"--screenshot={taken}"]
        subprocess.run([BROWSER, *options, frame.as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(taken) as picture:
            shown = picture.convert("RGB").crop((0, 0, width, height)).quantize(COLOURS)
            shown.save(out, optimize=True)


def main() -> None:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name, page in pages(work).items():
            for width in HEIGHTS:
                photograph(page, width, out / f"page-{name}-{width}.png")


if __name__ == "__main__":
    main()
