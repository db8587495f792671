"""Every command that writes: inputs are never a target, other files only on request; said before work begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from delineate.bundle import Bundle, Provenance, hidden
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms.writing import write_phantoms
from delineate.datasets.repair import repair
from delineate.errors import BadPath, OutputError
from delineate.evaluation.table import Evaluation
from delineate.io.formats import write_label, write_volume
from delineate.io.overwriting import check_outputs
from delineate.io.pseudonyms import key_id
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry
from delineate.serving.places import make_keys

GRID = Grid.of_spacing((8, 8, 4), (1, 1, 3))
TINY = {
    "name": "small",
    "tiles": {"kind": "patches", "shape": [8, 8, 4]},
    "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, two folders of labels, two evaluations, a bundle, and a model of nnU-Net's."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(5)
    for i in range(2):
        write_volume(root / f"data/imagesTr/c{i}_0000.nii.gz", Volume(rng.random((1, *GRID.shape), np.float32), GRID))
        for folder in ("data/labelsTr", "one", "two"):
            label = LabelVolume((rng.random(GRID.shape) > 0.5).astype(np.uint8), GRID)
            write_label(root / folder / f"c{i}.nii.gz", label)
    about = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (root / "data/dataset.json").write_text(json.dumps(about), encoding="utf-8")
    for name in ("m1", "m2"):
        table = {"subject": ["c0", "c1"], "site": "", "target": "organ", "case": "both", "dice": [0.5, 0.6]}
        Evaluation(pd.DataFrame(table)).write(root / name)
    recipe = recipe_from(TINY)
    geometry, known = TileGeometry((8, 8, 4)), Provenance(key=key_id(), training=hidden(["somebody"]))
    bundle = Bundle(
        recipe, recipe.pipeline, Targets({"organ": (1,)}), ("MR",), geometry, (1.0, 1.0, 3.0), provenance=known
    )
    bundle.save(root / "bundle", bundle.network().state_dict(), {})
    (root / "model").mkdir()
    (root / "model/plans.json").write_text("{}", encoding="utf-8")
    (root / "state").mkdir()
    make_keys(root / "state", "tcp://127.0.0.1:7420")
    return root


@dataclass(frozen=True)
class Writer:
    """A command but for its output: the words for that, a file it writes there, and its inputs' places."""

    command: str
    output: str
    writes: str = ""
    inputs: tuple[str, ...] = ()
    flag: bool = field(default=True)

    def words(self, world: Path, out: Path) -> list[str]:
        texts = f"{self.command} {self.output}".split()
        return [text.replace("@", f"{world}/").replace("OUT", str(out)) for text in texts]


WRITERS = {
    "predict": Writer("predict @bundle @data/imagesTr", "-o OUT", "c0.nii.gz", ("data/imagesTr/c0_0000.nii.gz",)),
    "predict's measurements": Writer(
        "predict @bundle @data/imagesTr --quantity MR",
        "-o OUT",
        "measurements.csv",
        ("data/imagesTr/c0_0000.nii.gz",),
        flag=False,
    ),
    "predict's measurements for programs": Writer(
        "predict @bundle @data/imagesTr --quantity MR",
        "-o OUT",
        "measurements.json",
        ("data/imagesTr/c0_0000.nii.gz",),
        flag=False,
    ),
    "convert a scan": Writer(
        "data convert @data/imagesTr/c0_0000.nii.gz", "OUT", "", ("data/imagesTr/c0_0000.nii.gz",)
    ),
    "convert to VTK": Writer("data convert --label @one/c0.nii.gz", "OUT/c0.vtk", "c0.nii.gz", ("one/c0.nii.gz",)),
    "consensus": Writer("data consensus @one @two", "-o OUT", "c1.nii.gz", ("one/c1.nii.gz", "two/c1.nii.gz")),
    "phantom": Writer("data phantom prostate -n 1 --layout promise12", "-o OUT", "truth.csv", flag=False),
    "repair": Writer("data inspect @data", "--repair OUT", "repairs.json", flag=False),
    "split": Writer("data split @data --folds 2", "-o OUT", "", ("data/dataset.json",), flag=False),
    "evaluate's tables": Writer("evaluate @one @data", "-o OUT", "metrics.csv"),
    "evaluate's page": Writer("evaluate @one @data", "--report OUT", "", ("data/labelsTr/c0.nii.gz", "one/c0.nii.gz")),
    "compare's page": Writer("compare @m1 @m2", "--report OUT", "", ("m1/metrics.csv", "m2/summary.json")),
    "weights export": Writer("weights export @bundle", "-o OUT", "", ("bundle/weights.safetensors",)),
    "export": Writer("export @bundle", "--onnx -o OUT", "", ("bundle/weights.safetensors",)),
    "import": Writer("import nnunet @model", "-o OUT", "weights.safetensors", ("model/plans.json",)),
    "import monai": Writer("import monai @model", "-o OUT", "weights.safetensors", ("model/plans.json",)),
    "card's page": Writer("card @bundle", "-o OUT", "", ("bundle/weights.safetensors",)),
    "calibrate": Writer(
        "calibrate @bundle --data @data --name ours --device cpu",
        "-o OUT",
        "bundle/weights.safetensors",
        ("data/labelsTr/c0.nii.gz", "bundle/weights.safetensors"),
    ),
    "pack": Writer("models pack @bundle", "-o OUT", "", ("bundle/weights.safetensors",)),
    "fetch": Writer("models fetch @bundle", "-o OUT", "weights.safetensors", ("bundle/weights.safetensors",)),
    "forgetting": Writer("forgetting @bundle @bundle --data @data --device cpu", "-o OUT", "before/c0.nii.gz"),
    "test": Writer("test @bundle --data @data --device cpu", "-o OUT", "predictions/c0.nii.gz"),
    "test's tables": Writer("test @bundle --data @data --device cpu", "-o OUT", "evaluation/metrics.csv"),
    "test's page": Writer(
        "test @bundle --data @data --device cpu",
        "-o OUT",
        "report.html",
        ("data/labelsTr/c0.nii.gz", "bundle/weights.safetensors"),
    ),
    "test's probabilities": Writer(
        "test @bundle --data @data --device cpu",
        "-o OUT",
        "predictions/probabilities/c1.nii.gz",
        ("data/imagesTr/c0_0000.nii.gz", "data/labelsTr/c1.nii.gz"),
    ),
    "study": Writer("study run hippocampus-cv --data @data", "-o OUT", "report.html", flag=False),
    "adapt": Writer(
        "adapt @bundle --data @data --device cpu", "-o OUT", "report.html", ("bundle/weights.safetensors",), flag=False
    ),
    "keys": Writer(
        "keys add anna --address tcp://gpu:7420 --state @state", "-o OUT", "", ("state/me.key",), flag=False
    ),
    "send": Writer(
        "send @data/imagesTr/c0_0000.nii.gz", "-o OUT/c.nii.gz", "c.nii.gz", ("data/imagesTr/c0_0000.nii.gz",)
    ),
    "send's others": Writer(
        "send @data/imagesTr/c0_0000.nii.gz", "-o OUT/c.vtk", "c.nii.gz", ("data/imagesTr/c0_0000.nii.gz",)
    ),
    "jobs": Writer("jobs", f"--fetch {uuid4()} --key @state/me.key -o OUT/c.nii.gz", "c.nii.gz", ("state/me.key",)),
    "train": Writer("train generic_3d --data @data", "-o OUT", "report.html", flag=False),
    "train's subjects": Writer("train generic_3d --data @data", "-o OUT", "subjects.json", flag=False),
}
writers = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)


def refused(words: list[str]) -> str:
    done = CliRunner().invoke(app, words)
    assert getattr(done.exception, "code", None) in ("E_OUTPUT", "E_SPLIT"), repr(done.exception)
    return str(done.exception)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@writers
def test_what_exists_is_written_over_on_request_only(writer: Writer, world: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out" if writer.writes else "out.nii.gz")
    there = out / writer.writes if writer.writes else out
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_text("somebody's", encoding="utf-8")
    text = refused(writer.words(world, out))
    assert ("--overwrite" in text) == writer.flag
    assert content(tmp_path) == {str(there.relative_to(tmp_path)): b"somebody's"}, "and nothing else was begun"


@writers
def test_inputs_are_never_written_over(writer: Writer, world: Path, tmp_path: Path) -> None:
    before = content(world)
    for i, name in enumerate(writer.inputs):
        out = tmp_path / f"out{i}"
        link = out / writer.writes if writer.writes else out
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(world / name)
        for flags in ([], ["--overwrite"] * writer.flag):
            refused([*writer.words(world, out), *flags])
        link.unlink()
        link.hardlink_to(world / name)
        refused([*writer.words(world, out), *["--overwrite"] * writer.flag])
    assert content(world) == before


@pytest.mark.parametrize("name", [name for name, w in WRITERS.items() if w.writes and w.output.startswith("-")])
def test_a_file_where_a_folder_is_needed_is_said_first(name: str, world: Path, tmp_path: Path) -> None:
    writer = WRITERS[name]
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert "folder is needed" in refused(writer.words(world, out))
    assert content(tmp_path) == {"taken": b"a file"}


def test_every_command_that_writes_is_held_to_this() -> None:
    """A new command with an output has to be added above."""
    import typer

    def leaves(command: object, path: str = "") -> Iterator[tuple[str, object]]:
        for name, child in getattr(command, "commands", {}).items():
            yield from leaves(child, f"{path} {name}".strip())
        if not hasattr(command, "commands"):
            yield path, command

    writing = {
        path
        for path, command in leaves(typer.main.get_command(app))
        for option in command.params  # type: ignore[attr-defined]
        if option.name in ("out", "report", "repair")
    }
    held = {" ".join(w.command.split("@")[0].split()[:2]).removesuffix(" generic_3d") for w in WRITERS.values()}
    assert writing - {"demo"} == held  # the demo's folder is a run's and simulated scans', both held above


def test_a_series_is_its_folder_and_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    for name in ("1.dcm", "2.dcm"):
        (tmp_path / "series" / name).write_bytes(b"\0" * 128 + b"DICM")
    for given in (tmp_path / "series", tmp_path / "series/1.dcm"):
        with pytest.raises(OutputError, match="an input"):
            check_outputs([tmp_path / "series/../series/2.dcm"], [given], overwrite=True)
    with pytest.raises(OutputError, match="not a plain file"):
        check_outputs([Path("/dev/null")], [], overwrite=True)
    files = [tmp_path / f"{i}.txt" for i in range(7)]
    for file in files:
        file.write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"4.txt' and 2 more \(7 files\) exist already"):
        check_outputs(files, [])
    check_outputs(files, [tmp_path / "series"], overwrite=True)


@pytest.mark.parametrize(("kind", "seed"), [("prostate", 1), ("abdomen", 0)])
def test_simulated_patients_are_added_to_their_like_alone(kind: str, seed: int, tmp_path: Path) -> None:
    (tmp_path / "simulated.json").write_text(
        json.dumps({"simulated": True, "kind": "prostate", "seed": 0}), encoding="utf-8"
    )
    with pytest.raises(OutputError, match="name a new folder"):
        write_phantoms(tmp_path, 1, kind, seed=seed)


def test_a_demo_of_another_number_of_scans_is_refused(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "simulated_scans", 2, coarse=8.0)
    before = content(tmp_path)
    text = refused(["demo", "-o", str(tmp_path), "--subjects", "10", "--minutes", "0.1", "--device", "cpu"])
    assert "holds 2 simulated scans, not 10" in text
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "outside", [lambda root: f"../{root.name}_more/s.nii.gz", lambda root: f"{root}_more/s.nii.gz"]
)
def test_a_scan_outside_the_data_set_is_not_repaired_over_itself(
    outside: Callable[[Path], str], tmp_path: Path
) -> None:
    root = tmp_path / "set"
    voxels = np.full((1, *GRID.shape), np.nan, np.float32)
    voxels[..., 1:] = 2
    write_volume(tmp_path / "set_more/s.nii.gz", Volume(voxels, GRID))
    about = {"modality": {"0": "MR"}, "labels": {"0": "background"}, "training": [{"image": outside(root)}]}
    root.mkdir()
    (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    before = content(tmp_path)
    with pytest.raises(BadPath):
        repair(open_dataset(root), tmp_path / "repaired")
    assert before.items() <= content(tmp_path).items()


def test_a_run_does_not_begin_where_its_data_would_be_written_over(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/predictions").symlink_to(world / "data")
    text = refused(["train", "generic_3d", "--data", str(world / "data"), "-o", str(tmp_path / "run")])
    assert "a run would overwrite it" in text
