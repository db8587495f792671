"""The store of published weights: import, list, load, and download where that is possible."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from delineate.errors import DelineateError, WeightsError
from delineate.io.documents import Document
from delineate.io.files import home_folder, open_file, parsing, writing_beside
from delineate.pretrained.vgg import VGGName, expected_shapes

Preprocessing = Literal["torchvision", "caffe"]
PUBLISHED: dict[str, str] = {
    "vgg11": "https://download.pytorch.org/models/vgg11-8a719046.pth",
    "vgg19": "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
}
"""Addresses; the digits before the suffix begin the file's SHA-256."""
SECONDS_TO_ANSWER = 20.0
_FIX = "it cannot be read safely; give a safetensors file or a state dict"


class Entry(Document):
    """One imported file; ``sha256`` is that of the stored file."""

    error: ClassVar[type[DelineateError]] = WeightsError
    fix: ClassVar[str] = "import the weights again"

    name: str
    source: str
    preprocessing: Preprocessing
    sha256: str
    tensors: int


def store_folder() -> Path:
    """Where imported weights lie."""
    return home_folder() / "weights"


def import_weights(file: Path, name: VGGName, preprocessing: Preprocessing = "torchvision") -> Entry:
    """Check a file of VGG weights, tensor by tensor, and put it into the store.

    A safetensors file, or a state dict as PyTorch saves it, which is read without running its code. The
    classifier is left out. Raises :class:`WeightsError` that lists what does not fit.
    """
    from safetensors.torch import save_file

    weights = fitting(read_tensors(file), name, file.name)
    target = store_folder() / f"{name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing_beside(target) as path:
        save_file(weights, path)
    entry = Entry(
        name=name, source=file.name, preprocessing=preprocessing, sha256=sha256_of(target), tensors=len(weights)
    )
    entry.write(target.with_suffix(".json"))
    return entry


def list_weights() -> list[Entry]:
    """What has been imported."""
    return [Entry.read(file) for file in sorted(store_folder().glob("*.json"))]


def load_features(name: VGGName, weights: str) -> tuple[dict[str, Tensor] | None, Preprocessing]:
    """Tensors of a VGG's convolutions by key, and the preprocessing they expect.

    ``weights``: ``random`` gives None; ``imagenet`` the imported file, which is downloaded if there is none;
    anything else is the path of a file as :func:`import_weights` takes it.
    """
    if weights == "random":
        return None, "torchvision"
    if weights != "imagenet":
        file = Path(weights)
        return fitting(read_tensors(file), name, file.name), "torchvision"
    stored = store_folder() / f"{name}.safetensors"
    if not stored.exists():
        _download(name)
    entry = next((e for e in list_weights() if e.name == name), None)
    if entry is None or sha256_of(stored) != entry.sha256:
        raise WeightsError(f"{stored} has changed since it was imported", fix="import it again")
    return read_tensors(stored), entry.preprocessing


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or of a PyTorch state dict."""
    from safetensors.torch import load_file

    if not file.exists():
        raise WeightsError(f"no file {file}", fix="give the path of a weight file")
    with parsing(file.name, WeightsError, fix=_FIX):
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if zipfile.is_zipfile(stream):
                with zipfile.ZipFile(stream) as archive:
                    _refuse_packed(file, archive, size)
        loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
            loaded = loaded["state_dict"]
        if not isinstance(loaded, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
        ):
            raise WeightsError(f"{file.name} holds no tensors by name", fix="save the network's state_dict()")
        for name, tensor in loaded.items():
            _check_plain(file, name, tensor, size)
    return dict(loaded)


def _refuse_packed(file: Path, archive: zipfile.ZipFile, size: int) -> None:
    """PyTorch packs without compressing, so what would grow when it is unpacked is no file of its."""
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise WeightsError(f"{file.name} unpacks to more than its own size, as no weights do", fix=_FIX)


def _check_plain(file: Path, name: str, tensor: Tensor, size: int) -> None:
    """Raise :class:`WeightsError` for what is no array of finite numbers that the file itself holds."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise WeightsError(
            f"{file.name}: {name[:80]} is no plain array of numbers", fix="save the network's state_dict()"
        )
    if tensor.numel() * tensor.element_size() > size:
        raise WeightsError(
            f"{file.name}: {name[:80]} is said to be {_sides(tensor.shape)}, more than the file holds", fix=_FIX
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise WeightsError(f"{file.name}: {name[:80]} has numbers that are not finite", fix=_FIX)


def fitting(tensors: Mapping[str, Tensor], name: VGGName, source: str) -> dict[str, Tensor]:
    """The convolutions of ``name``; raises :class:`WeightsError` listing every key that does not fit."""
    expected, wrong = expected_shapes(name), []
    for key, shape in expected.items():
        if key not in tensors:
            wrong.append(f"{key} is missing")
        elif tuple(tensors[key].shape) != shape:
            wrong.append(f"{key} is {_sides(tensors[key].shape)}, not {_sides(shape)}")
    wrong += [f"{key} is not of {name}" for key in tensors if key not in expected and not key.startswith("classifier.")]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{source} is not {name}: {'; '.join(wrong[:5])}{more}", fix=f"give a file of {name}")
    return {key: tensors[key].detach().float().contiguous() for key in expected}


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(name: VGGName) -> None:
    address = PUBLISHED[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / address.rsplit("/", 1)[1]
        try:
            with urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER) as answer, file.open("wb") as out:
                shutil.copyfileobj(answer, out)
        except OSError as error:
            raise WeightsError(
                f"weights of {name} are not in the store and cannot be downloaded from {address} ({error})",
                fix=(
                    f"either fetch that file elsewhere and `delineate weights import FILE --as {name}`, "
                    "or set weights: random in the recipe"
                ),
            ) from error
        if not sha256_of(file).startswith(file.stem.rsplit("-", 1)[1]):
            raise WeightsError(f"the download of {address} is damaged: its checksum differs", fix="try again")
        import_weights(file, name)


def _sides(shape: tuple[int, ...] | torch.Size) -> str:
    return "×".join(str(n) for n in shape)
