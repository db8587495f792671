"""A converted network that an earlier process left is used as it was tried, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from delineate.compute import Choice, plan_compute
from delineate.inference import converted
from delineate.inference.converted import Converted, Kept, Trial
from delineate.inference.engines import Tried
from delineate.networks.unet import UNetSpec

PLAN = plan_compute(device="cpu", precision="fp32", compile="off", engine="openvino", threads=1)
AUTO = replace(PLAN, engine="auto")
SPEC = UNetSpec(dimensions=2, widths=(4, 8))
SHAPE = (1, 16, 16)
WHOLE = Kept(b"whatever OpenVINO exports", 1, Trial(0.99999, 2.0))


@pytest.fixture(autouse=True)
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that converted networks are kept in."""
    monkeypatch.setenv("DELINEATE_HOME", str(tmp_path))
    return tmp_path / "engines"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return SPEC.build(1, 2).eval()


def store(network: nn.Module, **changes: object) -> Converted:
    found = Converted.of(network, SPEC, replace(PLAN, **changes), exclusive=True)
    assert found is not None
    return found


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))


def refused(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("PyTorch ran")


def tried(network: nn.Module, plan: object, run: Callable[[torch.Tensor], torch.Tensor], told: list[Choice]) -> Tried:
    return Tried(network, run, plan, True, told.append, store(network))  # type: ignore[arg-type]


@torch.inference_mode()
def test_the_next_process_starts_with_it_and_answers_to_the_bit(network: nn.Module) -> None:
    told = list[Choice]()
    first, again = tried(network, PLAN, network, told), tried(network, PLAN, refused, told)
    for batch in (2, 1, 3):
        assert torch.equal(first(image(batch)), again(image(batch)))
    why = "as requested; 100.000% of the voxels are decided alike"
    assert told == [Choice("engine", "OpenVINO", said) for said in (why, f"{why}, as an earlier trial found")]


@torch.inference_mode()
@pytest.mark.parametrize(("faster", "used"), [(2.0, True), (1.0, False), (None, False)])
def test_a_choice_left_to_a_trial_needs_its_speed(network: nn.Module, faster: float | None, used: bool) -> None:
    tried(network, PLAN, network, [])(image())
    kept, told = store(network).find(SHAPE), list[Choice]()
    assert kept is not None
    store(network).keep(SHAPE, replace(kept, trial=Trial(0.99999, faster)))
    tried(network, AUTO, refused if used else network, told)(image())
    why = "2.0 times as fast as PyTorch; 99.999% of the voxels are decided alike, as an earlier trial found"
    assert told == [Choice("engine", "OpenVINO", why)] * used


@torch.inference_mode()
def test_what_openvino_refuses_is_converted_again(network: nn.Module) -> None:
    store(network).keep(SHAPE, WHOLE)
    run = tried(network, PLAN, network, told := [])
    for _ in range(2):
        torch.testing.assert_close(run(image()), network(image()), atol=1e-4, rtol=1e-3)
    assert "earlier" not in told[0].why
    found = store(network).find(SHAPE)
    assert found is not None
    assert found.exported != WHOLE.exported


def test_what_is_kept_is_found_as_it_was(network: nn.Module, engines: Path) -> None:
    for trial in (WHOLE.trial, Trial(1.0)):
        store(network).keep(SHAPE, replace(WHOLE, trial=trial))
        assert store(network).find(SHAPE) == replace(WHOLE, trial=trial)
    assert len(list(engines.iterdir())) == 1
    assert engines.stat().st_mode & 0o777 == 0o700


def test_no_damage_is_trusted(network: nn.Module, engines: Path) -> None:
    """Any byte changed, the end cut off or added to, all of it lost, or another network's file in its place."""
    kept = store(network)
    kept.keep(SHAPE, WHOLE)
    [file] = engines.iterdir()
    whole = file.read_bytes()
    damaged = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    store(network, threads=2).keep(SHAPE, WHOLE)
    [other] = set(engines.iterdir()) - {file}
    for content in (*damaged, whole[:-1], whole[:30], b"", whole + b"x", other.read_bytes()):
        file.write_bytes(content)
        assert kept.find(SHAPE) is None
        assert not file.exists()
    file.write_bytes(whole)
    assert kept.find(SHAPE) == WHOLE


def test_whatever_it_depends_on_makes_it_another(network: nn.Module) -> None:
    store(network).keep(SHAPE, WHOLE)
    others = [store(network, threads=2), store(network, precision="bf16")]
    others.append(Converted.of(network, SPEC, PLAN, exclusive=False))
    others.append(Converted.of(network, SPEC.model_copy(update={"activation": "elu"}), PLAN, exclusive=True))
    for name in (machine := converted._machine()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(converted, "_machine", lambda name=name: {**machine, name: "another"})
            others.append(store(network))
    assert store(network).find(SHAPE) == WHOLE
    assert store(network).find((1, 16, 32)) is None
    with torch.no_grad():
        next(network.parameters()).flatten()[0] += 1e-3
    others.append(store(network))
    assert len(others) == 4 + len(machine) + 1
    assert [one.find(SHAPE) for one in others if one is not None] == [None] * len(others)


def test_a_network_with_others_code_is_not_kept(network: nn.Module) -> None:
    class Own(nn.Module):
        pass

    assert Converted.of(nn.Sequential(network, Own()), SPEC, PLAN, exclusive=True) is None


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_folder_that_others_can_enter_is_not_used(network: nn.Module, engines: Path, tmp_path: Path) -> None:
    kept = store(network)
    kept.keep(SHAPE, WHOLE)
    before = list(engines.iterdir())
    for mode in (0o710, 0o702, 0o755):
        engines.chmod(mode)
        assert kept.find(SHAPE) is None
        kept.keep((1, 32, 32), WHOLE)
        assert list(engines.iterdir()) == before
    engines.chmod(0o700)
    assert kept.find(SHAPE) == WHOLE
    engines.rename(tmp_path / "elsewhere")
    engines.symlink_to(tmp_path / "elsewhere")
    assert kept.find(SHAPE) is None


def test_without_a_place_there_is_nothing_to_keep_it_in(network: nn.Module, engines: Path) -> None:
    engines.write_text("a file", encoding="utf-8")
    kept = store(network)
    kept.keep(SHAPE, WHOLE)
    assert kept.find(SHAPE) is None
    assert engines.read_text(encoding="utf-8") == "a file"


def test_what_was_used_least_recently_goes_first(
    network: nn.Module, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(network)
    shapes = [(1, side, 16) for side in (16, 32, 48)]
    for age, shape in enumerate(shapes[:2]):
        kept.keep(shape, WHOLE)
        [new] = [file for file in engines.iterdir() if file.stat().st_mtime > 1e9]
        os.utime(new, (1e8 + age, 1e8 + age))
    half_written, users = engines / f".{'0' * 8}-{'1' * 32}", engines / "notes.txt"
    for file in (half_written, users):
        file.write_bytes(b"0")
        os.utime(file, (1, 1))
    size = max(file.stat().st_size for file in engines.iterdir())
    monkeypatch.setattr(converted, "MOST_BYTES", 2 * size + 1)
    assert kept.find(shapes[0]) == WHOLE  # used just now
    kept.keep(shapes[2], WHOLE)
    assert [kept.find(shape) is not None for shape in shapes] == [True, False, True]
    assert (half_written.exists(), users.exists()) == (False, True)
    monkeypatch.setattr(converted, "MOST_BYTES", size - 1)
    kept.keep(shapes[1], WHOLE)  # larger than all may be
    assert kept.find(shapes[1]) is None
