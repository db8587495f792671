#!/bin/sh
# An environment of its own for nnU-Net, from the package index: sh benchmarks/peers/environment.sh FOLDER
set -e
python3.11 -m venv "$1"
"$1/bin/pip" install "torch==2.13.0+cpu" "nnunetv2==2.8.1" --extra-index-url https://download.pytorch.org/whl/cpu
# The index's torchvision is built for another torch than the CPU's, and breaks what imports it. Only the transformers
# do, by way of timm; nnU-Net imports them when it looks for a trainer by name.
"$1/bin/pip" uninstall -y torchvision
rm -r "$1"/lib/python3.11/site-packages/nnunetv2/training/nnUNetTrainer/primus
