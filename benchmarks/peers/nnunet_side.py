"""What nnU-Net has no command for: training for so many steps, or until a moment, by its own trainer.

Runs in nnU-Net's environment, with nnU-Net's folders in the environment variables:

    python nnunet_side.py DATASET_NUMBER [--steps N | --until UNIX_TIME] [--patch N N N] [--batch N]

The learning rate falls over the steps or the time as nnU-Net's does over its 1000 epochs, and epochs are a tenth as
long, with the same share of validation, so that several fit into minutes on a CPU. All else is nnU-Net's: network,
loader, augmentation, loss, optimiser.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CONFIGURATION = "3d_fullres"


class Timed(nnUNetTrainer):
    steps: int | None = None
    until: float = math.inf

    def prepare_to_count(self, steps: int | None, until: float) -> None:
        self.steps, self.until = steps, until
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 25, 5
        self.started, self.ended = time.time(), []

    def progress(self) -> float:
        if self.steps is not None:
            return len(self.ended) / self.steps
        now = time.time()
        return 1.0 if now >= self.until else (now - self.started) / (self.until - self.started)

    def train_step(self, batch: dict) -> dict:
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * (1 - min(self.progress(), 0.999)) ** 0.9
        out = super().train_step(batch)
        self.ended.append(time.time())
        return out

    def run_training(self) -> None:
        """nnU-Net's own loop, except for when it ends."""
        if self.progress() >= 1:
            sys.exit("preparing took all the time; none is left to train")
        self.on_train_start()
        while self.progress() < 1:
            self.on_epoch_start()
            self.on_train_epoch_start()
            outputs = []
            while len(outputs) < self.num_iterations_per_epoch and self.progress() < 1:
                outputs.append(self.train_step(next(self.dataloader_train)))
            if not outputs:
                break
            self.on_train_epoch_end(outputs)
            with torch.no_grad():
                self.on_validation_epoch_start()
                count = 1 if self.progress() >= 1 else self.num_val_iterations_per_epoch
                self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in range(count)])
            self.on_epoch_end()
        self.on_train_end()


# Checkpoints name their trainer, and nnUNetv2_predict looks for it among nnU-Net's own.
Timed.__name__ = "nnUNetTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--until", type=float, default=math.inf)
    parser.add_argument("--patch", type=int, nargs=3, help="train on smaller patches than those of the plans")
    parser.add_argument("--batch", type=int)
    options = parser.parse_args()
    torch.set_num_threads(multiprocessing.cpu_count())  # as nnUNetv2_train does for a CPU
    [folder] = Path(nnUNet_preprocessed.get()).glob(f"Dataset{options.number:03}_*")
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    configuration = plans["configurations"][CONFIGURATION]
    planned = {key: configuration[key] for key in ("patch_size", "batch_size")}
    configuration["patch_size"] = options.patch or planned["patch_size"]
    configuration["batch_size"] = options.batch or planned["batch_size"]
    trainer = Timed(
        plans={**plans, "continue_training": False},
        configuration=CONFIGURATION,
        fold=0,
        dataset_json=json.loads((folder / "dataset.json").read_text(encoding="utf-8")),
        device=torch.device("cpu"),
    )
    trainer.prepare_to_count(options.steps, options.until)
    trainer.run_training()
    if options.patch or options.batch:
        # A network that was trained on smaller patches predicts in those of the plans.
        written = Path(trainer.output_folder_base) / "plans.json"
        kept = json.loads(written.read_text(encoding="utf-8"))
        kept["configurations"][CONFIGURATION].update(planned)
        written.write_text(json.dumps(kept), encoding="utf-8")
    print("measured:", json.dumps({"ended": trainer.ended}), flush=True)


if __name__ == "__main__":
    main()
