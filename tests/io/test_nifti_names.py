"""Names and colours in the headers of NIfTI labels, read by nibabel as TotalSegmentator does, and by SimpleITK."""

from __future__ import annotations

import gzip
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st

from delineate.core.grid import Grid
from delineate.core.legend import Legend
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.layouts import open_dataset
from delineate.errors import RecipeError
from delineate.io.exports import export_label
from delineate.io.formats import read_label, write_label
from delineate.io.nifti_names import names_and_colours, targets_named_in

AFFINE = np.array([[-0.75, 0, 0, 90], [0, 0, 1.5, -126], [0, 2.0, 0, -72], [0, 0, 0, 1]])
GRID = Grid((5, 4, 3), AFFINE)
VOXELS = np.arange(60, dtype=np.uint8).reshape(GRID.shape) % 4
TARGETS = Targets({"liver": (1, 3), "a <hot> & cold spot, größer": (2,)})
LEGEND = Legend(colours={"liver": "#DD8265"})


@pytest.fixture(params=[".nii", ".nii.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"label{request.param}"


def told(path: Path) -> dict[int, tuple[str, list[int]]]:
    """Names and colours by label value, from the first extension whatever its code, as TotalSegmentator reads them."""
    content = nib.load(path).header.extensions[0].get_content()
    table = ElementTree.fromstring(content).find("VolumeInformation/LabelTable")
    return {
        int(label.attrib["Key"]): (
            label.text,
            [round(255 * float(label.attrib[part])) for part in ("Red", "Green", "Blue")],
        )
        for label in table
    }


def test_another_library_reads_names_and_colours_and_the_same_voxels(path: Path) -> None:
    export_label(path, LabelVolume(VOXELS, GRID), TARGETS, legend=LEGEND)
    orange, blue = [221, 130, 101], [86, 180, 233]
    assert told(path) == {1: ("liver", orange), 2: ("a <hot> & cold spot, größer", blue), 3: ("liver", orange)}
    image = nib.load(path)
    assert len(image.header.extensions) == 1
    assert np.array_equal(np.asarray(image.dataobj), VOXELS)
    assert np.array_equal(image.affine, AFFINE)
    by_itk = SimpleITK.ReadImage(str(path))
    assert np.array_equal(SimpleITK.GetArrayFromImage(by_itk).transpose(2, 1, 0), VOXELS)
    assert np.allclose(by_itk.GetOrigin(), (-90, 126, -72))
    back = read_label(path)
    assert np.array_equal(back.voxels, VOXELS)
    assert np.array_equal(back.grid.affine, AFFINE)


def test_the_same_label_gives_the_same_bytes(path: Path) -> None:
    first, second = (
        export_label(path, LabelVolume(VOXELS, GRID), TARGETS, legend=LEGEND)[0].read_bytes() for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("kind", ["nifti1", "nifti2"])
def test_geometry_is_copied_from_the_scan_whatever_its_version(kind: str, path: Path) -> None:
    image = {"nifti1": nib.Nifti1Image, "nifti2": nib.Nifti2Image}[kind](VOXELS.astype(np.int16), AFFINE)
    scan = path.with_name(f"scan{''.join(path.suffixes)}")
    nib.save(image, scan)
    export_label(path, LabelVolume(VOXELS, read_label(scan).grid), TARGETS, source=scan)
    assert type(nib.load(path)) is type(nib.load(scan))
    assert np.array_equal(np.asarray(nib.load(path).dataobj), VOXELS)
    assert np.array_equal(nib.load(path).affine, nib.load(scan).affine)
    assert targets_named_in(path) == TARGETS


@pytest.mark.parametrize(
    "targets", [TARGETS, Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping"), Targets({"a b": (7,)})]
)
def test_what_was_written_is_what_is_named(targets: Targets, path: Path) -> None:
    export_label(path, LabelVolume(VOXELS, GRID), targets)
    assert targets_named_in(path) == targets


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=8, unique=True))
def test_any_names_are_valid_xml(names: list[str]) -> None:
    try:
        targets = Targets({name: (value,) for value, name in enumerate(names, start=1)})
    except RecipeError:  # names that no recipe may have
        return
    table = ElementTree.fromstring(names_and_colours(targets, Legend())).find("VolumeInformation/LabelTable")
    assert [label.text or "" for label in table] == [" ".join(name.split()) for name in targets.names]


def of_another_program(path: Path, text: str, code: int = 0) -> Path:
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(code, text.encode()))
    nib.save(image, path)
    return path


TOTAL_SEGMENTATOR = """<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>
<Date><![CDATA[2013-07-14T05:45:09]]></Date>
<VolumeInformation Index="0">   <LabelTable>
<Label Key="1" Red="1.0" Green="0.0" Blue="0.0" Alpha="1"><![CDATA[kidney_left]]></Label>
<Label Key="2" Red="0.0" Green="1.0" Blue="0.0" Alpha="1"><![CDATA[kidney_right]]></Label>
  </LabelTable>  <StudyMetaDataLinkSet>  </StudyMetaDataLinkSet>  <VolumeType><![CDATA[Label]]></VolumeType>
</VolumeInformation></CaretExtension>
              """


@pytest.mark.parametrize("code", [0, 30])  # TotalSegmentator's, and Workbench's
def test_a_data_set_without_names_has_those_of_its_labels(code: int, tmp_path: Path) -> None:
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(VOXELS.astype(np.float32) * 9, AFFINE), tmp_path / f"{name}.nii.gz")
        of_another_program(tmp_path / f"{name}_seg.nii.gz", TOTAL_SEGMENTATOR, code)
    kidneys = Targets({"kidney_left": (1,), "kidney_right": (2,)})
    assert open_dataset(tmp_path).targets == kidneys
    asked = Targets({"all": (1, 2, 3)})
    assert open_dataset(tmp_path, targets=asked).targets == asked


@pytest.mark.parametrize(
    "text",
    [
        "no XML",
        "<CaretExtension><VolumeInformation><LabelTable/></VolumeInformation></CaretExtension>",
        TOTAL_SEGMENTATOR.replace('Key="1"', 'Key="one"'),
        TOTAL_SEGMENTATOR.replace('Key="1"', f'Key="{10**30}"'),
        TOTAL_SEGMENTATOR.replace('Key="1"', 'Key="-1"'),
        TOTAL_SEGMENTATOR.replace(
            "<CaretExtension>", '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><CaretExtension>'
        ).replace("kidney_left", "&c;"),
        TOTAL_SEGMENTATOR.replace("<LabelTable>", "<LabelTable>" + "<Label>" * 20_000),
        TOTAL_SEGMENTATOR + "<!--" + "x" * 2**20 + "-->",
    ],
    ids=["no XML", "nothing", "no number", "huge", "negative", "entities", "deep", "long"],
)
def test_what_cannot_be_understood_names_nothing(text: str, path: Path) -> None:
    of_another_program(path, text)
    assert targets_named_in(path) is None
    assert np.array_equal(read_label(path).voxels, VOXELS)


@pytest.mark.parametrize("size", [0, 8, 17, 2**31, 2**32 - 16])
def test_an_extension_of_an_impossible_size_is_left_alone(size: int, path: Path) -> None:
    write_label(path, LabelVolume(VOXELS, GRID), extension=(0, TOTAL_SEGMENTATOR.encode()))
    assert targets_named_in(path) is not None
    content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    content[352:356] = size.to_bytes(4, "little")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert targets_named_in(path) is None
    assert np.array_equal(read_label(path).voxels, VOXELS)
