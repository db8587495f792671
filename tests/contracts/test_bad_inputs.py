"""Everything that arrives broken: a corpus, made on the spot, and the code that each of it is answered with.

Every case is read under the same conditions: at most two seconds and a gigabyte more than before, and
not a byte of its folder changed.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.errors import DelineateError
from delineate.io.formats import read_header, read_label, read_volume, write_label, write_volume
from delineate.io.suffixes import SUFFIXES
from delineate.pretrained.weights import read_tensors

SHAPE = (9, 8, 7)
GRID = Grid.of_spacing(SHAPE, (1.0, 1.5, 3.0))
VOXELS = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
MASK = np.zeros(SHAPE, np.uint8)
MASK[3:6, 3:6, 2:5] = 1


@dataclass(frozen=True)
class Case:
    """``make`` writes something broken into a folder; to ``use`` it is answered with ``code``, or works if None."""

    make: Callable[[Path], Path]
    code: str | None
    use: Callable[[Path], object] = read_volume


@contextmanager
def bounded(seconds: float = 2.0, memory_bytes: int = 2**30) -> Iterator[None]:
    """A hang or an allocation beyond the limits raises inside the block."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    with open("/proc/self/statm", encoding="utf-8") as statistics:
        used = int(statistics.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def scan(suffix: str, change: Callable[[bytes], bytes] = bytes) -> Callable[[Path], Path]:
    """A sound scan in a format, its bytes changed."""

    def make(folder: Path) -> Path:
        path = folder / f"scan{suffix}"
        write_volume(path, Volume(VOXELS[None], GRID))
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def nifti(change: Callable[[nibabel.Nifti1Header], None], data: bytes = VOXELS.tobytes("F"), packed: bool = False):
    """A NIfTI whose header is written byte for byte, without the mends that libraries make."""

    def make(folder: Path) -> Path:
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.int16)
        header.set_data_shape(SHAPE)
        header.set_sform(GRID.affine, 1)
        header.set_qform(GRID.affine, 1)
        header["vox_offset"] = header.single_vox_offset
        change(header)
        content = header.binaryblock + bytes(4) + data
        path = folder / ("scan.nii.gz" if packed else "scan.nii")
        path.write_bytes(gzip.compress(content) if packed else content)
        return path

    return make


def field(name: str, value: object, at: int | tuple[int, ...] | None = None) -> Callable[[nibabel.Nifti1Header], None]:
    def change(header: nibabel.Nifti1Header) -> None:
        if at is None:
            header[name] = value
        else:
            header[name][at] = value

    return change


def dims(*sizes: int) -> Callable[[nibabel.Nifti1Header], None]:
    return field("dim", [len(sizes), *sizes, *[1] * (7 - len(sizes))])


def sform(*rows: object) -> Callable[[nibabel.Nifti1Header], None]:
    def change(header: nibabel.Nifti1Header) -> None:
        header["qform_code"] = 0
        for name, row in zip(("srow_x", "srow_y", "srow_z"), rows, strict=True):
            header[name] = row

    return change


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return change


def floats(value: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        voxels = VOXELS.astype(np.float32)
        voxels[1, 2, 3] = value
        nibabel.save(nibabel.Nifti1Image(voxels, GRID.affine), folder / "scan.nii.gz")
        return folder / "scan.nii.gz"

    return make


def near(*values: float) -> Callable[[Path], Path]:
    """A label of these values."""

    def make(folder: Path) -> Path:
        voxels = np.zeros(SHAPE, np.float64)
        voxels.flat[: len(values)] = values
        nibabel.save(nibabel.Nifti1Image(voxels, GRID.affine), folder / "label.nii.gz")
        return folder / "label.nii.gz"

    return make


def zipped(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "study.zip", "w") as archive:
            archive.writestr(name, b"x")
        return folder / "study.zip"

    return make


def header_only(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / ("scan.nhdr" if text.startswith("NRRD") else "scan.mhd")
        path.write_text(text, encoding="utf-8")
        return path

    return make


MHD = "NDims = 3\nDimSize = 9 8 7\nElementSpacing = 1 1 1\nElementType = MET_SHORT\nElementDataFile = {}\n"
NHDR = "NRRD0004\ntype: short\ndimension: 3\nsizes: 9 8 7\nspace: RAS\nencoding: raw\nendian: little\n" + (
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\ndata file: {}\n"
)

FILES = {
    **{f"cut short{s}": Case(scan(s, lambda b: b[: len(b) // 2]), "E_TRUNCATED") for s in SUFFIXES},
    "more slices claimed than there are, NIfTI": Case(nifti(dims(9, 8, 70)), "E_TRUNCATED"),
    "more slices claimed, packed": Case(nifti(dims(9, 8, 70), packed=True), "E_TRUNCATED"),
    "more slices claimed, MetaImage": Case(scan(".mha", replaced(b"9 8 7", b"9 8 70")), "E_TRUNCATED"),
    "more slices claimed, NRRD": Case(scan(".nrrd", replaced(b"9 8 7", b"9 8 70")), "E_TRUNCATED"),
    **{f"pixdim {v}": Case(nifti(field("pixdim", v, 2)), "E_GEOMETRY") for v in (np.nan, np.inf, 0.0)},
    "sform of NaN": Case(nifti(sform(*[np.full(4, np.nan)] * 3)), "E_GEOMETRY"),
    "sform of zeros": Case(nifti(sform(*[np.zeros(4)] * 3)), "E_GEOMETRY"),
    "qform against sform": Case(nifti(field("srow_x", -1.0, 0)), "E_AMBIGUOUS_ORIENTATION"),
    "shear": Case(nifti(sform([1, 0.4, 0, 0], [0, 1.5, 0, 0], [0, 0, 3, 0])), None),
    "30000 cubed in a few bytes": Case(nifti(dims(30000, 30000, 30000)), "E_TOO_LARGE"),
    "30000 cubed, MetaImage": Case(scan(".mha", replaced(b"9 8 7", b"30000 30000 30000")), "E_TOO_LARGE"),
    "an empty axis": Case(nifti(dims(9, 0, 7)), "E_SHAPE"),
    "five axes": Case(nifti(dims(3, 3, 3, 2, 2)), "E_SHAPE"),
    "axes of one at the end": Case(nifti(dims(9, 8, 7, 1, 1)), None),
    "gzip bomb": Case(nifti(lambda h: None, VOXELS.tobytes("F") + bytes(2**26), packed=True), "E_TRUNCATED"),
    "data file of a .mhd elsewhere": Case(header_only(MHD.format("/etc/passwd")), "E_PATH"),
    "data file of a .mhd above": Case(header_only(MHD.format("../other.raw")), "E_PATH"),
    "data file of a .nhdr elsewhere": Case(header_only(NHDR.format("/etc/passwd")), "E_PATH"),
    "data file of a .nhdr above": Case(header_only(NHDR.format("../other.raw")), "E_PATH"),
    "a voxel of NaN": Case(floats(np.nan), "E_NONFINITE"),
    "an infinite voxel": Case(floats(np.inf), "E_NONFINITE"),
    "label of 254.99999994": Case(near(254.99999994, 1.00000006, 0.99999998), None, read_label),
    "label of 1.4": Case(near(1.4), "E_LABEL_VALUE", read_label),
    "a zip that leaves its folder": Case(zipped("../out.dcm"), "E_PATH"),
    "a folder without scans": Case(lambda folder: folder, "E_MISSING"),
    "a suffix nobody knows": Case(header_only("hello"), "E_FORMAT"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_gets_its_code_at_once_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    case = FILES[name]
    path = case.make(tmp_path)
    check(case.code, lambda: case.use(path), tmp_path)


def check(code: str | None, use: Callable[[], object], folder: Path) -> None:
    before = contents(folder)
    found: DelineateError | None = None
    with bounded():
        try:
            use()
        except DelineateError as error:
            found = error
    assert (found.code if found else None) == code
    assert found is None or len(str(found)) > 20, "a message says what, got, and what to do"
    assert contents(folder) == before


class Scans:
    """A Decathlon data set of three sound subjects, to break one of."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("a", "b", "c"):
            write_volume(self.image(name), Volume(VOXELS[None], GRID))
            write_label(self.label(name), LabelVolume(MASK, GRID))
        self.describe("a", "b", "c")

    def image(self, name: str) -> Path:
        return self.root / "imagesTr" / f"{name}.nii.gz"

    def label(self, name: str) -> Path:
        return self.root / "labelsTr" / f"{name}.nii.gz"

    def describe(self, *names: str) -> None:
        pairs = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
        about = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": pairs}
        (self.root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")


def on_another_grid(scans: Scans) -> None:
    write_label(scans.label("b"), LabelVolume(MASK, Grid.of_spacing(SHAPE, (1.0, 1.5, 3.3))))


def unknown_value(scans: Scans) -> None:
    write_label(scans.label("b"), LabelVolume(MASK * 5, GRID))


SUBJECTS: dict[str, tuple[Callable[[Scans], object], str | None]] = {
    "sound": (lambda scans: None, None),
    "label on another grid": (on_another_grid, "E_GRID_MISMATCH"),
    "label value the targets do not know": (unknown_value, "E_LABEL_VALUE"),
    "missing label": (lambda scans: scans.label("b").unlink(), "E_MISSING"),
    "missing channel": (lambda scans: scans.image("b").unlink(), "E_MISSING"),
    "empty label": (lambda scans: write_label(scans.label("b"), LabelVolume(0 * MASK, GRID)), None),
    "scan cut short": (lambda scans: scans.image("b").write_bytes(scans.image("b").read_bytes()[:90]), "E_TRUNCATED"),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_inspection_finds_what_is_wrong_with_a_subject_and_reads_the_others(name: str, tmp_path: Path) -> None:
    breaking, code = SUBJECTS[name]
    scans = Scans(tmp_path)
    breaking(scans)
    before = contents(tmp_path)
    with bounded():
        inspection = inspect(open_dataset(tmp_path), targets=Targets({"organ": (1,)}))
    assert {(problem.subject, problem.code) for problem in inspection.errors} == ({("b", code)} if code else set())
    assert {"a", "c"} <= {row.subject for row in inspection.rows}
    assert contents(tmp_path) == before


def test_two_subjects_of_one_name_are_refused(tmp_path: Path) -> None:
    scans = Scans(tmp_path)
    scans.describe("a", "a", "b")
    check("E_DUPLICATE", lambda: open_dataset(tmp_path), tmp_path)


class Harmful:
    """What a pickle may do when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path("harmed").touch, ()  # type: ignore[return-value]


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    check("E_WEIGHTS", lambda: read_tensors(tmp_path / "weights.pt"), tmp_path)


MUTATIONS = int(os.environ.get("DELINEATE_MUTATIONS", "1700"))
"""For each of six formats, so that ten thousand headers are tried; set the variable for more."""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ten_thousand_mutated_headers_meet_only_our_errors(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(sum(suffix.encode()))
    path = scan(suffix)(tmp_path)
    content = path.read_bytes()
    plain = gzip.decompress(content) if suffix.endswith(".gz") else content
    end = min(len(plain), 400)
    with bounded(seconds=120 + MUTATIONS / 20):
        for _ in range(MUTATIONS):
            mutated = bytearray(plain)
            at = int(rng.integers(end))
            match rng.integers(4):
                case 0:
                    mutated[at] = rng.integers(256)
                case 1:  # a field of four bytes becomes one of the awkward numbers
                    value = float(rng.choice([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, 1e-30]))
                    mutated[at : at + 4] = struct.pack("<f", value)
                case 2:
                    value = int(rng.choice([0, -1, 1, 2**31 - 1, -(2**31), 32767]))
                    mutated[at : at + 4] = struct.pack("<i", value)
                case 3:
                    del mutated[at : at + int(rng.integers(1, 40))]
            path.write_bytes(gzip.compress(bytes(mutated), 1) if suffix.endswith(".gz") else bytes(mutated))
            for read in (read_header, read_volume):
                with suppress(DelineateError):
                    read(path)
