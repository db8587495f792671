"""Trained networks run by another engine than PyTorch, where a trial shows that it is faster and decides alike."""

from __future__ import annotations

import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import sqrt
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from delineate.compute import Choice, ComputePlan
from delineate.inference.sliding import Network

_MOST_OTHERWISE = 1e-4
"""Of so many voxels, an engine may decide otherwise than PyTorch does in float32."""
_WORTH = 1.1
"""An engine is used if it is faster by this factor."""
_TRIAL_AFTER_S = 2.0
"""A trial takes about as long; work that PyTorch does sooner needs none."""
_MOST_SHAPES = 8
"""Shapes of input for which what was tried is kept: whole slices may have any size, and a server runs for months."""

Told = Callable[[Choice], object]


class OpenVino:
    """A network compiled by OpenVINO for inputs of one shape: tensors (B, C, *space) like ``example``, or fewer than B.

    Convolutions run in the plan's precision; inputs and outputs are float32. The network is traced: its path must
    depend on nothing but the shape. What tracer or engine cannot take raises errors of theirs.
    """

    def __init__(self, network: nn.Module, example: Tensor, plan: ComputePlan) -> None:
        core = _openvino()
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        with _plain_torch():
            traced = torch.jit.trace(network, (example.clone(),), check_trace=False)  # type: ignore[no-untyped-call]
            decoder = TorchScriptPythonDecoder(traced)  # kept by nobody else while the model is converted
            front = FrontEndManager().load_by_framework("pytorch")
            model = front.convert(front.load(decoder))
        model.reshape(list(example.shape))
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if plan.precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": plan.threads,
        }
        self._compiled = core.compile_model(model, "CPU", settings)
        self.batch = len(example)

    def __call__(self, x: Tensor) -> Tensor:
        images = np.ascontiguousarray(x.numpy())
        if missing := self.batch - len(x):
            images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        return torch.from_numpy(self._compiled(images)[0][: len(x)])


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


class Tried:
    """A network that PyTorch runs until OpenVINO has shown that it is faster, for each shape of input on its own.

    ``network`` has the weights, and ``run`` is how PyTorch runs it. The trial compares both on the input at hand. With
    ``exclusive``, the largest output decides about a voxel, otherwise the sign of each. ``told`` hears of the choice.
    Where the plan asks for OpenVINO, it is used however fast it is, unless it decides otherwise.

    Then, and with ``at_once``, the trial comes before the first answer, so that the engine that it chooses gives all of
    them. Otherwise PyTorch gives those of the first seconds.
    """

    def __init__(
        self, network: nn.Module, run: Network, plan: ComputePlan, exclusive: bool, told: Told, *, at_once: bool = False
    ) -> None:
        self._network, self._run, self._plan, self._exclusive, self._told = network, run, plan, exclusive, told
        self._demanded = plan.engine == "openvino"
        self._at_once = at_once or self._demanded
        self._seconds: dict[tuple[int, ...], float] = defaultdict(float)
        self._engines: dict[tuple[int, ...], OpenVino | None] = {}
        self.last: Literal["torch", "openvino"] = "torch"
        """The engine that gave the last answer."""

    def __call__(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[1:])
        self.last = "torch"
        if shape not in self._engines:
            began = time.perf_counter()
            answer = self._run(x)
            took = time.perf_counter() - began
            self._seconds[shape] += took
            if not self._at_once and self._seconds[shape] <= _TRIAL_AFTER_S:
                return answer
            found, choice = self._try(x, answer, took)
            self._told(choice)
            while len(self._engines) >= _MOST_SHAPES:
                del self._engines[next(iter(self._engines))]
            self._engines[shape] = found
            if not self._at_once or found is None:
                return answer
        engine = self._engines[shape] = self._engines.pop(shape)  # the one used last comes last
        if engine is None:
            return self._run(x)
        self.last = "openvino"
        return torch.cat([engine(some) for some in torch.split(x, engine.batch)])

    def _try(self, x: Tensor, answer: Tensor, torch_s: float) -> tuple[OpenVino | None, Choice]:
        try:
            engine = OpenVino(self._network, x, self._plan)
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
        alike = f"{1 - share:.3%} of the voxels are decided alike"
        if self._demanded:
            return engine, Choice("engine", "OpenVINO", f"as requested; {alike}")
        if self._at_once:  # PyTorch's first pass is no measure of its speed
            torch_s = min(_seconds(self._run, x), _seconds(self._run, x))
        openvino_s = min(_seconds(engine, x), _seconds(engine, x))
        why = f"{torch_s / openvino_s:.1f} times as fast as PyTorch here; {alike}"
        if torch_s > _WORTH * openvino_s:
            return engine, Choice("engine", "OpenVINO", why)
        return None, _pytorch(f"OpenVINO is {why}")

    def _decisions(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1) if self._exclusive else outputs > 0


def _seconds(run: Network, x: Tensor) -> float:
    began = time.perf_counter()
    run(x)
    return time.perf_counter() - began


def _pytorch(why: str) -> Choice:
    return Choice("engine", "PyTorch", why)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """PyTorch as a tracer needs it: without gradients, inference tensors or autocast, and silent about constants."""
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")  # every shape that becomes a constant is warned of; there is only one shape
        yield
