"""Speed and memory, as ratios measured in one run. ``python benchmarks/run.py [NAME …] [--quick]``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_side import bench_cohort, bench_files, bench_phantoms, bench_prepare
from measuring import Row, interleaved, peak_of, process_of
from metrics_side import bench_metrics
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from delineate.bundle import Bundle
from delineate.compute import ComputePlan, plan_compute
from delineate.core.grid import Grid
from delineate.core.limits import available_memory_bytes
from delineate.core.memory import keep_freed_memory
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.exporting.onnx import export_onnx
from delineate.inference.engines import OpenVino
from delineate.io.formats import write_volume
from delineate.losses.pixelwise import CrossEntropySpec
from delineate.losses.spec import DICE_AND_CROSS_ENTROPY
from delineate.networks import blocks
from delineate.networks.configurations import CONFIGURATIONS
from delineate.networks.cost import step_cost
from delineate.networks.unet import UNetSpec
from delineate.recipe import load_recipe, recipe_from
from delineate.sampling.tiles import TileGeometry

WIDTHS, BATCH, SIDES = (32, 64, 128, 256), 9, (40, 56, 40)


# ---- a training step -------------------------------------------------------------------------------------------


class TorchInstanceNorm(nn.InstanceNorm3d):
    """InstanceNorm as PyTorch users write it by default."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)


def training_step(
    plan: ComputePlan | None, *, norm: str = "instance", with_loss: bool = True, quick: bool = False
) -> Callable[[], None]:
    """One optimiser step; without a plan, with PyTorch's defaults."""
    torch.manual_seed(0)
    widths, batch, sides = ((8, 16), 1, (8, 8, 8)) if quick else (WIDTHS, BATCH, SIDES)
    ours = blocks.InstanceNorm
    blocks.InstanceNorm = ours if plan else TorchInstanceNorm  # type: ignore[assignment, misc]
    network = UNetSpec(dimensions=3, widths=widths, norm=norm).build(1, 3)  # type: ignore[arg-type]
    blocks.InstanceNorm = ours  # type: ignore[misc]
    loss = DICE_AND_CROSS_ENTROPY.build(Targets({"a": (1,), "b": (2,)}))
    image, target = torch.randn(batch, 1, *sides), torch.randint(0, 3, (batch, 1, *sides), dtype=torch.uint8)
    if plan is not None:
        plan.place(network, 3)
        image = image.contiguous(memory_format=plan.memory_format(3))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=plan is not None)

    def judged(x: Tensor, y: Tensor) -> Tensor:
        logits = network(x)
        return loss(logits, y, x) if with_loss else logits.float().mean()

    judge = judged if plan is None else plan.compiled(judged)

    def step() -> None:
        with plan.autocast() if plan is not None else nullcontext():
            value = judge(image, target)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def optimiser_step(quick: bool) -> Callable[[], None]:
    """The fused optimiser alone, with gradients already computed."""
    network = UNetSpec(dimensions=3, widths=(8, 16) if quick else WIDTHS).build(1, 3)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True).step  # type: ignore[return-value]


def step_gflop(quick: bool) -> float:
    """Floating-point operations of one step's convolutions, forward and backward, in 10⁹."""
    with FlopCounterMode(display=False) as counter:
        training_step(None, quick=quick)()
    return counter.get_total_flops() / 1e9


def machine_rates(plan: ComputePlan, quick: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """The best the machine can do: name → (work, GFLOP)."""
    n, sides = (256, (8, 8, 8)) if quick else (2048, SIDES)
    a, b = (torch.randn(n, n).to(plan.dtype) for _ in range(2))
    convolution = nn.Conv3d(32, 32, 3, padding=1, bias=False, dtype=plan.dtype)
    convolution.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    x = torch.randn(2, 32, *sides).to(plan.dtype).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    gflop = 2 * 27 * 32 * 32 * x[:, 0].numel() / 1e9

    def forward() -> Tensor:
        with torch.no_grad():
            return convolution(x)  # type: ignore[no-any-return]

    return {
        f"matrix product, {plan.precision}": (lambda: a @ b, 2 * n**3 / 1e9),
        f"convolution 32→32, {plan.precision}, forward": (forward, gflop),
        f"convolution 32→32, {plan.precision}, forward + backward": (
            lambda: convolution(x).float().mean().backward(),
            3 * gflop,
        ),
    }


def bench_step(quick: bool) -> list[Row]:
    keep_freed_memory()  # in one process all cases have it
    plan = plan_compute(compile="off" if quick else "on")
    rates = machine_rates(plan, quick)
    cases: dict[str, Callable[[], object]] = {
        "PyTorch's defaults": training_step(None, quick=quick),
        "compute plan": training_step(plan, quick=quick),
        "compute plan, not compiled": training_step(replace(plan, compile=False), quick=quick),
        "compute plan, BatchNorm": training_step(plan, norm="batch", quick=quick),
        "compute plan, no normalisation": training_step(plan, norm="none", quick=quick),
        "compute plan, no loss": training_step(plan, with_loss=False, quick=quick),
        "optimiser alone": optimiser_step(quick),
        **{name: work for name, (work, _) in rates.items()},
    }
    seconds = interleaved(cases, 1 if quick else 7)
    one_step = step_gflop(quick)
    gflop = {name: one_step for name in cases if "plan" in name or "defaults" in name}
    default = seconds["PyTorch's defaults"]
    return [
        {
            "case": name,
            "ms": 1000 * s,
            "GFLOP/s": rates[name][1] / s if name in rates else gflop[name] / s if name in gflop else None,
            "times faster than the defaults": default / s if name in gflop else None,
        }
        for name, s in seconds.items()
    ]


# ---- a forward pass --------------------------------------------------------------------------------------------


def bench_pass(quick: bool) -> list[Row]:
    """The same network without gradients, on one tile of 40×56×40 and on eight."""
    import onnxruntime

    plan = plan_compute(device="cpu", compile="off")
    widths, sides = ((8, 16), (8, 8, 8)) if quick else (WIDTHS, SIDES)
    torch.manual_seed(0)
    network = UNetSpec(dimensions=3, widths=widths).build(1, 3).eval()
    ours = blocks.InstanceNorm
    blocks.InstanceNorm = TorchInstanceNorm  # type: ignore[assignment, misc]
    default = UNetSpec(dimensions=3, widths=widths).build(1, 3).eval()
    blocks.InstanceNorm = ours  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "tiles": {"kind": "patches", "shape": sides},
            "network": {"kind": "unet", "dimensions": 3, "widths": widths},
        }
        saved_bundle(Path(folder, "bundle"), values, ("T1",), TileGeometry(sides))
        export_onnx([Path(folder, "bundle")], Path(folder, "network.onnx"))
        session = onnxruntime.InferenceSession(Path(folder, "network.onnx"), providers=["CPUExecutionProvider"])
    plan.place(network, 3)
    rates = {name: rate for name, rate in machine_rates(plan, quick).items() if name.endswith("forward")}
    rows: list[Row] = []
    for tiles in (1, 8):
        x = torch.randn(tiles, 1, *sides)
        placed = x.contiguous(memory_format=plan.memory_format(3))
        engine, exact = (OpenVino.converted(network, x, replace(plan, precision=p)) for p in (plan.precision, "fp32"))
        tile = {"tile": x.numpy()}

        def planned(x: Tensor = placed) -> None:
            with plan.autocast():
                network(x)

        def usual(x: Tensor = x) -> None:
            default(x)

        cases: dict[str, Callable[[], object]] = {
            "PyTorch's defaults": usual,
            "PyTorch, as planned": planned,
            "OpenVINO": lambda engine=engine, x=x: engine(x),
            "OpenVINO, float32": lambda exact=exact, x=x: exact(x),
            "ONNX Runtime, float32": lambda tile=tile: session.run(None, tile),
            **{name: work for name, (work, _) in rates.items()},
        }
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            default(x)
        gflop = counter.get_total_flops() / 1e9
        with torch.inference_mode():
            seconds = interleaved(cases, 1 if quick else 15)
        rows += [
            {
                "case": name,
                "tiles": tiles,
                "ms": 1000 * s,
                "GFLOP/s": (rates[name][1] if name in rates else gflop) / s,
                "times faster than the defaults": None if name in rates else seconds["PyTorch's defaults"] / s,
            }
            for name, s in seconds.items()
        ]
    return rows


# ---- the data side of a step -----------------------------------------------------------------------------------


def simulated_subjects(shape: tuple[int, int, int], count: int) -> list[Any]:
    from delineate.preprocessing.cache import PreparedSubject

    rng, subjects = np.random.default_rng(0), []
    for i in range(count):
        target = np.zeros((1, *shape), dtype=np.uint8, order="F")
        target[0, 10:20, 15:35, 8:20] = 1
        image = np.asfortranarray(rng.standard_normal((1, *shape)), dtype=np.float16)
        points = {1: np.argwhere(target[0] == 1)[:1000].astype(np.int16)}
        subjects.append(PreparedSubject(f"s{i}", image, target, points, Grid.of_spacing(shape), {0: 1, 1: 1}))
    return subjects


def bench_data(quick: bool) -> list[Row]:
    from delineate.sampling.batches import BatchSource
    from delineate.sampling.samplers import Sampler

    small = ["tiles.shape=[8, 8, 8]", "network.widths=[8, 8]"] if quick else []
    recipe, plan = load_recipe("hippocampus", small), plan_compute(compile="off" if quick else "on")
    geometry = TileGeometry(recipe.tiles.shape)  # type: ignore[arg-type, union-attr]
    sampler = Sampler(recipe.sampler, simulated_subjects((36, 50, 35), 8), geometry, seed=0)
    source = BatchSource(sampler, recipe.augmentation, recipe.training.batch_size)
    network = plan.place(recipe.network.build(1, 3), 3)
    loss, numbers = recipe.loss.build(Targets({"Anterior": (1,), "Posterior": (2,)})), iter(range(10**9))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    judge = plan.compiled(lambda x, y: loss(network(x), y, x))
    image, target = source.augmented(source.batch(0), seed=0)
    image = image.contiguous(memory_format=plan.memory_format(3))

    def step() -> None:
        with plan.autocast():
            value = judge(image, target)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()

    def validation_loss() -> None:
        network.eval()
        with torch.no_grad(), plan.autocast():
            loss(network(image), target, image)
        network.train()

    batch, every = source.batch(0), recipe.training.validation.loss_every or 1
    seldom = f"validation loss, one step in {every}"
    cases: dict[str, Callable[[], object]] = {
        "network, loss, optimiser": step,
        seldom: validation_loss,
        "cropping": lambda: source.batch(next(numbers)),
        "augmentation": lambda: source.augmented(batch, seed=0),
    }
    seconds = interleaved(cases, 2 if quick else 15)
    seconds[seldom] /= every
    total = sum(seconds.values())
    return [{"case": name, "ms": 1000 * s, "% of a step": 100 * s / total} for name, s in seconds.items()]


# ---- prediction ------------------------------------------------------------------------------------------------


def saved_bundle(folder: Path, values: dict[str, Any], channels: tuple[str, ...], geometry: TileGeometry) -> Bundle:
    """A bundle with random weights for three targets."""
    recipe = recipe_from({"name": "benchmark", **values})
    targets = Targets({name: (i,) for i, name in enumerate(("a", "b", "c"), start=1)})
    bundle = Bundle(recipe, recipe.pipeline, targets, channels, geometry, (1.0, 1.0, 1.0))
    torch.manual_seed(0)
    bundle.save(folder, bundle.network().state_dict(), {})
    return Bundle.load(folder)


def bench_predict(quick: bool) -> list[Row]:
    from delineate.inference.batch import find_subjects, predict_subjects
    from delineate.inference.predictor import Predictor

    steps = [{"kind": "reorient"}, {"kind": "clip_percentiles"}, {"kind": "normalise"}]
    thick = [steps[0], {"kind": "resample", "spacing_mm": [1.0, 1.0, None]}, *steps[1:]]
    kinds: dict[str, tuple[dict[str, Any], TileGeometry, tuple[int, int, int], tuple[float, float, float]]] = {
        "3D patches, 128×128×96 at 1 mm": (
            {
                "preprocessing": steps,
                "tiles": {"kind": "patches", "shape": [64, 64, 48]},
                "network": {"kind": "unet", "dimensions": 3, "widths": [16, 32, 64]},
            },
            TileGeometry((64, 64, 48)),
            (128, 128, 96),
            (1.0, 1.0, 1.0),
        ),
        "2.5D slices, 256×256×24 at 0.8 × 0.8 × 6 mm": (
            {
                "preprocessing": thick,
                "tiles": {"kind": "slices", "shape": [208, 208], "neighbours": 1},
                "network": {"kind": "unet", "dimensions": 2, "widths": [24, 48, 96, 192]},
            },
            TileGeometry((208, 208, 1), (0, 0, 1), 2),
            (256, 256, 24),
            (0.8, 0.8, 6.0),
        ),
    }
    plan, rows, rng = plan_compute(compile="off"), [], np.random.default_rng(0)
    for name, (values, geometry, shape, spacing) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            shape = (shape[0] // 4, shape[1] // 4, shape[2] // 4) if quick else shape
            for i in range(2 if quick else 12):
                voxels = rng.integers(0, 800, (1, *shape), dtype=np.int16)
                write_volume(root / f"scans/s{i}.nii.gz", Volume(voxels, Grid.of_spacing(shape, spacing)))
            predictor = Predictor([saved_bundle(root / "bundle", values, ("T1",), geometry)], plan)
            start = time.perf_counter()
            subjects = find_subjects([root / "scans"], ("T1",))
            outcomes = list(predict_subjects(predictor, subjects, root / "out"))
            wall = time.perf_counter() - start
            stages = {stage: sum(o.seconds[stage] for o in outcomes) for stage in outcomes[0].seconds}
            stages["waiting for reading and writing"] = wall - sum(stages.values())
            rows += [{"case": f"{name}: {stage}", "s": s, "% of all": 100 * s / wall} for stage, s in stages.items()]
    return rows


# ---- memory ----------------------------------------------------------------------------------------------------


def train_two_steps(quick: bool) -> None:
    step = training_step(plan_compute(compile="off" if quick else "on"), quick=quick)
    step()
    step()


def train_hippocampus_steps(quick: bool) -> None:
    bench_data(quick)


def predict_large_scan(quick: bool) -> None:
    """A four-channel scan of 240×240×155 in 3D tiles of 80³."""
    from delineate.inference.predictor import Predictor

    shape, side = ((40, 40, 30), 16) if quick else ((240, 240, 155), 80)
    channels = ("FLAIR", "T1", "T1c", "T2")
    values = {
        "preprocessing": [{"kind": "reorient"}, {"kind": "normalise"}],
        "tiles": {"kind": "patches", "shape": [side] * 3},
        "network": {"kind": "unet", "dimensions": 3, "widths": [32, 64, 128]},
    }
    with tempfile.TemporaryDirectory() as folder:
        bundle = saved_bundle(Path(folder), values, channels, TileGeometry((side, side, side)))
        voxels = np.random.default_rng(0).integers(0, 800, (4, *shape), dtype=np.int16)
        Predictor([bundle], plan_compute(compile="off")).predict(Volume(voxels, Grid.of_spacing(shape)))


def bench_memory(quick: bool) -> list[Row]:
    works = {
        "starting up (imports alone)": "pass",
        "training steps, 32-64-128-256, batch 9 of 40×56×40": f"import run; run.train_two_steps({quick})",
        "training steps, hippocampus recipe": f"import run; run.train_hippocampus_steps({quick})",
        "predicting 4 × 240×240×155 in tiles of 80³": f"import run; run.predict_large_scan({quick})",
    }
    if quick:  # to see that they run, one process will do
        works = {"all of these": "; ".join(works.values())}
    return [{"case": name, "peak GB": peak_of(work)} for name, work in works.items()]


# ---- the reports' networks -----------------------------------------------------------------------------------------


def network_steps(name: str, how: str, quick: bool) -> None:
    """Print milliseconds and batch size of a training step of a packaged network at its report's input.

    At most two tiles: a step with the reports' batches takes minutes on two cores.
    """
    configuration = CONFIGURATIONS[name]
    spec, batch, sides = configuration.spec, min(2, configuration.batch), configuration.sides
    if quick:
        batch, sides = 2, tuple(max(2 * d, s) for d, s in zip(spec.divisor, spec.smallest, strict=True))
    cost = step_cost(spec, configuration.inputs, configuration.outputs, sides, batch)
    while batch > 1 and cost.memory_gb > 0.6 * available_memory_bytes() / 1e9:
        batch //= 2
        cost = step_cost(spec, configuration.inputs, configuration.outputs, sides, batch)
    plan = None
    if how != "defaults":
        keep_freed_memory()
        plan = plan_compute(compile="on" if how == "plan" and not quick else "off")
    torch.manual_seed(0)
    network = spec.build(configuration.inputs, configuration.outputs)
    targets = Targets({f"t{i}": (i + 1,) for i in range(configuration.outputs)}, "overlapping")
    loss = CrossEntropySpec().build(targets)
    inner = [n - 2 * m for n, m in zip(sides, spec.margin, strict=True)]
    image = torch.randn(batch, configuration.inputs, *sides)
    target = torch.randint(0, 2, (batch, configuration.outputs, *inner), dtype=torch.uint8)
    if plan is not None:
        plan.place(network, spec.dimensions)
        image = image.contiguous(memory_format=plan.memory_format(spec.dimensions))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, fused=plan is not None)

    def judged(x: Tensor, y: Tensor) -> Tensor:
        return loss(network(x), y, x)

    judge = judged if plan is None else plan.compiled(judged)
    seconds = []
    for _ in range(2 if quick else 3):
        start = time.perf_counter()
        with plan.autocast() if plan is not None else nullcontext():
            value = judge(image, target)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"batch": batch, "ms": 1000 * statistics.median(seconds[1:])}))


def bench_networks(quick: bool) -> list[Row]:
    rows = []
    for name in list(CONFIGURATIONS)[:1] if quick else CONFIGURATIONS:
        row: Row = {"case": name}
        for how in ("defaults", "plan") if quick else ("defaults", "not compiled", "plan"):
            printed, peak = process_of(f"import run; run.network_steps({name!r}, {how!r}, {quick})")
            measured = json.loads(printed.splitlines()[-1])
            row |= {"batch": measured["batch"], f"{how}, ms": measured["ms"], f"{how}, peak GB": peak}
        row["times faster"] = row["defaults, ms"] / row["plan, ms"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


BENCHMARKS = {
    "metrics": bench_metrics,
    "prepare": bench_prepare,
    "step": bench_step,
    "pass": bench_pass,
    "data": bench_data,
    "predict": bench_predict,
    "memory": bench_memory,
    "networks": bench_networks,
    "files": bench_files,
    "cohort": bench_cohort,
    "phantoms": bench_phantoms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help="default: all but networks")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, only to check that they run")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    results = {}
    # The reports' networks take most of an hour, so they run only when named.
    for name in options.names or [name for name in BENCHMARKS if name != "networks"]:
        # Graphs compiled by another benchmark count against this one's recompilation limit.
        torch._dynamo.reset()
        rows = results[name] = BENCHMARKS[name](options.quick)
        print(f"\n{name}: {(BENCHMARKS[name].__doc__ or '').strip()}".rstrip(": "))
        width = max(len(row["case"]) for row in rows)
        print(" ".join([" " * width, *(f"{column:>18}" for column in list(rows[0])[1:])]))
        for row in rows:
            cells = ["" if value is None else f"{value:.2f}" for value in list(row.values())[1:]]
            print(" ".join([row["case"].ljust(width), *(f"{cell:>18}" for cell in cells)]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
