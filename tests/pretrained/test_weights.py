"""Files with the real keys and shapes, made here."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from delineate.errors import OutputError, WeightsError
from delineate.pretrained import weights as store
from delineate.pretrained.vgg import VGG19Features, VGGInput, expected_shapes


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DELINEATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return {key: torch.randn(shape) * 0.05 for key, shape in expected_shapes("vgg11").items()}


@pytest.fixture
def published(tensors, tmp_path):
    """As torchvision saves it: a pickled state dict, classifier included."""
    path = tmp_path / "vgg11-8a719046.pth"
    torch.save({**tensors, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


def test_the_convolutions_are_vgg_s() -> None:
    assert [k for k in expected_shapes("vgg11") if k.endswith("weight")] == [
        f"features.{i}.weight" for i in (0, 3, 6, 8, 11, 13, 16, 18)
    ]
    shapes = expected_shapes("vgg19")
    assert len(shapes) == 32
    assert shapes["features.34.weight"] == (512, 512, 3, 3)


def test_vgg19_up_to_its_second_pool() -> None:
    features = VGG19Features("torchvision")
    assert sum(p.numel() for p in features.parameters()) == 260_160
    assert {k: tuple(v.shape) for k, v in features.state_dict().items()}.items() <= expected_shapes("vgg19").items()


def test_vgg19_up_to_its_last_pool_has_all_its_convolutions() -> None:
    with torch.device("meta"):
        features = VGG19Features("torchvision", pools=5)
    assert {k: tuple(v.shape) for k, v in features.state_dict().items()} == expected_shapes("vgg19")


def test_the_two_preprocessings_are_those_of_their_weights() -> None:
    """A pixel of (0.485, 0.456, 0.406), the mean of one; of the other's mean in BGR."""
    pixel = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    torch.testing.assert_close(VGGInput("torchvision")(pixel), torch.zeros(1, 3, 1, 1))
    caffe = VGGInput("caffe")
    rgb = torch.tensor([123.68, 116.779, 103.939]).view(1, 3, 1, 1) / 255
    torch.testing.assert_close(caffe(rgb.flip(1)), torch.zeros(1, 3, 1, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(caffe(rgb.flip(1) + 1 / 255), torch.ones(1, 3, 1, 1), rtol=0, atol=1e-4)


def test_an_imported_file_is_what_imagenet_gives(published, tensors) -> None:
    entry = store.import_weights(published, "vgg11")
    assert entry.tensors == 16
    assert store.list_weights() == [entry]
    loaded, preprocessing = store.load_features("vgg11", "imagenet")
    assert preprocessing == "torchvision"
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_safetensors_and_paths_are_read_too(tensors, tmp_path) -> None:
    path = tmp_path / "own.safetensors"
    save_file(tensors, path)
    loaded, _ = store.load_features("vgg11", str(path))
    assert torch.equal(loaded["features.18.bias"], tensors["features.18.bias"])


def test_caffe_weights_are_remembered_as_such(tensors, tmp_path) -> None:
    path = tmp_path / "caffe.pth"
    torch.save({"state_dict": tensors}, path)
    store.import_weights(path, "vgg11", "caffe")
    assert store.load_features("vgg11", "imagenet")[1] == "caffe"


def test_random_needs_no_file() -> None:
    assert store.load_features("vgg19", "random")[0] is None


def test_every_misfit_is_named(tensors, tmp_path) -> None:
    broken = {**tensors, "features.0.weight": torch.zeros(64, 1, 3, 3), "features.99.weight": torch.zeros(1)}
    del broken["features.3.bias"]
    path = tmp_path / "broken.pth"
    torch.save(broken, path)
    with pytest.raises(WeightsError) as error:
        store.import_weights(path, "vgg11")
    text = str(error.value)
    assert "features.0.weight is 64×1×3×3, not 64×3×3×3" in text
    assert "features.3.bias is missing" in text
    assert "features.99.weight is not in vgg11" in text
    assert store.list_weights() == []


def test_files_that_run_code_are_not_read(tmp_path) -> None:
    path = tmp_path / "whole.pth"
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(WeightsError, match="read safely"):
        store.import_weights(path, "vgg11")


class Allocates:
    """Takes memory when it is unpickled, as much as its pickle says; a few bytes here."""

    def __reduce__(self):
        return bytearray, (16,)


@pytest.mark.parametrize("today", [True, False])
def test_files_that_only_take_memory_are_not_read(tensors, today, tmp_path) -> None:
    """PyTorch's own reader makes byte arrays of any size."""
    torch.save({**tensors, "more": Allocates()}, tmp_path / "a.pth", _use_new_zipfile_serialization=today)
    torch.save({"weights": tensors, "more": [Allocates()]}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"would run builtins\.bytearray, .*read safely"):
        store.read_tensors(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"would run builtins\.bytearray, "):
        store.read_checkpoint(tmp_path / "b.pth", "weights", ())


@pytest.mark.parametrize("today", [True, False])
def test_whatever_holds_tensors_alone_is_read(today, tmp_path) -> None:
    kinds = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    state = OrderedDict({str(kind): torch.ones(3).to(kind) for kind in kinds})
    state["parameter"] = nn.Parameter(torch.ones(2, 3).T)
    optimiser = torch.optim.Adam([state["parameter"]])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [1, 2])
    about = {"optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(), "shape": state["parameter"].shape}
    torch.save({"state_dict": state, **about}, tmp_path / "a.pth", _use_new_zipfile_serialization=today)
    read = store.read_tensors(tmp_path / "a.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in state.items())


@pytest.mark.parametrize("content", [b"", b"not weights"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path, content, suffix) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError):
        store.import_weights(path, "vgg11")


def test_a_changed_store_is_noticed(published, home) -> None:
    store.import_weights(published, "vgg11")
    path = home / "weights/vgg11.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="has changed since it was imported"):
        store.load_features("vgg11", "imagenet")


def test_without_network_both_ways_are_named(monkeypatch) -> None:
    monkeypatch.setitem(store.PUBLISHED, "vgg19", "http://127.0.0.1:9/vgg19-dcbb9e9d.pth")
    with pytest.raises(WeightsError, match=r"delineate weights import FILE --as vgg19.*weights: random"):
        store.load_features("vgg19", "imagenet")


def test_a_download_is_checked_and_kept(published, monkeypatch, tmp_path) -> None:
    """From a file's address instead of a server's; its name carries its checksum, as the published ones do."""
    right = published.with_name(f"vgg11-{store.sha256_of(published)[:8]}.pth")
    published.rename(right)
    monkeypatch.setitem(store.PUBLISHED, "vgg11", right.as_uri())
    assert store.load_features("vgg11", "imagenet")[0] is not None
    assert [entry.name for entry in store.list_weights()] == ["vgg11"]


def test_an_import_that_is_not_over_has_not_begun(published, home, monkeypatch) -> None:
    """Killed, or seen by another process, between the weights and what describes them."""
    right = published.with_name(f"vgg11-{store.sha256_of(published)[:8]}.pth")
    published.rename(right)
    monkeypatch.setitem(store.PUBLISHED, "vgg11", right.as_uri())
    store.import_weights(right, "vgg11")
    (home / "weights/vgg11.json").unlink()
    assert store.load_features("vgg11", "imagenet")[0] is not None
    assert [entry.name for entry in store.list_weights()] == ["vgg11"]


@pytest.mark.parametrize("blocked", [".", "weights"])
def test_a_store_that_cannot_be_written_says_so(published, home, blocked) -> None:
    (home / blocked).parent.mkdir(parents=True, exist_ok=True)
    (home / blocked).touch()
    with pytest.raises(OutputError, match="cannot be written"):
        store.import_weights(published, "vgg11")


def test_a_damaged_download_is_refused(published, monkeypatch) -> None:
    monkeypatch.setitem(store.PUBLISHED, "vgg11", published.as_uri())  # its checksum is not 8a719046…
    with pytest.raises(WeightsError, match="checksum differs"):
        store.load_features("vgg11", "imagenet")
    assert store.list_weights() == []


def test_commands(published, capsys) -> None:
    from typer.testing import CliRunner

    from delineate.cli.app import app

    runner = CliRunner()
    assert runner.invoke(app, ["weights", "import", str(published), "--as", "vgg11"]).exit_code == 0
    listed = runner.invoke(app, ["weights", "list", "--json"])
    assert json.loads(listed.stdout)[0]["name"] == "vgg11"
