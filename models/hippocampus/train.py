"""Train the model of this package, measure it, and put its bundle into the package: one command after another.

``python models/hippocampus/train.py --data Task04_Hippocampus --out RUN --minutes 60``

``split.json`` is fixed: a fifth of the subjects is its test set, which takes part in nothing but the last measurement.
Fold 0 of the others is held out, and makes the intervals. Run the same command again to resume.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUNDLE = HERE / "src" / "delineate_hippocampus"
WIDTHS = "network.widths=[16,40,80,128]"  # the packaged recipe's, made to fit into the package
MOST_BYTES = 8_000_000


def delineate(*words: object) -> None:
    """Run one command of the product, shown as it is typed."""
    texts = [str(word) for word in words]
    print("delineate", *texts, flush=True)
    subprocess.run([sys.executable, "-m", "delineate", *texts], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="task 4 of the Medical Segmentation Decathlon")
    parser.add_argument("--out", type=Path, required=True, help="the run, the test and the packed model")
    parser.add_argument("--minutes", type=float, required=True, help="time to train for")
    asked = parser.parse_args()
    run, split = asked.out / "run", HERE / "split.json"
    delineate(
        *("train", "hippocampus", "--data", asked.data, "-o", run, "--split", split, "--fold", 0),
        *("--minutes", asked.minutes, "--set", WIDTHS),
    )
    # What the author says; the facts are added to it when the test is.
    shutil.copyfile(HERE / "card.md", run / "bundle" / "card.md")
    locked = asked.out / "test.json"
    locked.write_text(json.dumps(as_fixed(json.loads(split.read_text(encoding="utf-8")))), encoding="utf-8")
    delineate(
        *("test", run, "--data", asked.data, "--split", locked, "-o", asked.out / "test"),
        *("--card", "Decathlon task 4, a fifth that was locked away"),
    )
    delineate("card", run, "-o", asked.out / "card.html", "--overwrite")
    packed = asked.out / "delineate-hippocampus.zip"
    delineate("models", "pack", run, "-o", packed, "--overwrite")
    size = packed.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{packed} has {size:,} bytes, more than {MOST_BYTES:,}: the network is too large")
    delineate("models", "fetch", packed, "-o", BUNDLE, "--overwrite")


def as_fixed(split: dict[str, object]) -> dict[str, object]:
    """The split with everything but its test set for training, by which `delineate test` measures the test set."""
    folds = split.pop("folds")
    assert isinstance(folds, list)
    return {**split, "training": sorted(name for fold in folds for name in fold)}


if __name__ == "__main__":
    main()
