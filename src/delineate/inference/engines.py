"""Trained networks run by another engine than PyTorch, where a trial shows that it is faster and decides alike.

Both the converted network and what the trial found are kept on the disk, for processes to come.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from math import sqrt
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from delineate.compute import Choice, ComputePlan
from delineate.core.warning_filters import filtered_warnings
from delineate.inference.converted import Converted, Kept, Trial
from delineate.inference.sliding import Network

_MOST_OTHERWISE = 1e-4
"""Of so many voxels, an engine may decide otherwise than PyTorch does in float32."""
_WORTH = 1.1
"""An engine is used if it is faster by this factor."""
_TRIAL_S = 2.0
"""A trial takes about as long; work that PyTorch does sooner needs none."""

_MOST_SHAPES = 8
"""Shapes of input for which what was tried is kept: whole slices may have any size, and a server runs for months."""

Told = Callable[[Choice], object]


class OpenVino:
    """A network compiled by OpenVINO for inputs of one shape: tensors (B, C, *space) with at most ``batch`` inputs.

    Convolutions run in the plan's precision; inputs and outputs are float32.
    """

    def __init__(self, compiled: Any, batch: int) -> None:
        self._compiled, self.batch = compiled, batch

    @classmethod
    def converted(cls, network: nn.Module, example: Tensor, plan: ComputePlan) -> Self:
        """``network`` for inputs like ``example`` (B, C, *space).

        It is traced: its path must depend on nothing but the shape. What tracer or engine cannot take raises errors of
        theirs.
        """
        core = _openvino()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        with _plain_torch():
            traced = torch.jit.trace(network, (example.clone(),), check_trace=False)  # type: ignore[no-untyped-call]
            decoder = TorchScriptPythonDecoder(traced)  # kept by nobody else while the model is converted
            front = FrontEndManager().load_by_framework("pytorch")
            model = front.convert(front.load(decoder))
        model.reshape(list(example.shape))
        return cls(core.compile_model(model, "CPU", _settings(plan)), len(example))

    @classmethod
    def of_kept(cls, kept: Kept, plan: ComputePlan) -> Self:
        """What :attr:`exported` was. Raises errors of OpenVINO's."""
        return cls(_openvino().import_model(kept.exported, "CPU", _settings(plan)), kept.batch)

    @property
    def exported(self) -> bytes:
        """The compiled network, for the same version of OpenVINO on the same kind of processor."""
        exported: bytes = self._compiled.export_model().getvalue()
        return exported

    def __call__(self, x: Tensor) -> Tensor:
        images = np.ascontiguousarray(x.numpy())
        if missing := self.batch - len(x):
            images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        return torch.from_numpy(self._compiled(images)[0][: len(x)])


class Tried:
    """A network that PyTorch runs until OpenVINO has shown that it is faster, for each shape of input on its own.

    ``network`` has the weights, and ``run`` is how PyTorch runs it. The trial compares both on the input at hand. With
    ``exclusive``, the largest output decides about a voxel, otherwise the sign of each. ``told`` hears of the choice.
    Where the plan asks for OpenVINO, it is used however fast it is, unless it decides otherwise.

    Then, and with ``at_once``, the trial comes before the first answer, so that the engine that it chooses gives all of
    them. Otherwise PyTorch gives the first ones. What was ``converted`` and tried by an earlier process is used at
    once.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Network,
        plan: ComputePlan,
        exclusive: bool,
        told: Told,
        converted: Converted | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        self._network, self._run, self._plan, self._exclusive, self._told = network, run, plan, exclusive, told
        self._demanded, self._converted = plan.engine == "openvino", converted
        self._at_once = at_once or self._demanded
        self._seconds: dict[tuple[int, ...], list[float]] = {}
        self._engines: dict[tuple[int, ...], OpenVino | None] = {}
        self._ahead = 0
        self.last: Literal["torch", "openvino"] = "torch"
        """The engine that gave the last answer."""

    def expect(self, passes: int) -> None:
        """So many passes are ahead, as far as is known, which decides how soon a trial pays."""
        self._ahead = passes

    def __call__(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        self.last = "torch"
        self._ahead -= 1
        if shape not in self._seconds:  # the first of its kind
            self._seconds[shape] = []
            if (kept := self._kept(shape)) is not None:
                self._remember(shape, kept)
        if shape not in self._engines:
            began = time.perf_counter()
            answer = self._run(x)
            seconds = self._seconds[shape]
            seconds.append(time.perf_counter() - began)
            if not self._at_once and not trial_pays(seconds, self._ahead):
                return answer
            found, choice = self._try(x, answer, seconds[-1])
            self._told(choice)
            self._remember(shape, found)
            if not self._at_once or found is None:
                return answer
        engine = self._engines[shape] = self._engines.pop(shape)  # the one used last comes last
        if engine is None:
            return self._run(x)
        self.last = "openvino"
        answers = [engine(some) for some in torch.split(x, engine.batch)]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _remember(self, shape: tuple[int, ...], engine: OpenVino | None) -> None:
        while len(self._engines) >= _MOST_SHAPES:
            oldest = next(iter(self._engines))
            del self._engines[oldest], self._seconds[oldest]
        self._engines[shape] = engine

    def _kept(self, shape: tuple[int, ...]) -> OpenVino | None:
        """The engine that an earlier process has tried, if it was found to be fast enough."""
        if self._converted is None or (kept := self._converted.find(shape)) is None:
            return None
        trial = kept.trial
        if not self._demanded and (trial.faster is None or trial.faster <= _WORTH):
            return None
        try:
            engine = OpenVino.of_kept(kept, self._plan)
        except Exception:  # whatever it was: the network can be converted again
            return None
        speed = "as requested" if self._demanded else f"{trial.faster:.1f} times as fast as PyTorch"
        self._told(Choice("engine", "OpenVINO", f"{speed}; {_alike(trial)}, as an earlier trial found"))
        return engine

    def _try(self, x: Tensor, answer: Tensor, torch_s: float) -> tuple[OpenVino | None, Choice]:
        try:
            engine = OpenVino.converted(self._network, x, self._plan)
        except Exception as error:  # whatever it was: this engine cannot, and the other can
            return None, _pytorch(f"OpenVINO cannot run this network: {' '.join(str(error).split())[-300:]}")
        if self._plan.precision != "fp32":
            with _plain_torch():
                answer = self._network(x.float())
        otherwise = self._decisions(engine(x)) != self._decisions(answer)
        count, most = int(otherwise.sum()), _MOST_OTHERWISE * otherwise.numel()
        share = count / otherwise.numel()
        if count > most + 2 * sqrt(most):  # beyond what is chance in so few voxels
            return None, _pytorch(f"OpenVINO decides otherwise for {share:.2%} of the voxels")
        if self._demanded:
            trial, why = Trial(1 - share), "as requested"
        else:
            if self._at_once:  # PyTorch's first pass is no measure of its speed
                torch_s = min(_seconds(self._run, x), _seconds(self._run, x))
            faster = torch_s / min(_seconds(engine, x), _seconds(engine, x))
            trial, why = Trial(1 - share, faster), f"{faster:.1f} times as fast as PyTorch here"
            if faster <= _WORTH:
                return None, _pytorch(f"OpenVINO is {why}; {_alike(trial)}")
        self._keep(tuple(x.shape[1:]), engine, trial)
        return engine, Choice("engine", "OpenVINO", f"{why}; {_alike(trial)}")

    def _keep(self, shape: tuple[int, ...], engine: OpenVino, trial: Trial) -> None:
        if self._converted is None:
            return
        with suppress(Exception):  # the next process can convert it again
            self._converted.keep(shape, Kept(engine.exported, engine.batch, trial))

    def _decisions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1) if self._exclusive else outputs > 0


def _seconds(run: Network, x: Tensor) -> float:
    began = time.perf_counter()
    run(x)
    return time.perf_counter() - began


def trial_pays(seconds: Sequence[float], ahead: int) -> bool:
    """Whether to try another engine, after passes that took PyTorch so many ``seconds`` and with others ``ahead``.

    It pays once PyTorch has run for as long as a trial takes, or would for what is ahead. The first pass takes longer
    than the others and is no measure.
    """
    return len(seconds) > 1 and max(sum(seconds), seconds[-1] * ahead) > _TRIAL_S


def _alike(trial: Trial) -> str:
    return f"{trial.alike:.3%} of the voxels are decided alike"


@cache
def _openvino() -> Any:
    """OpenVINO's ``Core``: one, kept to the end of the process.

    Each has a stack of its own for signals, with room for the AMX registers, and lays it down when it goes. Of two that
    go in the order in which they came, the second gives the process back the first's, which is not there any more, and
    the next Ctrl-C is a segmentation fault.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or it reports each import
    import openvino

    return openvino.Core()


def _settings(plan: ComputePlan) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if plan.precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": plan.threads,
    }


def _pytorch(why: str) -> Choice:
    return Choice("engine", "PyTorch", why)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """PyTorch as a tracer needs it: without gradients, inference tensors or autocast, and silent about constants."""
    with (
        filtered_warnings("ignore"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield
