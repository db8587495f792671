"""Environments of their own for the peers, from the package index.

    python benchmarks/peers/environments.py FOLDER [nnunet] [monai]

``FOLDER/PEER`` holds exactly the versions of ``PEER.txt`` beside this file. torch is not among them: it is linked
from the Python that runs this, so that every tool computes with the same build, and the disk holds it once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

PEERS = ("nnunet", "monai")


def python_of(folder: Path, peer: str) -> Path:
    return folder / peer / "bin" / "python"


def make(folder: Path, peer: str) -> None:
    """Make the environment of ``peer``; one that was made from the same versions stays as it is."""
    wanted = Path(__file__).with_name(f"{peer}.txt")
    environment = folder / peer
    made_from = environment / "made_from.txt"
    if made_from.exists() and made_from.read_bytes() == wanted.read_bytes():
        return
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    link_torch(packages)
    # PEER.txt names all dependencies but torchvision, whose build in the index cannot be imported beside a CPU's torch.
    install = [str(python_of(folder, peer)), "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"]
    subprocess.run([*install, "-r", wanted], check=True)
    # nnU-Net imports its transformers, which need torchvision, whenever it looks for a trainer by name.
    shutil.rmtree(packages / "nnunetv2/training/nnUNetTrainer/primus", ignore_errors=True)
    shutil.copy(wanted, made_from)


def link_torch(packages: Path) -> None:
    torch = distribution("torch")
    names = {file.parts[0] for file in torch.files or ()} - {"..", "bin", "share"}
    for name in sorted(names):
        (packages / name).symlink_to(Path(str(torch.locate_file(name))).resolve())


if __name__ == "__main__":
    for name in sys.argv[2:] or PEERS:
        make(Path(sys.argv[1]).resolve(), name)
