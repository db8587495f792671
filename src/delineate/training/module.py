"""One training step: augment, predict, loss, optimiser; and the averaged weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from delineate.bundle import Bundle
from delineate.compute import ComputePlan
from delineate.core.limits import usable_cores
from delineate.errors import OutOfMemory, RecipeError, TrainingError
from delineate.fitting import judged_in_parts, more_parts
from delineate.losses.content import adversaries
from delineate.losses.spec import build_loss
from delineate.networks.blocks import Recomputing
from delineate.networks.transfer import NORMS, free_norms, hold_frozen_norms, matching
from delineate.networks.unet import UNet
from delineate.recipe import OptimiserSpec, TrainingSpec
from delineate.sampling.batches import Batch, BatchSource
from delineate.training.events import Divided
from delineate.training.options import Reporter


@dataclass
class Budget:
    """The budget of a training and how much of it is spent; the clock runs only during training."""

    steps: int | None
    seconds: float | None
    spent_seconds: float = 0.0
    _since: float | None = None

    @classmethod
    def of(cls, spec: TrainingSpec, steps_an_epoch: int) -> Budget:
        """A recipe's, whose epochs have so many steps: whichever of its limits comes first."""
        limits = [spec.steps, None if spec.epochs is None else spec.epochs * steps_an_epoch]
        steps = min((limit for limit in limits if limit is not None), default=None)
        return cls(steps, None if spec.minutes is None else spec.minutes * 60)

    def start(self) -> None:
        self._since = time.monotonic()

    def elapsed(self) -> float:
        return self.spent_seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def progress(self, step: int) -> float:
        """Share of the budget that is spent, 0 … 1: the larger of steps and time."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.seconds is not None:
            shares.append(self.elapsed() / self.seconds)
        return min(1.0, max(shares))


class Foreground(NamedTuple):
    """Voxels of any target in the reference and in the prediction of a batch, and all of its voxels."""

    reference: int
    predicted: int
    voxels: int

    def plus(self, other: Foreground) -> Foreground:
        return Foreground(*(a + b for a, b in zip(self, other, strict=True)))


_MOST_PREPARING = 8
"""Threads that prepare subjects to come; each holds one in memory."""


class BatchStream(IterableDataset):
    """Batches from the current step on; the next is read while the network works on this one.

    Subjects that are not at hand, since the disk may not hold all, are prepared long before they are needed.
    """

    def __init__(self, module: Delineator) -> None:
        self.module = module

    def __iter__(self) -> Iterator[Batch]:
        # The step of a resumed training is known only once Lightning has restored it.
        i, source = self.module.global_step, self.module.source
        threads = max(1, min(_MOST_PREPARING, usable_cores() - 1))
        with ThreadPoolExecutor(max_workers=1) as reader, ThreadPoolExecutor(threads) as preparing:
            following = reader.submit(source.batch, i)
            # What fails here fails again, and is raised, once the subject is read.
            for soon in range(i + 1, i + source.ahead):
                preparing.submit(source.fetch, soon)
            try:
                while True:
                    batch, i = following.result(), i + 1
                    following = reader.submit(source.batch, i)
                    if source.ahead:
                        preparing.submit(source.fetch, i + source.ahead)
                    yield batch
            finally:
                preparing.shutdown(wait=True, cancel_futures=True)


class Delineator(lightning.LightningModule):
    """A network in training, its averaged copy, and the budget.

    ``parts``: into how many equal parts a batch is divided, one after the other in memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        network: nn.Module,
        plan: ComputePlan,
        source: BatchSource,
        budget: Budget,
        report: Reporter,
    ) -> None:
        super().__init__()
        self.bundle, self.plan, self.source, self.budget, self.report = bundle, plan, source, budget, report
        self.spec = bundle.recipe.training
        self.dimensions = bundle.recipe.network.dimensions
        # Lightning moves the module to its device later.
        self.network = replace(plan, device=torch.device("cpu")).place(network, self.dimensions)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False) if self.spec.ema else None
        for part in self.network.modules():
            if isinstance(part, Recomputing) and (self.spec.checkpoint_activations or part.recompute is not None):
                part.recompute = plan.again
        self.parts = self.spec.accumulate
        # Part of the module, so that any parameters of the loss are saved and restored.
        self.loss = build_loss(bundle.recipe.loss, bundle.targets)

        def predict_and_judge(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.network(image)
            finest = logits if isinstance(logits, Tensor) else logits[0]
            return self.loss(logits, target, image), finest.detach()

        # Network and loss in one compiled graph: softmax and sums fuse with the preceding operations.
        self._predict_and_judge = plan.compiled(predict_and_judge)
        # Reading a loss makes a GPU wait, but costs nothing on a CPU.
        self.log_every = 1 if plan.device.type == "cpu" else 10
        self._progress = 0.0
        self.last_loss = float("nan")
        self.foreground = Foreground(0, 0, 0)

    @property
    def kept_network(self) -> nn.Module:
        """The network that is validated and saved: the averaged one, if there is one."""
        return self.network if self.averaged is None else self.averaged

    def refresh_statistics(self) -> None:
        """Recompute the BatchNorm statistics for the weights that are kept, on training tiles.

        Moving statistics lag behind: they remember earlier weights and, in a short training, the start.
        Frozen BatchNorms keep theirs, and so do all if the recipe keeps the moving ones. The same tiles are used each
        time, in every process.
        """
        if self.spec.norm_statistics == "moving":
            return
        kept = self.kept_network
        norms = [
            norm
            for norm, trained in zip(kept.modules(), self.network.modules(), strict=True)
            if isinstance(norm, NORMS) and any(p.requires_grad for p in trained.parameters())
        ]
        if not norms:
            return
        was_training = [module.training for module in kept.modules()]
        momenta = [norm.momentum for norm in norms]
        kept.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
        source = self.source.for_process(0, 1)
        with torch.no_grad(), self.plan.autocast():
            for i in range(min(32, max(4, -(-64 // source.batch_size)))):
                for some in self._seen(source, source.batch(i))[0].chunk(self.parts):
                    kept(some)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in zip(kept.modules(), was_training, strict=True):
            module.training = training

    def _seen(self, source: BatchSource, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and target of a batch as the network sees them: on its device, augmented, in the plan's layout."""
        image, target, spacing_mm = (part.to(self.device) for part in (batch.image, batch.target, batch.spacing_mm))
        image, target = source.augmented(Batch(image, target, spacing_mm, batch.number), self.spec.seed)
        return image.contiguous(memory_format=self.plan.memory_format(self.dimensions)), target

    def loss_on(self, source: BatchSource, i: int) -> float:
        """The loss of the current weights on batch ``i`` of ``source``, in as many parts as training divides one into.

        It is for comparison with the training loss, and so of all outputs of a deeply supervised network.

        Dropout is off, and BatchNorms use batch statistics as in training: their moving statistics
        lag behind and would make the loss of a good network look bad.
        """
        image, target = self._seen(source, source.batch(i))
        norms = free_norms(self.network)
        self.network.eval()
        for module in self.network.modules():
            if isinstance(module, UNet):
                module.training = True  # without its layers: it gives all its outputs, and these stay as they are
        for norm in norms:
            norm.train()
            norm.track_running_stats = False
        with torch.no_grad(), self.plan.autocast():
            # Not the compiled graph, which would be compiled again for evaluation mode.
            parts = zip(image.chunk(self.parts), target.chunk(self.parts), strict=True)
            losses = [float(self.loss(self.network(some), reference, some)) for some, reference in parts]
        for norm in norms:
            norm.track_running_stats = True
        self.network.train()
        hold_frozen_norms(self.network)
        return sum(losses) / len(losses)

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, the same on every process."""
        return self._progress

    def setup(self, stage: str) -> None:
        # The rank of this process and the world size are known only now.
        self.source = self.source.for_process(self.global_rank, self.trainer.world_size)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        step = self.global_step
        # Dropout draws from the global generator: seeded by step, so that a resumed run draws the same.
        torch.manual_seed(int(np.random.SeedSequence((self.spec.seed, 3, self.global_rank, step)).generate_state(1)[0]))
        image, target = self._seen(self.source, batch)
        for optimiser in self.trainer.optimizers:
            optimiser.zero_grad()
        losses: list[Tensor] = []
        counted = Foreground(0, 0, 0)
        for some, reference in zip(image.chunk(self.parts), target.chunk(self.parts), strict=True):
            if losses:
                # Of the part before; the last one's gradients are Lightning's to ask for.
                with torch.autocast(self.plan.device.type, enabled=False):
                    self.trainer.strategy.backward(losses[-1], None)
                losses[-1] = losses[-1].detach()
            loss, logits = self._predict_and_judge(some, reference)
            losses.append(loss / self.parts)
            if step % 25 == 0:
                counted = counted.plus(self._foreground(logits, reference))
        if step % 25 == 0:
            self.foreground = counted
        if step % self.log_every == 0:
            self.last_loss = sum(float(loss.detach()) for loss in losses)
            if not math.isfinite(self.last_loss):
                raise TrainingError(
                    f"the loss is {self.last_loss} at step {step}, so nothing more can be learnt",
                    fix=(
                        "try --precision fp32, or a lower learning rate "
                        f"(--set training.optimiser.learning_rate={self.learning_rate / 3:.1g}), in a new folder"
                    ),
                )
        return losses[-1]

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: Lightning would forget the gradients of all parts of a batch but the last."""

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        multiple = self.spec.schedule.multiple(self.progress, self.global_step, self.source.steps_an_epoch)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = group["initial_lr"] * multiple
        hold_frozen_norms(self.network)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        while not self._fitted(*args, **kwargs):
            if self.plan.device.type == "cuda":
                torch.cuda.empty_cache()
        step = self.global_step
        if step % self.log_every == 0:
            # Immediately, not through Lightning's `log`, which writes after the state is saved: a run killed in
            # between would lose this row for good.
            for logger in self.loggers:
                logger.log_metrics({"loss": self.last_loss, "learning_rate": self.learning_rate}, step)
        # Here rather than after the batch, so that a state saved after the batch includes these.
        self._average(step + 1)
        self.update_progress(step + 1)

    def _fitted(self, *args: Any, **kwargs: Any) -> bool:
        """Take a step; if it does not fit into the GPU's memory, divide the batch further instead.

        Memory runs out before the weights are changed. What holds on to the failed step is gone when this returns.
        """
        try:
            super().optimizer_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            said = str(error).splitlines()[0]
        else:
            return True
        parts = more_parts(self.bundle.recipe, self.parts)
        # Processes that train together would each have to divide their batch at the same step.
        if parts is None or self.trainer.world_size > 1:
            raise OutOfMemory(
                f"a step does not fit into the GPU's memory, in {self.parts} parts of its batch ({said})"
                if self.parts > 1
                else f"a step does not fit into the GPU's memory ({said})",
                fix="`delineate plan` tries what fits",
            )
        self.parts = parts
        self.report.event(
            Divided(
                step=self.global_step,
                batch_size=self.spec.batch_size,
                parts=parts,
                differing=judged_in_parts(self.bundle.recipe),
            )
        )
        return False

    def update_progress(self, steps: int) -> None:
        """Read the clock; process 0 decides for all, so that they stop at the same step."""
        progress = self.budget.progress(steps)
        if self.trainer.world_size > 1:
            progress = float(self.trainer.strategy.broadcast(progress, src=0))
        self._progress = progress

    @property
    def learning_rate(self) -> float:
        return float(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A fused step unscales gradients itself, too late for clipping, so it cannot be used with loss scaling.
        fused = self.plan.precision != "fp16"
        return build_optimiser(self.spec.optimiser, self.network, adversaries(self.loss), fused=fused)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning refuses to clip with any fused optimiser, although without loss scaling nothing is unscaled.
        if self.spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.spec.clip_norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["spent_seconds"] = self.budget.elapsed()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.budget.spent_seconds = float(checkpoint["spent_seconds"])

    def on_train_end(self) -> None:
        self.refresh_statistics()

    def on_train_start(self) -> None:
        for optimiser in self.trainer.optimizers:
            match_memory_formats(optimiser)
        self.budget.start()
        self.update_progress(self.global_step)

    def _average(self, steps: int) -> None:
        """Move the averaged weights towards the current ones (Polyak & Juditsky 1992)."""
        if self.averaged is None:
            return
        # With the full decay, the average would remember the random start for a long time.
        decay = min(self.spec.ema, (1 + steps) / (10 + steps))
        with torch.no_grad():
            averaged: list[Tensor] = list(self.averaged.parameters())
            current: list[Tensor] = list(self.network.parameters())
            torch._foreach_lerp_(averaged, current, 1 - decay)
            for kept, now in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                kept.copy_(now)

    def _foreground(self, logits: Tensor, target: Tensor) -> Foreground:
        """The voxels of any target in some of a batch, in the reference and in the prediction."""
        exclusive = self.bundle.targets.exclusive
        predicted = (logits.argmax(1) > 0) if exclusive else (logits > 0).any(1)
        reference = (target != 0) & (target != 255)
        return Foreground(int(reference.sum()), int(predicted.sum()), predicted.numel())


def build_optimiser(
    spec: OptimiserSpec,
    network: nn.Module,
    adversaries: Sequence[tuple[list[nn.Parameter], float]] = (),
    *,
    fused: bool,
) -> torch.optim.Optimizer:
    """The optimiser; weight decay applies to kernels only, not to biases and normalisation.

    Every group has an ``initial_lr``, which the schedule multiplies. ``adversaries`` are maximised.
    Raises :class:`RecipeError` for a pattern in ``rates`` that matches no parameter.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    fitting: set[str] = set()
    for name, parameter in network.named_parameters():
        pattern = next((p for p in spec.rates if matching([name], [p])), None)
        if pattern is not None:
            fitting.add(pattern)
        if parameter.requires_grad:
            rate = spec.learning_rate * (1.0 if pattern is None else spec.rates[pattern])
            groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
    unused = [p for p in spec.rates if p not in fitting]
    if unused:
        first = next(name for name, _ in network.named_parameters())
        raise RecipeError(f"optimiser.rates: no parameter matches '{unused[0]}'", fix=f"use names such as '{first}'")
    described: list[dict[str, Any]] = [
        {"params": parameters, "initial_lr": rate, "weight_decay": spec.weight_decay if decayed else 0.0}
        for (rate, decayed), parameters in groups.items()
    ]
    described += [
        {"params": parameters, "initial_lr": rate, "weight_decay": 0.0, "maximize": True}
        for parameters, rate in adversaries
    ]
    if not described:
        raise RecipeError("everything is frozen: nothing is left to train", fix="remove a pattern from training.frozen")
    if spec.kind == "sgd":
        return torch.optim.SGD(described, lr=spec.learning_rate, momentum=spec.beta1, nesterov=spec.beta1 > 0)
    kind = torch.optim.AdamW if spec.kind == "adamw" else torch.optim.Adam
    return kind(described, lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), fused=fused)


def match_memory_formats(optimiser: torch.optim.Optimizer) -> None:
    """Give restored moments the same memory layout as their parameters.

    Fused optimisers walk through memory without checking strides: a contiguous moment beside a
    channels-last parameter would be paired with the wrong weights, without any error.
    """
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
