"""How to compute on this machine (device, precision, memory format, compilation, threads), with reasons."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from delineate.core.limits import usable_cores
from delineate.errors import RecipeError
from delineate.io.documents import Document

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compile = Literal["auto", "on", "off"]
Engine = Literal["auto", "torch", "openvino"]

COMPILE_PAYS_AFTER_SECONDS = 120
"""Compiling takes tens of seconds; a shorter run would not earn them back."""

COMPILE_SECONDS_A_CONVOLUTION = 0.8
"""Measured on two cores: 10 s for 18 convolutions, 35 s for 23, 69 s for 92 and 79 s for 147."""

COMPILE_PAYS_AFTER_TIMES = {"cpu": 30, "cuda": 6}
"""Compiling must be so small a part of the run. On two cores (AMD EPYC), compiled steps of eight networks were .8 to
1.5 times as fast as others, in the median 1.02 times."""


@dataclass(frozen=True)
class Choice:
    """One line of the plan."""

    what: str
    choice: str
    why: str


class PlanFile(Document):
    """What was chosen for a run, and why."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class ComputePlan:
    """What was chosen and why, line by line."""

    device: torch.device
    precision: Literal["fp32", "bf16", "fp16"]
    channels_last: bool
    compile: bool
    threads: int
    choices: tuple[Choice, ...]
    engine: Engine = "torch"
    """What runs trained networks; ``auto``: OpenVINO where a trial shows it to be faster."""

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def memory_format(self, dimensions: int) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last_3d if dimensions == 3 else torch.channels_last

    def autocast(self) -> torch.autocast:
        """Context manager within which convolutions run in the plan's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.precision != "fp32")

    def place(self, network: nn.Module, dimensions: int) -> nn.Module:
        """``network`` on the device, in the plan's memory format."""
        # torch.nn.Module.to takes a memory format, though its published types do not say so.
        return network.to(self.device, memory_format=self.memory_format(dimensions))  # type: ignore[call-overload]

    def compiled(self, function: Callable) -> Callable:
        """``function``, compiled for fixed shapes if the plan says so; its gradients are correct either way."""
        if self.device.type == "cpu":
            function = _with_right_gradients(function)
        return torch.compile(function, dynamic=False) if self.compile else function

    def again(self) -> AbstractContextManager[Any]:
        """Context in which the backward pass computes activations again, as :meth:`compiled` functions did."""
        return _CarefulConvolutions() if self.device.type == "cpu" else nullcontext()

    def file(self) -> PlanFile:
        """The plan as it is written to a file."""
        return PlanFile(choices=self.choices)


def plan_compute(
    *,
    device: str = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    threads: int | None = None,
    expected_seconds: float = float("inf"),
    convolutions: int = 20,
    engine: Engine | None = None,
) -> ComputePlan:
    """Choose how to compute. ``expected_seconds`` and the number of ``convolutions`` decide whether compiling pays off.

    ``engine`` is for predictions, which are compiled on a CPU only if ``compile`` is ``on``. Raises
    :class:`RecipeError` for a device that this machine does not have, or an engine that is not installed.
    """
    target, why_device = _choose_device(device)
    running, why_engine = _choose_engine(engine or "torch", target, compile)
    chosen_precision, why_precision = _choose_precision(precision, target)
    channels_last = target.type in ("cpu", "cuda")
    if compile == "auto" and engine is not None and target.type == "cpu":
        # A tile of a U-Net took 61 ms compiled and 52 ms otherwise (two cores, AMD EPYC).
        compiling, why_compile = False, "on CPUs, predictions are as fast without"
    else:
        compiling, why_compile = _choose_compile(compile, target, expected_seconds, convolutions)
    # Two threads on one core (SMT) only compete for its vector units.
    count = threads or _openmp_threads() or usable_cores()
    choices = (
        Choice("device", _device_name(target), why_device),
        Choice("precision", chosen_precision, why_precision),
        Choice(
            "memory format",
            "channels last" if channels_last else "contiguous",
            "convolutions read all channels of a voxel at once" if channels_last else f"usual on {target.type}",
        ),
        Choice("compile", "on" if compiling else "off", why_compile),
        Choice("threads", str(count), "as requested" if threads else "one per usable core"),
        *([] if engine is None else [Choice("engine", _ENGINES[running], why_engine)]),
    )
    return ComputePlan(target, chosen_precision, channels_last, compiling, count, choices, running)


def convolution_gflops(plan: ComputePlan) -> float:
    """Billions of operations a second that convolutions reach in training here, by one layer.

    It is the best in half a second: other programs that are busy for a moment do not count.
    """
    layer = plan.place(nn.Conv3d(16, 16, 3, padding=1), 3)
    image = torch.randn(2, 16, 32, 32, 32, device=plan.device, requires_grad=True)
    image = image.contiguous(memory_format=plan.memory_format(3))

    def once() -> float:
        began = time.perf_counter()
        with plan.autocast():
            value = layer(image).mean()
        float(torch.autograd.grad(value, [image, *layer.parameters()])[0].flatten()[0])  # waits for a GPU
        return time.perf_counter() - began

    with torch_threads(plan.threads):
        once()
        until = time.perf_counter() + 0.5
        fastest = once()
        while time.perf_counter() < until:
            fastest = min(fastest, once())
    forward = 2 * 27 * 16 * 16 * image[:, 0].numel() / 1e9
    return 3 * forward / fastest


class _CarefulConvolutions(TorchFunctionMode):
    """Steps around what PyTorch 2.13 gets wrong in the backward pass of convolutions on CPUs.

    In bfloat16, if the image is smaller than the kernel, the kernel's gradient is wrong or NaN; if the convolution is
    depthwise and dilated, it takes two to seven times as long as in float32. These are excluded from autocast.

    In 2D and any precision, a convolution of single pixels with a stride writes beyond its memory where 2 to 15
    channels lie last, which ends the process. The pixels that it passes over are left out beforehand.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and torch.is_grad_enabled():
            return _convolved(func, *args, **kwargs)
        return func(*args, **kwargs)


_FORWARD = {torch.conv2d, torch.conv3d}
_CONVOLUTIONS = _FORWARD | {torch.conv_transpose2d, torch.conv_transpose3d}


def _convolved(func: Callable, input: torch.Tensor, weight: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
    """A convolution with a right gradient; takes the arguments of ``func`` under their names there."""
    if func is torch.conv2d and weight.shape[2:] == (1, 1) and input.ndim == 4 and input.shape[1] < 16:
        return _of_every(input, weight, *rest, **kwargs)
    # Counted from the end: there may be no batch.
    small = any(n < k for n, k in zip(input.shape[2 - weight.ndim :], weight.shape[2:], strict=True))
    if small or (func in _FORWARD and _is_dilated_by_channel(weight, *rest, **kwargs)):
        with torch.autocast("cpu", enabled=False):
            return func(input.float(), weight.float(), *rest, **kwargs)
    return func(input, weight, *rest, **kwargs)


def _of_every(
    image: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """A convolution of single pixels, without a stride: of every so many of them."""
    if padding == "valid":
        padding = 0
    if not isinstance(padding, str):  # "same" goes with no stride
        (down, across), (above, beside) = _each(stride), _each(padding)
        if above or beside:
            image = nn.functional.pad(image, (beside, beside, above, above))
        image, stride, padding = image[:, :, ::down, ::across], 1, 0
    return torch.conv2d(image, kernel, bias, stride, padding, dilation, groups)


def _each(value: Any) -> tuple[int, int]:
    """A convolution's setting along both axes of an image, which may be given once."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    first, last = values if len(values) == 2 else values * 2
    return first, last


def _is_dilated_by_channel(
    kernel: torch.Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> bool:
    """Whether a convolution is depthwise and dilated; takes the arguments of a convolution."""
    steps = dilation if isinstance(dilation, Sequence) else (dilation,)
    return groups > 1 and kernel.shape[1] == 1 and max(steps) > 1


def _with_right_gradients(function: Callable) -> Callable:
    def careful(*args: Any, **kwargs: Any) -> Any:
        with _CarefulConvolutions():
            return function(*args, **kwargs)

    return careful


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, PyTorch's on a GPU, or that of its allocator on a CPU."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str, count: int = 1) -> None:
    """Raise :class:`RecipeError` for a device that this machine does not have, or has fewer than ``count`` of."""
    chosen, _ = _choose_device(device)
    if chosen.type == "cpu":
        return
    if chosen.index is not None and count > 1:
        raise RecipeError(
            f"device '{device}' is one device, and training is to use {count}",
            fix=f"use --device {chosen.type}, and CUDA_VISIBLE_DEVICES to choose among more",
        )
    wanted = max(count, (chosen.index or 0) + 1)
    there = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if wanted > there:
        raise RecipeError(
            f"this machine has {there} devices of type {chosen.type}, not {wanted}",
            fix="use another --device, or fewer --devices",
        )


def _choose_device(device: str) -> tuple[torch.device, str]:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), "a CUDA GPU is available"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "an Apple GPU is available"
        return torch.device("cpu"), "no GPU found"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"unknown device '{device}'", fix="use auto, cpu, cuda, cuda:1 or mps") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(chosen.type, False):
        raise RecipeError(f"this machine has no device '{device}'", fix="use --device auto or cpu")
    return chosen, "as requested"


def _choose_precision(precision: Precision, device: torch.device) -> tuple[Literal["fp32", "bf16", "fp16"], str]:
    if precision != "auto":
        return precision, "as requested"
    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
            return "bf16", "the GPU supports bfloat16 natively"
        return "fp16", "this GPU has no bfloat16; fp16 with loss scaling instead"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16", "the CPU supports bfloat16 natively"
    return "fp32", f"no fast bfloat16 on this {device.type}"


def _cpu_has_bf16() -> bool:
    if platform.machine() in ("arm64", "aarch64"):
        return False  # oneDNN's bf16 convolutions there are slower than fp32 on most chips
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile"))


def _choose_compile(
    wanted: Compile, device: torch.device, expected_seconds: float, convolutions: int
) -> tuple[bool, str]:
    if wanted == "off":
        return False, "as requested"
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
        if compiler is None or shutil.which(compiler) is None:
            return False, "no C++ compiler found; install g++ or clang for faster training"
    elif device.type == "mps":
        return False, "not yet reliable on Apple GPUs"
    elif lacking := _triton_lacks(device):
        return False, lacking
    if wanted == "on":
        return True, "as requested"
    if expected_seconds < COMPILE_PAYS_AFTER_SECONDS:
        return False, f"the run is short (about {expected_seconds:.0f} s); compiling would not pay off"
    seconds = convolutions * COMPILE_SECONDS_A_CONVOLUTION
    if expected_seconds < COMPILE_PAYS_AFTER_TIMES[device.type] * seconds:
        return (
            False,
            f"compiling {convolutions} convolutions would take about {seconds:.0f} s of "
            f"{expected_seconds:.0f} s, which would not pay off",
        )
    return True, "a long run earns back the time spent compiling"


def _triton_lacks(device: torch.device) -> str:
    """What torch's compiler for GPUs needs and does not find; empty if it finds everything."""
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
        return "compiling needs a GPU of compute capability 7.0 or later"
    if importlib.util.find_spec("triton") is None:
        return "no Triton found; install triton for faster training"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return "no C compiler found; install gcc or clang for faster training"
    return ""


def _openmp_threads() -> int:
    """What ``OMP_NUM_THREADS`` says of the outermost level, such as 4 of ``4,2``; 0 if it is no positive number."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


_ENGINES = {"torch": "PyTorch", "openvino": "OpenVINO", "auto": "PyTorch, then OpenVINO if that is faster"}


def _choose_engine(wanted: Engine, device: torch.device, compile: Compile) -> tuple[Engine, str]:
    there = importlib.util.find_spec("openvino") is not None
    if wanted == "openvino":
        if device.type != "cpu":
            raise RecipeError(f"OpenVINO runs on CPUs, not on {device.type}", fix="use --device cpu, or --engine torch")
        if not there:
            raise RecipeError("OpenVINO is not installed", fix="pip install 'delineate[openvino]'")
    if wanted != "auto":
        return wanted, "as requested"
    if device.type != "cpu":
        return "torch", f"the fastest on {device.type}"
    if compile == "on":
        return "torch", "compiled, as requested"
    if not there:
        return "torch", "pip install 'delineate[openvino]' may predict faster"
    return "auto", "a trial shows, or an earlier one has"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
        return f"cpu ({name})" if name else "cpu"
    return str(device)
