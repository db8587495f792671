"""Every parser, fed thousands of damaged files: an answer or one of our codes, at once, in little memory."""

from __future__ import annotations

import copy
import io
import json
import os
import resource
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from delineate.cli.parsing import data_changes, parse_patterns, parse_targets
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import read_numbered
from delineate.datasets.layouts import open_dataset
from delineate.datasets.series_rules import read_rules
from delineate.datasets.splits import Split, load_split, save_split
from delineate.errors import DelineateError, UnknownLayout
from delineate.evaluation.table import Evaluation
from delineate.io.dicom_series import Series, find_objects, find_series
from delineate.io.exports import export_label
from delineate.io.formats import read_header, read_volume, write_label, write_volume
from delineate.io.nifti_names import targets_named_in
from delineate.io.rtstruct import read_structures, referenced_series, structure_names
from delineate.pretrained.weights import read_tensors
from delineate.recipe import DataSpec, apply_changes, load_recipe, recipe_from
from delineate.training.checkpoint import SafeCheckpointIO, steps_done

MUTATIONS = int(os.environ.get("DELINEATE_MUTATIONS", "2000"))
"""For each parser; set the variable for more."""

SECONDS = 5.0
"""For one input, whatever it is: thousands of times what a sound one takes."""

MOST_MEMORY = 2**29
"""Bytes that a whole fuzz may add to the memory that the process has had at its peak."""


WORDS = (
    b"-1", b"0", b"1e999", b"-1e999", b".inf", b"-.inf", b".nan", b"NaN", b"Infinity", b"null", b"~", b"true",
    b'""', b"99999999999999999999", b"-99999999999999999999", b"9" * 5000, b"0x7fffffffffffffff", b"1e-320",
    b"1_000", b"1:60:60", b"2026-13-45", b"2026-01-02", b"2026-01-02T03:04:05Z",
    b"!!python/object:os.system x", b"!!timestamp 1", b"!!binary x", b"!!set {a, b}", b"!!float x",
    b"!!int x", b"!x y", b"&a [*a]", b"&a", b"*a", b"<<: 1", b"? [a] : b", b"[" * 2000, b"{a: " * 500, b"[]",
    b"{}", b"[null]", b"{}: {}", b'{"a": ' * 2000, b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\r\n",
    b"\n", b"\t", b"=", b"+", b",", b".", b"..", b"../../../etc/passwd", b"/etc/passwd", b"\xe2\x80\xae",
    b"'", b'"', b":", b"#", b"**", b"*a" * 40, b"a" * 3000, b"." * 3000, b"kind", b"\xd9\xa1",
)  # fmt: skip
"""What text is spoilt with; numbers of other kinds and depths, tags, controls, paths."""

NUMBERS = (0, -1, 1, -3, 127, 255, 32767, 2**31 - 1, -(2**31), 2**24)


def damaged(content: bytes, rng: np.random.Generator, *, text: bool) -> bytes:
    """``content`` with one to three places spoilt."""
    made = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(max(len(made), 1)))
        length = int(rng.integers(1, 24))
        match int(rng.integers(7)):
            case 0:
                made[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                del made[at : at + length]
            case 2:
                made[at:at] = made[at : at + length] * int(rng.integers(1, 4))
            case 3 if rng.random() < 0.3:
                del made[at:]
            case 4 if not text:
                order = "<>"[int(rng.integers(2))]
                made[at : at + 4] = struct.pack(f"{order}i", int(rng.choice(NUMBERS)))
            case 5 if not text:
                made[at : at + 8] = struct.pack("<d", float(rng.choice([np.nan, np.inf, -np.inf, 0, 1e300, -1e300])))
            case _ if text or rng.random() < 0.2:
                word = WORDS[int(rng.integers(len(WORDS)))]
                # A whole value now and then, not only something in the middle of one.
                end = next((i for i in range(at, min(at + 40, len(made))) if made[i] in b"\n,:]}= "), at)
                made[at : end if rng.random() < 0.7 else at] = word
            case _:
                made[at : at + 1] = bytes([int(rng.integers(256))])
    return bytes(made)


@dataclass(frozen=True)
class Fuzz:
    """``make`` writes a sound example and says which file is spoilt; ``use`` reads it.

    ``text``: what it is spoilt with. ``spoil`` knows the format where damage must reach what lies below a
    checksum.
    """

    make: Callable[[Path], Path]
    use: Callable[[Path], object]
    text: bool = False
    spoil: Callable[[bytes, np.random.Generator], bytes] | None = None


GRID = Grid.of_spacing((5, 4, 3), (1.0, 1.5, 3.0))
VOXELS = np.arange(60, dtype=np.int16).reshape(1, 5, 4, 3)


def plain_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


def scans(folder: Path, *names: str) -> None:
    for name in names:
        write_volume(folder / "imagesTr" / f"{name}.nii", Volume(VOXELS, GRID))
        write_label(folder / "labelsTr" / f"{name}.nii", LabelVolume((VOXELS[0] > 30).astype(np.uint8), GRID))


def msd(folder: Path) -> Path:
    scans(folder, "a", "b")
    pairs = [{"image": f"./imagesTr/{n}.nii", "label": f"./labelsTr/{n}.nii"} for n in "ab"]
    about = {"name": "x", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": pairs}
    (folder / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return folder / "dataset.json"


def nnunet(folder: Path) -> Path:
    scans(folder, "a_0000", "b_0000")
    for name in "ab":
        (folder / "labelsTr" / f"{name}_0000.nii").rename(folder / "labelsTr" / f"{name}.nii")
    about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "organ": 1, "ignore": 2}, "file_ending": ".nii"}
    (folder / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return folder / "dataset.json"


def sites(folder: Path) -> Path:
    msd(folder)
    (folder / "sites.csv").write_text("subject,site,patient,age\na,Oslo,p1,33\nb,Bergen,p2,44\n", encoding="utf-8")
    return folder / "sites.csv"


def bids(name: str) -> Callable[[Path], Path]:
    """A BIDS data set, of which one file is damaged."""

    def make(folder: Path) -> Path:
        table = "index\tname\n0\tbackground\n1\tlesion\n"
        files = {
            "dataset_description.json": '{"Name": "x", "BIDSVersion": "1.9.0"}',
            "participants.tsv": "participant_id\tsite\tage\nsub-1\tOslo\t33\nsub-2\tn/a\t44\n",
            "sub-1/anat/sub-1_T1w.json": '{"MagneticFieldStrength": 3, "EchoTime": 0.003, "Manufacturer": "x"}',
            "derivatives/m/dseg.tsv": table,
        }
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        (folder / "derivatives/m/sub-1/anat").mkdir(parents=True)
        for file in ("sub-1/anat/sub-1_T1w", "derivatives/m/sub-1/anat/sub-1_dseg"):
            (folder / f"{file}.nii.gz").touch()
        return folder / name

    return make


def masks(folder: Path) -> Path:
    for name in ("s01", "s02"):
        write_volume(folder / name / "ct.nii", Volume(VOXELS, GRID))
        write_label(folder / name / "masks" / "liver.nii", LabelVolume((VOXELS[0] > 30).astype(np.uint8), GRID))
    table = "image_id;age;institute;split\ns01;70;Oslo;train\ns02;;Bergen;test\n"
    (folder / "meta.csv").write_text(table, encoding="utf-8")
    return folder / "meta.csv"


NESTED = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")


def segmentation(folder: Path) -> Path:
    label = LabelVolume((VOXELS[0] > 30).astype(np.uint8) + (VOXELS[0] > 50), GRID)
    return export_label(folder / "a.seg.nrrd", label, NESTED)[0]


def use_sidecar(path: Path) -> None:
    """A damaged one is said in a note, and keeps nobody from using the scans."""
    dataset = open_dataset(path.parents[2])
    assert dataset.subjects[0].scans
    if dataset.notes:
        raise UnknownLayout(dataset.notes[0])


def dicom(folder: Path, name: str = "slice.dcm") -> Path:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    scan = Dataset()
    scan.file_meta = meta
    scan.SOPClassUID, scan.SOPInstanceUID = MRImageStorage, "1.2.3"
    scan.SeriesInstanceUID, scan.StudyInstanceUID, scan.PatientID = "1.2.4", "1.2.5", "p"
    scan.Modality, scan.SeriesDescription, scan.SeriesNumber, scan.SeriesDate = "MR", "t1", 4, "20200101"
    scan.ImagePositionPatient, scan.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]
    scan.PixelSpacing, scan.SliceThickness, scan.NumberOfFrames = [1.5, 1], 3, 1
    scan.SamplesPerPixel, scan.PhotometricInterpretation = 1, "MONOCHROME2"
    scan.Rows, scan.Columns, scan.BitsAllocated, scan.BitsStored, scan.HighBit = 4, 5, 16, 12, 11
    scan.PixelRepresentation, scan.RescaleSlope, scan.RescaleIntercept = 0, 1, 0
    scan.PixelData = VOXELS[0, :, :, 0].T.tobytes()
    path = folder / name
    scan.save_as(path, enforce_file_format=True)
    return path


def structure_set(folder: Path) -> Path:
    """A square on each of two slices; each element has the length that its value has."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    whole, roi, drawn, referenced = Dataset(), Dataset(), Dataset(), Dataset()
    whole.file_meta = meta
    whole.SOPClassUID, whole.SOPInstanceUID, whole.Modality = RTStructureSetStorage, "1.2.3", "RTSTRUCT"
    roi.ROINumber, roi.ROIName, drawn.ReferencedROINumber, drawn.ContourSequence = 1, "organ", 1, []
    for z in (0, 3):
        contour = Dataset()
        contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 4
        contour.ContourData = [-0.5, -0.5, z, -3.5, -0.5, z, -3.5, -3.5, z, -0.5, -3.5, z]
        drawn.ContourSequence.append(contour)
    referenced.SeriesInstanceUID = "1.2.4"
    study, frame = Dataset(), Dataset()
    study.RTReferencedSeriesSequence, frame.RTReferencedStudySequence = [referenced], [study]
    whole.ReferencedFrameOfReferenceSequence = [frame]
    whole.StructureSetROISequence, whole.ROIContourSequence = [roi], [drawn]
    whole.save_as(folder / "structures.dcm", enforce_file_format=True)
    return folder / "structures.dcm"


def use_structures(path: Path) -> object:
    return structure_names(path), referenced_series(path), read_structures(path, GRID)


def dicom_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        slice_ = dicom(folder)
        archive.write(slice_, "study/slice.dcm")
        slice_.unlink()
    return folder / "study.zip"


def raw(content: bytes, rng: np.random.Generator) -> bytes:
    return damaged(content, rng, text=False)


def inside(
    name: str, spoil_member: Callable[[bytes, np.random.Generator], bytes] = raw
) -> Callable[[bytes, np.random.Generator], bytes]:
    """Damage to a zip: half the time to a member whose name ends so, under a sound checksum."""

    def spoil(content: bytes, rng: np.random.Generator) -> bytes:
        if rng.random() < 0.5:
            return damaged(content, rng, text=False)
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(made, "w") as after:
            for entry in before.infolist():
                data = before.read(entry)
                after.writestr(entry, spoil_member(data, rng) if entry.filename.endswith(name) else data)
        return made.getvalue()

    return spoil


def picture(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"slice{suffix}"
        Image.fromarray(VOXELS[0, :, :, 0].astype(np.uint16)).save(path)
        return path

    return make


RECIPE = """\
name: x
data: {targets: {values: {liver: 1, tumour: [2, 3]}}}
preprocessing:
  - {kind: resample, spacing_mm: [1.5, 1.5, 3]}
  - {kind: normalise, method: zscore}
tiles: {kind: patches, shape: [16, 16, 8]}
network: {kind: unet, dimensions: 3, widths: [8, 16]}
loss: {kind: dice, weights: {liver: 1.0}}
training: {batch_size: 2, minutes: 1.5, optimiser: {learning_rate: 1.0e-3}}
"""
VALID = yaml.safe_load(RECIPE)
CHANGES = (
    "training.optimiser.learning_rate=0.01", "name=other", "preprocessing.0.spacing_mm=[1, 1, 2]",
    "network.widths=[8, 16]", "tiles.shape=[8, null, 8]", "data.targets={values: {a: 1}}",
    "loss={kind: focal}", "training.frozen=[encoder.*]", "augmentation.spatial.rotate_degrees=[1, 2, 3]",
    "preprocessing.1={kind: normalise, method: max}",
)  # fmt: skip


def written(name: str, *texts: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text("\n".join(texts), encoding="utf-8")
        return folder / name

    return make


def use_changes(path: Path) -> object:
    return recipe_from(apply_changes(VALID, [plain_text(path)]))


def in_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage to JSON, most often to one value of sound text."""
    if rng.random() < 0.3:
        return damaged(content, rng, text=True)
    return json.dumps(with_another_value(json.loads(content), rng)).encode()


def in_yaml(content: bytes, rng: np.random.Generator) -> bytes:
    """The same for YAML, whose values JSON writes as well."""
    if rng.random() < 0.4:
        return damaged(content, rng, text=True)
    return json.dumps(with_another_value(copy.deepcopy(VALID), rng)).encode()


VALUES = (
    None, True, 0, -1, -3, 1, 2, 3, 7, 255, 65536, 10**9, 2**31, -(2**63), 10**30, 1e-320, 1e300, -1e300,
    float("nan"), float("inf"), float("-inf"), "", "x", "=1+1", "\x1b[2J", "\x00", "\ud800", "a" * 3000,
    "../../x", "/etc/passwd", "auto", "1", "-1", [], {}, [[]], [0], [-1, 2], [1] * 3000, [None], ["x"], {"": ""},
    {"kind": "x"}, {"kind": "unet"}, {"0": "x"}, {"x": [1]}, {"x": {"x": {}}},
)  # fmt: skip
"""What a value is replaced by: another kind, or a number that nobody asks for."""


def with_another_value(tree: object, rng: np.random.Generator) -> object:
    """A tree of plain values in which one, at any depth, is replaced, left out or there under another name."""
    places: list[tuple[dict | list, object]] = []

    def collect(node: object) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            collect(value)

    collect(tree)
    node, key = places[int(rng.integers(len(places)))]
    match int(rng.integers(8)):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(VALUES[int(rng.integers(len(VALUES)))])] = node.pop(key)
        case 2 if isinstance(node[key], list) and node[key]:
            node[key] = node[key] * int(rng.choice([0, 2, 3, 3000]))
        case _:
            node[key] = VALUES[int(rng.integers(len(VALUES)))]
    return tree


ELEMENTS = (
    b"", b"-3", b"0", b"1e999", b"nan", b"-1", b"99999999999", b"x", b"\x1b[2J", b"1\\2\\3\\4\\5\\6\\7", b"\\",
    b"\xff\xff", b"1" * 3000,
)  # fmt: skip
"""What an element of DICOM is given as its value."""


def in_dicom(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage to a slice: most often the value of an element, its length made right again."""
    if rng.random() < 0.3:
        return damaged(content, rng, text=False)
    starts, at = [], 132
    while at < len(content):
        long = content[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        head = 12 if long else 8
        size = int.from_bytes(content[at + (8 if long else 6) : at + head], "little")
        starts.append((at, head, size))
        at += head + size
    at, head, size = starts[int(rng.integers(len(starts)))]
    value = ELEMENTS[int(rng.integers(len(ELEMENTS)))]
    if content[at + 4 : at + 6] in (b"US", b"UL"):
        value = int(rng.choice(NUMBERS)).to_bytes(8, "little", signed=True)[:size]
    value += b" " * (len(value) % 2)
    length = len(value).to_bytes(4 if head == 12 else 2, "little")
    return content[: at + head - len(length)] + length + value + content[at + head + size :]


def one_line(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    return damaged(lines[int(rng.integers(len(lines)))], rng, text=True)


def pth(folder: Path) -> Path:
    torch.save({"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}, folder / "weights.pth")
    return folder / "weights.pth"


def old_pth(folder: Path) -> Path:
    torch.save({"a.weight": torch.ones(2, 3)}, folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


def safetensors(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def state(folder: Path) -> Path:
    saved = {
        "global_step": 3,
        "betas": (0.9, 0.99),
        "optimiser": {0: {"mean": torch.ones(2)}},
        "loops": [{"done": True}],
    }
    SafeCheckpointIO().save_checkpoint(saved, folder / "state.safetensors")
    return folder / "state.safetensors"


def in_header(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage to safetensors: half the time to its header's text, its length made right again."""
    if rng.random() < 0.4:
        return damaged(content, rng, text=False)
    length = int.from_bytes(content[:8], "little")
    header = in_json(content[8 : 8 + length], rng)
    if rng.random() < 0.6 and b"__metadata__" in content:
        about = json.loads(content[8 : 8 + length])
        about["__metadata__"]["state"] = in_json(about["__metadata__"]["state"].encode(), rng).decode(
            "utf-8", "replace"
        )
        header = json.dumps(about).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def use_state(path: Path) -> object:
    return SafeCheckpointIO().load_checkpoint(path), steps_done(path)


def split(folder: Path) -> Path:
    save_split(folder / "split.json", Split((("a", "b"), ("c",)), ("d",), 3))
    return folder / "split.json"


def metrics_csv(folder: Path) -> Path:
    (folder / "metrics.csv").write_text(
        "subject,site,patient,target,dice,hd95_mm,case\n"
        "a,Oslo,p1,liver,0.9,1.5,both\nb,,p2,liver,,inf,reference empty\n",
        encoding="utf-8",
    )
    (folder / "summary.json").write_text(
        '{"unpaired": {"without prediction": ["c"]}, "simulated": false}', encoding="utf-8"
    )
    return folder / "metrics.csv"


def summary_json(folder: Path) -> Path:
    metrics_csv(folder)
    about = {
        "unpaired": {"x": ["c"]},
        "simulated": True,
        "quantity": {"channel": "f", "margin_mm": 0.0, "threshold": 5.0},
    }
    (folder / "summary.json").write_text(json.dumps(about), encoding="utf-8")
    return folder / "summary.json"


def use_evaluation(path: Path) -> object:
    evaluation = Evaluation.read(path.parent)
    return evaluation.targets, evaluation.subjects, evaluation.patients, evaluation.sites


def use_targets(path: Path) -> object:
    targets = parse_targets(plain_text(path))
    return DataSpec.of_changes(data_changes("auto", None, None, plain_text(path))), targets


def use_patterns(path: Path) -> object:
    folder = path.parent / "scans"
    if not folder.exists():
        write_volume(folder / ("a" * 60) / "t1_aaaaaaaaaaaaaaaaaaaaaaaaaaaa.nii", Volume(VOXELS, GRID))
        write_volume(folder / "a" / "b" / "t1.nii.gz", Volume(VOXELS, GRID))
    images, _, labels = plain_text(path).partition(" ")
    return open_dataset(folder, images=parse_patterns([images]), labels=labels or None)


def named_label(targets: Targets) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        label = LabelVolume(VOXELS[0] % 3, GRID)
        return export_label(folder / "label.nii", label, targets)[0]

    return make


def use_names(path: Path) -> object:
    if (found := targets_named_in(path)) is None:
        raise UnknownLayout("the label names nothing")
    return found


RULES = """\
T1: {description: "*t1*", protocol: "*", modality: MR, number: 4}
FLAIR: "*fl?ir*"
PD: {folder: "pd/[a-z]*", number: 0}
label: {modality: SEG}
"""


def use_rules(path: Path) -> object:
    rules = read_rules(path)
    return [rule.fits(series) for rule in (*rules.images.values(), rules.label) if rule for series in some_series()]


@cache
def some_series() -> tuple[Series, ...]:
    with TemporaryDirectory() as folder:
        return tuple(find_series(dicom(Path(folder)).parent))


FUZZES = {
    "YAML": Fuzz(written("recipe.yaml", RECIPE), load_recipe, spoil=in_yaml),
    "--set": Fuzz(written("changes", *CHANGES), use_changes, text=True, spoil=one_line),
    "--targets": Fuzz(written("targets", "liver=1,tumour=2", "whole=1+2+4,core=1+4"), use_targets, spoil=one_line),
    "patterns": Fuzz(
        written(
            "pattern",
            "*/t1_*.nii",
            "**/t1*.nii*",
            "T1=*/*/t1.nii*",
            "*/?1_*.nii */?_*.nii",
            "*/t1_*.nii */{target}_*.nii",
        ),
        use_patterns,
        spoil=one_line,
    ),
    "rules": Fuzz(written("rules.yaml", RULES), use_rules, text=True),
    "dataset.json, msd": Fuzz(msd, lambda path: open_dataset(path.parent), spoil=in_json),
    "dataset.json, nnunet": Fuzz(nnunet, lambda path: open_dataset(path.parent), spoil=in_json),
    "dataset_description.json": Fuzz(
        bids("dataset_description.json"), lambda path: open_dataset(path.parent, layout="bids"), spoil=in_json
    ),
    "participants.tsv": Fuzz(bids("participants.tsv"), lambda path: open_dataset(path.parent), text=True),
    "dseg.tsv": Fuzz(bids("derivatives/m/dseg.tsv"), lambda path: open_dataset(path.parents[2]), text=True),
    "a sidecar": Fuzz(bids("sub-1/anat/sub-1_T1w.json"), use_sidecar, text=True),
    "meta.csv": Fuzz(masks, lambda path: open_dataset(path.parent), text=True),
    ".seg.nrrd": Fuzz(segmentation, lambda path: read_numbered(path, NESTED, "a"), text=True),
    "sites.csv": Fuzz(sites, lambda path: open_dataset(path.parent), text=True),
    "split": Fuzz(split, load_split, spoil=in_json),
    "metrics.csv": Fuzz(metrics_csv, use_evaluation, text=True),
    "summary.json": Fuzz(summary_json, use_evaluation, spoil=in_json),
    ".pth": Fuzz(pth, read_tensors, spoil=inside("data.pkl")),
    ".pth, old": Fuzz(old_pth, read_tensors),
    "safetensors": Fuzz(safetensors, read_tensors, spoil=in_header),
    "state": Fuzz(state, use_state, spoil=in_header),
    "DICOM": Fuzz(dicom, lambda path: read_volume(path.parent), spoil=in_dicom),
    "DICOM header": Fuzz(dicom, lambda path: read_header(path.parent), spoil=in_dicom),
    "RTSTRUCT": Fuzz(structure_set, use_structures, spoil=raw),
    "RTSTRUCT header": Fuzz(structure_set, lambda path: find_objects(path.parent), spoil=raw),
    "zip": Fuzz(dicom_zip, read_volume, spoil=inside(".dcm", in_dicom)),
    "names in a label": Fuzz(named_label(Targets({"liver": (1,), "tumour": (2,)})), use_names),
    "names in a label, overlapping": Fuzz(
        named_label(Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")), use_names, text=True
    ),
    "PNG": Fuzz(picture(".png"), read_volume),
    "TIFF": Fuzz(picture(".tif"), read_volume),
}


def spoilt(fuzz: Fuzz, content: bytes, rng: np.random.Generator) -> bytes:
    return damaged(content, rng, text=fuzz.text) if fuzz.spoil is None else fuzz.spoil(content, rng)


@pytest.mark.parametrize("name", FUZZES)
def test_damaged_input_gets_an_answer_or_a_code(name: str, tmp_path: Path, within) -> None:
    fuzz = FUZZES[name]
    path = fuzz.make(tmp_path)
    content, rng = path.read_bytes(), np.random.default_rng(sum(name.encode()))
    for sound in content.split(b"\n") if fuzz.spoil is one_line else [content]:
        path.write_bytes(sound)
        fuzz.use(path)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lengths: list[int] = []  # of messages: errors themselves would hold every frame in memory
    for number in range(MUTATIONS):
        made = spoilt(fuzz, content, rng)
        path.write_bytes(made)
        try:
            with within(SECONDS):
                fuzz.use(path)
        except DelineateError as error:
            lengths.append(len(str(error)))
        except BaseException as error:
            raise AssertionError(f"mutation {number} of {name} ends in {error!r}: {made[:300]!r}") from error
    assert len(lengths) > MUTATIONS / 20, "the mutations hardly damage anything"
    assert max(lengths) < 5000, "a message that nobody can read"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024
    assert grown < MOST_MEMORY
