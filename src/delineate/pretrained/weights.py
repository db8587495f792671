"""The store of published weights: import, list, load, and download where possible."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from delineate.errors import DelineateError, WeightsError
from delineate.io.documents import Document
from delineate.io.files import home_folder, open_file, parsing, writing_beside
from delineate.pretrained.vgg import Preprocessing, VGGName, expected_shapes

PUBLISHED: dict[str, str] = {
    "vgg11": "https://download.pytorch.org/models/vgg11-8a719046.pth",
    "vgg19": "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
}
"""Download addresses; the digits before the suffix are the first of the file's SHA-256."""
SECONDS_TO_ANSWER = 20.0
_FIX = "it cannot be read safely; give a safetensors file or a state dict"

_OF_TENSORS = {
    *("collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "torch.nn.parameter.Parameter"),
    *(f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "parameter")),
    *(
        f"torch.{kind}Storage"
        for kind in ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
    ),
    *map(str, (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)),
    *map(str, (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
}
"""What tensors are made of in a file of PyTorch's. Its own reader allows more, such as arrays of any size."""


class Entry(Document):
    """One imported file; ``sha256`` is of the stored file."""

    error: ClassVar[type[DelineateError]] = WeightsError
    fix: ClassVar[str] = "import the weights again"

    name: str
    source: str
    preprocessing: Preprocessing
    sha256: str
    tensors: int


def store_folder() -> Path:
    """The folder of imported weights."""
    return home_folder() / "weights"


def import_weights(file: Path, name: VGGName, preprocessing: Preprocessing = "torchvision") -> Entry:
    """Check a file of VGG weights tensor by tensor, and put it into the store.

    It is a safetensors file, or a state dict saved by PyTorch, which is read without running code from it.
    The classifier is left out. Raises :class:`WeightsError`, listing whatever does not fit, and :class:`OutputError`.
    """
    from safetensors.torch import save

    weights = fitting(read_tensors(file), name, file.name)
    target = store_folder() / f"{name}.safetensors"
    with writing_beside(target) as path:
        path.write_bytes(save(weights))
    entry = Entry(
        name=name, source=file.name, preprocessing=preprocessing, sha256=sha256_of(target), tensors=len(weights)
    )
    entry.write(target.with_suffix(".json"))
    return entry


def list_weights() -> list[Entry]:
    """All imported files."""
    return [Entry.read(file) for file in sorted(store_folder().glob("*.json"))]


def load_features(name: VGGName, weights: str) -> tuple[dict[str, Tensor] | None, Preprocessing]:
    """Tensors of a VGG's convolutions by key, and the preprocessing that they expect.

    ``weights``: ``random`` gives None; ``imagenet`` the imported file, which is downloaded if missing;
    anything else is the path of a file that :func:`import_weights` accepts.
    """
    if weights == "random":
        return None, "torchvision"
    if weights != "imagenet":
        file = Path(weights)
        return fitting(read_tensors(file), name, file.name), "torchvision"
    stored = store_folder() / f"{name}.safetensors"
    if not (stored.exists() and stored.with_suffix(".json").exists()):  # written last: the import may not be over
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
        size, _ = _checked(file)
        if file.suffix == ".safetensors":
            loaded: Any = load_file(file)
        else:
            _refuse_others(file, _named_in(file) - _OF_TENSORS, _FIX)
            loaded = torch.load(file, "cpu", weights_only=True)
        for name in ("state_dict", "model"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
                loaded = loaded[name]
        if not isinstance(loaded, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
        ):
            raise WeightsError(f"{file.name} holds no named tensors", fix="save the network's state_dict()")
        for name, tensor in loaded.items():
            _check_plain(file, name, tensor, size)
    return dict(loaded)


class _LeftOut:
    """Stands in for an object that a checkpoint holds besides tensors and plain values."""

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(file: Path, tensors: str, leave_out: Sequence[str]) -> dict[str, Any]:
    """What PyTorch's ``save`` wrote of a dictionary of plain values and tensors; no code from the file runs.

    ``tensors`` is the entry that holds named tensors. Of the Python objects that a file may name, those in
    ``leave_out`` become empty stand-ins, and any other is refused. Raises :class:`WeightsError`.
    """
    fix = "it cannot be read safely; ask for it as it was when training ended"
    with parsing(file, WeightsError, fix=fix):
        size, packed = _checked(file)
        if not packed:
            raise WeightsError(f"'{file}' is not a checkpoint of PyTorch 1.6 or later", fix="give one that is")
        others = _named_in(file) - _OF_TENSORS - {"_codecs.encode"}  # which gives an object left out its bytes
        _refuse_others(
            file,
            others - set(leave_out),
            "do not open it with other software either, unless you know who made it",
        )
        with torch.serialization.safe_globals([(_LeftOut, name) for name in others]):
            loaded = torch.load(file, "cpu", weights_only=True, mmap=True)
        found = loaded.get(tensors) if isinstance(loaded, dict) else None
        if not isinstance(found, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise WeightsError(f"'{file}' has no tensors under '{tensors}'", fix="give a checkpoint that has")
        for name, tensor in found.items():
            _check_plain(file, name, tensor, size)
    return dict(loaded)


def _named_in(file: Path) -> set[str]:
    """The classes and functions that a file of PyTorch's names, of its form today or that before 1.6."""
    from torch._weights_only_unpickler import get_globals_in_pkl  # reads as PyTorch's reader itself does

    with open_file(file) as stream:
        packed = stream.read(4) == b"PK\3\4"  # as PyTorch tells the forms apart
        stream.seek(0)
        if packed:
            return get_globals_in_pkl(BytesIO(torch._C.PyTorchFileReader(stream).get_record("data.pkl")))
        # A magic number, the version, sizes of numbers, the content, and the names of storages.
        return {name for _ in range(5) for name in get_globals_in_pkl(stream)}


def _refuse_others(file: Path, others: set[str], fix: str) -> None:
    if others:
        named = ", ".join(name[:80] for name in sorted(others)[:5])
        raise WeightsError(f"'{file}' would run {named}, which no weights need", fix=fix)


def _checked(file: Path) -> tuple[int, bool]:
    """A file's size, and whether it is an archive, which must not grow when unpacked."""
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        packed = zipfile.is_zipfile(stream)
        if packed:
            with zipfile.ZipFile(stream) as archive:
                _refuse_packed(file, archive, size)
    return size, packed


def _refuse_packed(file: Path, archive: zipfile.ZipFile, size: int) -> None:
    """Raise for an archive that grows when unpacked: PyTorch never compresses, so it did not write that file."""
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise WeightsError(f"{file.name} unpacks to more than its own size, which no weights do", fix=_FIX)


def _check_plain(file: Path, name: str, tensor: Tensor, size: int) -> None:
    """Raise :class:`WeightsError` unless a tensor is an array of finite numbers that the file itself holds."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise WeightsError(
            f"{file.name}: {name[:80]} is not a plain array of numbers", fix="save the network's state_dict()"
        )
    if tensor.numel() * tensor.element_size() > size:
        raise WeightsError(
            f"{file.name}: {name[:80]} claims to be {_sides(tensor.shape)}, more than the file holds", fix=_FIX
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise WeightsError(f"{file.name}: {name[:80]} has numbers that are not finite", fix=_FIX)


def fitting(tensors: Mapping[str, Tensor], name: VGGName, source: str) -> dict[str, Tensor]:
    """The convolutions of ``name``. Raises :class:`WeightsError`, listing the keys that do not fit."""
    expected, wrong = expected_shapes(name), []
    for key, shape in expected.items():
        if key not in tensors:
            wrong.append(f"{key} is missing")
        elif tuple(tensors[key].shape) != shape:
            wrong.append(f"{key} is {_sides(tensors[key].shape)}, not {_sides(shape)}")
    wrong += [f"{key} is not in {name}" for key in tensors if key not in expected and not key.startswith("classifier.")]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(
            f"{source} is not {name}: {'; '.join(wrong[:5])}{more}", fix=f"give a file with weights of {name}"
        )
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
                f"the weights of {name} are not in the store and cannot be downloaded from {address} ({error})",
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
