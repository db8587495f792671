"""Parts of a user's own: a module with one of each kind, and a package with an entry point. Delineate knows of none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from delineate import plugins
from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.layouts import open_dataset
from delineate.errors import BundleError, DelineateError, RecipeError, UnknownLayout
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_header, read_volume, write_label, write_volume
from delineate.networks.spec import NETWORKS
from delineate.recipe import load_recipe, packaged_recipes, recipe_from, to_yaml
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLE = ROOT / "examples/own_network"
GRID = Grid.of_spacing((12, 12, 10), (1, 1, 1.5))
RECIPE = {
    "name": "own",
    "preprocessing": [{"kind": "square"}],
    "tiles": {"kind": "patches", "shape": [8, 8, 8]},
    "sampler": {"kind": "corners"},
    "network": {"kind": "two_layers", "filters": 6},
    "loss": {"kind": "sum", "terms": [{"loss": {"kind": "absolute_error"}}, {"loss": {"kind": "dice"}}]},
    "training": {"steps": 2, "folds": 3, "validation": {"loss_every": None}},
    "metrics": ["dice", "missed_ml"],
}


@pytest.fixture
def own_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv(plugins.VARIABLE, "own_parts")
    import own_parts

    return own_parts


def write_drawings(root: Path, ending: str) -> Path:
    rng = np.random.default_rng(3)
    for i in range(3):
        label = np.zeros(GRID.shape, np.uint8)
        label[3 : 7 + i, 4:9, 3:7] = 1
        scan = (label * 3 + rng.standard_normal(GRID.shape)).astype(np.float32)
        write_volume(root / f"p{i}/anatomy{ending}", Volume(scan[None], GRID))
        write_label(root / f"p{i}/drawing.nii.gz", LabelVolume(label, GRID))
    return root


def test_each_kind_of_part_is_used_and_recorded(own_parts, tmp_path, monkeypatch) -> None:
    """Network, loss, step, sampler, metric, layout and format come from one module, and train two steps."""
    dataset = open_dataset(write_drawings(tmp_path / "data", ".scan.npz"))
    assert (dataset.layout, len(dataset.subjects)) == ("drawings", 3)
    recipe = recipe_from(RECIPE)
    options = RunOptions(cache=tmp_path / "cache", device="cpu", compile="off", threads=1)
    result = train(recipe, dataset, tmp_path / "run", options, Reporter())
    assert result.steps == 2
    assert result.evaluation is not None
    assert result.evaluation.metrics[:2] == ("dice", "missed_ml")
    bundle = Bundle.load(tmp_path / "run/bundle")
    assert bundle.recipe == recipe
    assert bundle.provenance.requires == ("own_parts",)
    scan = read_volume(tmp_path / "data/p0/anatomy.scan.npz")
    label = Predictor([bundle], plan_compute(device="cpu", compile="off")).predict(scan).label
    write_label(tmp_path / "out.scan.npz", label)
    assert read_header(tmp_path / "out.scan.npz").grid.shape == GRID.shape
    command = ["predict", tmp_path / "run", tmp_path / "data/p0/anatomy.scan.npz", "-o", tmp_path / "predicted"]
    done = CliRunner().invoke(app, [*map(str, command), "--format", "scan.npz"])
    assert done.exit_code == 0, done.output
    predicted = tmp_path / "predicted/anatomy.scan.npz"
    assert np.array_equal(read_volume(predicted).voxels[0], label.voxels)
    listed = CliRunner().invoke(app, ["networks", "list"])
    assert "two_layers" in listed.output
    # Nothing of it is there where nobody names the module.
    monkeypatch.delenv(plugins.VARIABLE)
    with pytest.raises(BundleError, match=r"parts of own_parts; name its module: delineate --plugin own_parts"):
        Bundle.load(tmp_path / "run/bundle")
    with pytest.raises(RecipeError, match="'two_layers' is not one of unet, "):
        recipe_from(RECIPE)


def test_own_parts_keep_the_laws_of_their_kind(own_parts, tmp_path) -> None:
    from delineate import testing

    testing.check_network(own_parts.TwoLayers())
    testing.check_loss(own_parts.AbsoluteError())
    testing.check_step(own_parts.Square())
    testing.check_sampler(own_parts.Corners())
    testing.check_metric(own_parts.MISSED_ML)
    testing.check_layout(own_parts.DRAWINGS, write_drawings(tmp_path, ".nii.gz"))
    testing.check_format(own_parts.NPZ)
    assert testing.__all__ == [
        f"check_{part}" for part in ("format", "layout", "loss", "metric", "network", "sampler", "step")
    ]


def test_own_kinds_read_back_and_misspelt_ones_name_the_nearest(own_parts) -> None:
    recipe = recipe_from(RECIPE)
    assert recipe.network == own_parts.TwoLayers(filters=6)
    assert recipe_from(recipe.as_dict()) == recipe
    assert "filters: 6" in to_yaml(recipe.as_dict())
    for changes, message in [
        ({"network": {"kind": "two_layer"}}, "did you mean 'two_layers'"),
        ({"network": {"kind": "two_layers", "filter": 3}}, r"network\.filter: no such field; did you mean 'filters'"),
        ({"network": {"kind": "two_layers", "filters": "x"}}, r"network\.filters: .*got 'x'"),
        ({"loss": {"kind": "absolut_error"}}, "did you mean 'absolute_error'"),
        ({"metrics": ["missed"]}, "did you mean 'missed_ml'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            recipe_from(RECIPE | changes)


def test_the_command_line_takes_a_module(own_parts, monkeypatch) -> None:
    monkeypatch.delenv(plugins.VARIABLE)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    changes = ["--set", "network={kind: two_layers}", "--set", "network.filters=5"]
    shown = CliRunner().invoke(app, ["--plugin", "own_parts", "recipes", "show", "hippocampus", "--json", *changes])
    assert json.loads(shown.output)["network"]["filters"] == 5
    listed = CliRunner().invoke(app, ["metrics", "list", "--json"])
    assert "missed_ml" in json.loads(listed.output)["metrics"]
    with pytest.raises(RecipeError, match="'no_such_module' cannot be imported: ModuleNotFoundError"):
        CliRunner().invoke(app, ["--plugin", "no_such_module", "metrics", "list"], catch_exceptions=False)


def test_a_part_may_not_take_a_name_of_delineates(tmp_path, monkeypatch) -> None:
    (tmp_path / "clashing.py").write_text(
        "from delineate.networks.unet import UNetSpec\nclass Mine(UNetSpec):\n    '''Still called unet.'''\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, "clashing")
    with pytest.raises(RecipeError, match="module 'clashing' has a network 'unet', a name that Delineate itself uses"):
        load_recipe("hippocampus", ["network.kind=unett"])


def test_a_layout_that_fails_is_told_by_its_module(tmp_path, monkeypatch) -> None:
    (tmp_path / "failing.py").write_text(
        "from delineate.datasets.folder import Layout\nFAILS = Layout('fails', 'any', lambda folder: folder.nothing)\n",
        encoding="utf-8",
    )
    data = tmp_path / "data"
    for kind in ("imagesTr", "labelsTr"):
        write_label(data / kind / "a.nii.gz", LabelVolume(np.ones(GRID.shape, np.uint8), GRID))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, "failing")
    with pytest.raises(UnknownLayout, match=r"layout 'fails' of failing fails on .*AttributeError"):
        open_dataset(data)
    assert open_dataset(data, layout="msd").layout == "msd"


def installed(site: Path, name: str, version: str, points: dict[str, dict[str, str]]) -> None:
    """What an installer leaves of a package's metadata."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    groups = "\n".join(
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in parts.items()) for group, parts in points.items()
    )
    (info / "entry_points.txt").write_text(groups, encoding="utf-8")


USE_IT = """
import sys
from pathlib import Path
import pytest
from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.datasets.layouts import open_dataset
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_volume, write_label
from delineate.networks.configurations import others
from delineate.recipe import load_recipe
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

example, data, run = map(Path, sys.argv[1:])
assert "own_network" not in sys.modules
assert pytest.main(["-q", "-p", "no:cacheprovider", str(example / "tests")]) == 0
assert list(others()) == ["own_net"]
changes = ["network={kind: own_net, dimensions: 3, width: 4}", "tiles.shape=[8, 8, 8]", "training.steps=2",
           "training.minutes=null", "training.folds=3", "data.targets={values: {ball: 1}}", "postprocessing={}",
           "training.validation.subjects=0"]
recipe = load_recipe("hippocampus", changes)
patterns = {"images": "*/anatomy.nii.gz", "labels": "*/drawing.nii.gz"}
dataset = open_dataset(data, **patterns, targets=recipe.data.targets.targets())
options = RunOptions(cache=run / "cache", device="cpu", compile="off", threads=1, evaluate=False)
assert train(recipe, dataset, run, options, Reporter()).steps == 2
bundle = Bundle.load(run / "bundle")
assert bundle.provenance.requires == ("own-network==0.1.0",), bundle.provenance
predictor = Predictor([bundle], plan_compute(device="cpu", compile="off"))
write_label(run / "label.nii.gz", predictor.predict(read_volume(data / "p0/anatomy.nii.gz")).label)
"""


def test_the_example_package_trains_predicts_and_is_asked_for_where_it_is_absent(tmp_path) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed(tmp_path / "site", project["name"], project["version"], project["entry-points"])
    places = [EXAMPLE / "src", tmp_path / "site", ROOT / "src"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places)), "PYTHONWARNINGS": "ignore"}
    environment.pop(plugins.VARIABLE, None)
    data, run = write_drawings(tmp_path / "data", ".nii.gz"), tmp_path / "run"
    command = [sys.executable, "-c", USE_IT, str(EXAMPLE), str(data), str(run)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "label.nii.gz").is_file()
    with pytest.raises(BundleError, match=r"uses parts of own-network==0\.1\.0; pip install 'own-network==0\.1\.0'"):
        Bundle.load(run / "bundle")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Net", r"network 'strange' from odd-one==2\.0 cannot be loaded: ModuleNotFoundError"),
        ("json:dumps", "is json:dumps, which is not a network of that name"),
        ("delineate.networks.unet:UNetSpec", "give its entry point the part's own name, 'unet'"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_told_by_its_package(value, message, tmp_path, monkeypatch) -> None:
    installed(tmp_path, "odd-one", "2.0", {"delineate.networks": {"strange": value}})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_recipe("hippocampus", ["network={kind: strange}"])
    with pytest.warns(UserWarning, match="strange"):
        assert NETWORKS.usable() == []
    assert load_recipe("hippocampus").network.kind == "unet"  # nothing else suffers


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):
        installed(tmp_path, name, "1.0", {"delineate.losses": {"same": "json:dumps"}})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"loss 'same' is offered by (one==1\.0 and two|two==1\.0 and one)==1\.0"):
        load_recipe("hippocampus", ["loss={kind: same}"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_file_of_an_own_format_that_is_damaged_is_refused(own_parts, content, tmp_path) -> None:
    (tmp_path / "bad.scan.npz").write_bytes(content)
    with pytest.raises(DelineateError, match=r"E_FORMAT|E_TRUNCATED"):
        read_volume(tmp_path / "bad.scan.npz")


def test_nothing_is_looked_for_where_every_name_is_delineates_own(monkeypatch) -> None:
    """A packaged recipe reads without one look at entry points."""

    def refuse(**_: object) -> None:
        raise AssertionError("entry points were looked at")

    monkeypatch.setattr(plugins, "entry_points", refuse)
    plugins._all_offered.cache_clear()
    for name in packaged_recipes():
        load_recipe(name)
    with pytest.raises(RecipeError, match="were looked at"):
        load_recipe("hippocampus", ["network={kind: strange}"])
