from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from delineate.compute import plan_compute, torch_threads
from delineate.core.limits import usable_cores
from delineate.errors import RecipeError


@pytest.fixture
def compiler(monkeypatch) -> None:
    """A C++ compiler, as far as anybody looks, whether this machine has one or not."""
    monkeypatch.setenv("CXX", sys.executable)


def test_every_choice_has_its_reason() -> None:
    plan = plan_compute()
    assert [choice.what for choice in plan.choices] == ["device", "precision", "memory format", "compile", "threads"]
    assert all(choice.choice and choice.why for choice in plan.choices)


@pytest.mark.usefixtures("compiler")
def test_a_short_run_is_not_compiled_and_says_why() -> None:
    short, long = plan_compute(device="cpu", expected_seconds=10), plan_compute(device="cpu", compile="off")
    assert not short.compile
    assert "short" in {c.what: c.why for c in short.choices}["compile"]
    assert not long.compile
    deep = plan_compute(device="cpu", expected_seconds=300, convolutions=150)
    assert not deep.compile
    assert "150 convolutions" in {c.what: c.why for c in deep.choices}["compile"]


@pytest.mark.usefixtures("compiler")
def test_predictions_on_a_cpu_are_compiled_only_on_request() -> None:
    assert plan_compute(device="cpu").compile
    for engine in ("torch", "auto"):
        plan = plan_compute(device="cpu", engine=engine)
        assert not plan.compile
        assert "predictions" in {c.what: c.why for c in plan.choices}["compile"]
    assert plan_compute(device="cpu", engine="torch", compile="on").compile


def test_without_a_compiler_it_falls_back_and_says_so(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    plan = plan_compute(device="cpu", compile="on")
    assert not plan.compile
    assert "no C++ compiler" in plan.choices[3].why


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match="auto, cpu, cuda"):
        plan_compute(device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="--device auto"):
            plan_compute(device="cuda")


@pytest.mark.parametrize(
    ("said", "threads"),
    [("3", 3), (" 3 ", 3), ("3,2", 3), *((odd, usable_cores()) for odd in ("", "0", "-1", "many", ",2", "2.5"))],
)
def test_threads_follow_openmp_s_variable_if_it_says_a_number(said, threads, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert plan_compute(device="cpu").threads == threads
    assert plan_compute(device="cpu", threads=5).threads == 5


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(2):
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels", [2, 8, 15, 16])
def test_pixels_that_a_stride_passes_over_have_no_gradient(channels, precision) -> None:
    """PyTorch's own backward pass of these ends the process where few channels lie last."""
    plan = plan_compute(device="cpu", precision=precision, compile="off")
    layer = nn.Conv2d(channels, 32, 1, stride=(2, 3)).to(memory_format=torch.channels_last)
    image = torch.randn(3, channels, 272, 271).contiguous(memory_format=torch.channels_last).requires_grad_()
    with plan.autocast():
        answer = plan.compiled(layer)(image)
    answer.float().square().sum().backward()
    exact = layer.double()(image.detach().double())
    torch.testing.assert_close(answer.double(), exact, rtol=0.02, atol=0.05)
    seen = image.grad.abs().sum(dim=1) > 0
    assert seen[:, ::2, ::3].all()
    assert seen.sum() == answer[:, 0].numel()


class _Strides(TorchDispatchMode):
    """Notes the strides of the convolutions that PyTorch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.noted.append(list(args[3]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [2, (2,), [3, 2]])
@pytest.mark.parametrize("padding", [0, (0,), [0, 0], "valid", 1, (2, 0)])
def test_single_pixels_are_never_convolved_with_a_stride_where_few_channels_lie_last(stride, padding) -> None:
    plan = plan_compute(device="cpu", precision="fp32", compile="off")
    image, kernel = torch.randn(2, 8, 13, 12, dtype=torch.double), torch.randn(5, 8, 1, 1, dtype=torch.double)
    expected = F.conv2d(image, kernel, None, stride, padding)
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
    with _Strides() as strides:
        found = plan.compiled(F.conv2d)(image, kernel, None, stride, padding)
    assert strides.noted == [[1, 1]]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    seen = image.grad.abs().sum(dim=1, keepdim=True) > 0
    torch.testing.assert_close(image.grad, seen * kernel.sum(dim=0))
    assert 0 < seen.sum() <= found[:, 0].numel()


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5, 5)])
def test_a_convolution_s_arguments_may_be_named_and_its_image_alone(kernel) -> None:
    plan = plan_compute(device="cpu", precision="fp32", compile="off")
    convolution = F.conv3d if len(kernel) == 3 else F.conv2d
    image, weight = torch.randn(1, 4, *[4] * len(kernel)), torch.randn(3, 4, *kernel, requires_grad=True)
    expected = convolution(image, weight, None, 2, 2)
    torch.testing.assert_close(plan.compiled(convolution)(image, weight=weight, stride=2, padding=2), expected)
    torch.testing.assert_close(plan.compiled(convolution)(input=image, weight=weight, stride=2, padding=2), expected)
    torch.testing.assert_close(plan.compiled(convolution)(image[0], weight, None, 2, 2), expected[0])


@pytest.mark.parametrize(("dimensions", "kernel", "size"), [(3, 5, (4, 4, 4)), (3, 3, (2, 3, 2)), (2, 3, (1, 1))])
def test_gradients_of_images_smaller_than_their_kernel_are_right(dimensions, kernel, size) -> None:
    torch.manual_seed(0)
    layer = (nn.Conv3d if dimensions == 3 else nn.Conv2d)(16, 16, kernel, stride=2, padding=kernel // 2)
    up = (nn.ConvTranspose3d if dimensions == 3 else nn.ConvTranspose2d)(16, 16, 2, stride=2)
    image = torch.randn(2, 16, *size)
    gradients = []
    for precision in ("fp32", "bf16"):
        plan = plan_compute(device="cpu", precision=precision, compile="off")
        network = plan.place(nn.Sequential(layer, up), dimensions)
        network.zero_grad()
        with plan.autocast():
            (plan.compiled(network)(image).float() ** 2).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for exact, rounded in zip(*gradients, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("groups", "dilation", "kept"), [(8, 2, torch.float32), (8, 1, torch.bfloat16), (1, 2, torch.bfloat16)]
)
def test_dilated_kernels_of_single_channels_stay_in_float32_where_they_train(groups, dilation, kept) -> None:
    """PyTorch's bfloat16 gradients of these take several times as long."""
    plan = plan_compute(device="cpu", precision="bf16", compile="off")
    layer = plan.place(nn.Conv2d(8, 8, 3, padding=dilation, dilation=dilation, groups=groups), 2)
    with plan.autocast():
        assert plan.compiled(layer)(torch.randn(2, 8, 9, 9)).dtype == kept
        with torch.no_grad():
            assert plan.compiled(layer)(torch.randn(2, 8, 9, 9)).dtype == torch.bfloat16
