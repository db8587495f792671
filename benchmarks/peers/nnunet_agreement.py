"""How far predictions of imported models agree with nnU-Net's own, for the models that `nnunet_models.py` made.

    python benchmarks/peers/nnunet_agreement.py OUT [PRECISION]

Each model is imported and predicts the same scans with nnU-Net's default settings, in fp32 as nnU-Net does on a CPU,
unless PRECISION is another. Printed for each kind, over its scans: the voxels whose labels differ, the smallest share
of voxels with the same label, the smallest Dice between both predictions of any target, and how many voxels the
smallest target has.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from delineate.bundle import Bundle
from delineate.io.formats import read_label


def main(out: Path, precision: str = "fp32") -> int:
    low = False
    print(f"{'kind':32} {'scans':>5} {'differ':>7} {'same voxels':>12} {'Dice':>8} {'smallest target':>16}")
    for folder in sorted(path.parent for path in out.glob("*/expected")):
        delineate("import", "nnunet", folder / "model", "-o", folder / "bundle", "--overwrite")
        words = ("predict", folder / "bundle", folder / "scans", "-o", folder / "predicted", "--overwrite")
        delineate(*words, "--precision", precision, "--compile", "off")
        targets = Bundle.load(folder / "bundle").targets
        shares, dices, voxels, differ = [], [], [], 0
        for file in sorted((folder / "expected").glob("*.nii.gz")):
            expected, found = read_label(file).voxels, read_label(folder / "predicted" / file.name).voxels
            shares.append(np.mean(expected == found))
            differ += int((expected != found).sum())
            for ours, theirs in zip(targets.masks(found).values(), targets.masks(expected).values(), strict=True):
                voxels.append(int(theirs.sum()))
                both = ours.sum() + theirs.sum()
                dices.append(2 * (ours & theirs).sum() / both if both else 1.0)
        low |= min(shares) < 0.999 or min(dices) < 0.999
        row = f"{len(shares):5} {differ:7} {min(shares):12.5%} {min(dices):8.5f} {min(voxels):16}"
        print(f"{folder.name:32} {row}", flush=True)
    return int(low)


def delineate(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "delineate", *map(str, words), "--quiet"], check=True, stdout=subprocess.PIPE)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
