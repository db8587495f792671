"""What a client sends: packed where that helps, the same bytes each time, and without names."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pytest
import SimpleITK

from delineate import errors
from delineate.serving import Client, stages
from delineate.serving import protocol as p
from delineate.serving.client import is_local
from delineate.serving.sending import Sending

TYPES = [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]


def smooth(dtype: type, shape: tuple[int, ...] = (40, 50, 60)) -> np.ndarray:
    """Voxels as a scanner might make them: neighbours are alike."""
    x, y, z = np.indices(shape)
    return (100 + 40 * np.sin(x / 9) + 30 * np.cos(y / 7) + z).astype(dtype)


def written(path: Path, dtype: type = np.int16) -> Path:
    image = SimpleITK.GetImageFromArray(smooth(dtype))
    SimpleITK.WriteImage(image, str(path))
    return path


def sent(scan: object, codec: str = "blosc2") -> list[tuple[p.Part, bytes]]:
    """The parts of a scan, with the bytes that travel."""
    with Sending(scan) as sending:  # type: ignore[arg-type]
        for _ in sending.packing(codec):  # type: ignore[arg-type]
            pass
        found = []
        for file in sending.files:
            content = file.read(0, file.part.size)
            assert file.sha256 == hashlib.sha256(content).hexdigest()
            found.append((file.part, content))
        return found


def unpacked(content: bytes) -> bytes:
    frame = blosc2.schunk_from_cframe(content)
    return b"".join(frame.decompress_chunk(number) for number in range(frame.nchunks))


@pytest.mark.parametrize("suffix", ["nii", "mha", "nrrd"])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_packed_scan_is_unpacked_as_it_was(tmp_path: Path, suffix: str, dtype: type) -> None:
    path = tmp_path / f"scan.{suffix}"
    image = SimpleITK.GetImageFromArray(smooth(dtype))
    SimpleITK.WriteImage(image, str(path), useCompression=False)
    [(part, content)] = sent(path)
    assert (part.codec, part.format) == ("blosc2", suffix)
    assert len(content) < path.stat().st_size / 2
    assert sent(path) == [(part, content)]  # a later attempt resumes only if it sends the same
    with Sending(path) as sending:
        assert sending.files[0].voxel_bytes() == np.dtype(dtype).itemsize
    assert unpacked(content) == path.read_bytes()


def test_a_large_scan_is_packed_to_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Although its blocks are many."""
    path = tmp_path / "scan.nii"
    nibabel.Nifti1Image(smooth(np.int16, (200, 200, 120)), np.eye(4)).to_filename(path)
    assert len({sent(path)[0][1] for _ in range(4)}) == 1


def test_nifti_2_and_the_other_byte_order_are_known(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    nibabel.Nifti2Image(smooth(np.float32), np.eye(4)).to_filename(path)
    with Sending(path) as sending:
        assert sending.files[0].voxel_bytes() == 4
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nibabel.Nifti1Image(smooth(np.int16), np.eye(4), header).to_filename(path)
    with Sending(path) as sending:
        assert sending.files[0].voxel_bytes() == 2


def test_what_is_compressed_is_not_packed_again(tmp_path: Path) -> None:
    plain = written(tmp_path / "a.nii")
    zipped, misnamed = tmp_path / "b.nii.gz", tmp_path / "c.nii"
    for path in (zipped, misnamed):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (tmp_path / "d.mha", tmp_path / "e.nrrd"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(plain)), str(path), useCompression=True)
        assert b"\nCompressedData = True\n" in path.read_bytes() or b"\nencoding: gzip\n" in path.read_bytes()
    for path in (zipped, misnamed, tmp_path / "d.mha", tmp_path / "e.nrrd"):
        [(part, content)] = sent(path)
        assert (part.codec, content) == ("raw", path.read_bytes())


def test_a_scan_that_does_not_shrink_travels_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "noise.nii"
    path.write_bytes(os.urandom(100_000))
    assert sent(path, "auto")[0] == (p.Part(format="nii", size=100_000), path.read_bytes())
    assert sent(written(tmp_path / "scan.nii"), "auto")[0][0].codec == "blosc2"
    assert sent(tmp_path / "scan.nii", "raw")[0][0].codec == "raw"


def test_the_way_through_a_front_door(door, tmp_path: Path) -> None:
    """Nothing is packed for the same machine unless that is wanted."""
    path = written(tmp_path / "scan.nii")
    for codec, size in (("auto", path.stat().st_size), ("raw", path.stat().st_size), ("blosc2", None)):
        with Client(address=door.address, codec=codec) as client:
            arrived = door.part(client.submit(path))
        assert (arrived.stat().st_size == path.stat().st_size) == (size is not None)
    assert unpacked(arrived.read_bytes()) == path.read_bytes()
    with Client(address=door.address.replace("127.0.0.1", "0.0.0.0")) as client:  # Linux takes this for itself
        assert door.part(client.submit(path)).stat().st_size < path.stat().st_size / 2


def test_which_addresses_are_on_this_machine() -> None:
    here = [
        "ipc:///run/door.sock",
        "tcp://127.0.0.1:7420",
        "tcp://127.1.2.3:1",
        "tcp://localhost:7420",
        "tcp://[::1]:7",
    ]
    there = ["tcp://10.0.0.5:7420", "tcp://scanner7:7420", "tcp://[fe80::1]:7420", "tcp://localhost.example:7420"]
    assert [is_local(address) for address in here + there] == [True] * len(here) + [False] * len(there)


# DICOM


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder of a series as archives export it, with what else they put beside it."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder = tmp_path / "DOE^JANE 1956"
    (folder / "DOE_JANE_S1").mkdir(parents=True)
    for number in range(4):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        slice = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice.PixelData, slice.Rows, slice.Columns = bytes(range(16)) * 2, 4, 4
        slice.InstanceNumber = number + 1
        slice.save_as(folder / "DOE_JANE_S1" / f"IM{number}", enforce_file_format=True)
    assert pydicom.dcmread(folder / "DOE_JANE_S1" / "IM0").Rows == 4
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "readme DOE JANE.txt").write_text("Jane Doe", encoding="utf-8")
    (folder / ".DS_Store").write_bytes(b"\0" * 128 + b"DICM")
    return folder


def test_a_dicom_folder_travels_as_numbers(series: Path, tmp_path: Path) -> None:
    [(part, content)] = sent(series, "auto")
    assert (part.format, part.codec, part.size) == ("dicom.zip", "raw", len(content))
    assert b"DOE" not in content
    assert b"JANE" not in content
    (tmp_path / "sent.zip").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "sent.zip") as packed:
        entries = packed.infolist()
        assert [entry.filename for entry in entries] == [f"{number:06d}.dcm" for number in range(4)]
        assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
        assert {entry.date_time[0] for entry in entries} == {1980}
        files = sorted((series / "DOE_JANE_S1").iterdir())
        assert [packed.read(entry) for entry in entries] == [file.read_bytes() for file in files]
    assert sent(series)[0][1] == content


def test_packing_can_be_stopped_halfway(series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays open, and nothing is left in the folder of temporary files."""
    big = tmp_path / "big.nii"
    big.write_bytes(bytes(20 * 2**20))
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for scan in (series, big):
        with Sending(scan) as sending:
            steps = sending.packing("blosc2")
            next(steps)
            steps.close()  # type: ignore[attr-defined]
    assert list(temporary.iterdir()) == []


def test_what_cannot_be_sent_is_named(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty.nii", tmp_path / "pipe.nii"
    empty.touch()
    os.mkfifo(pipe)
    (tmp_path / "folder").mkdir()
    (tmp_path / "scan.jpg").touch()
    for scan, kind, said in (
        (empty, errors.Truncated, "is empty"),
        (pipe, errors.BadFormat, "pipe or device"),
        (tmp_path / "folder", errors.MissingFile, "no DICOM files"),
        (tmp_path / "scan.jpg", errors.BadFormat, "cannot be sent"),
        (tmp_path / "lost.nii", errors.MissingFile, "does not exist"),
        ({}, errors.MissingFile, "nothing to send"),
    ):
        with pytest.raises(kind, match=said):
            sent(scan)


def test_channels_keep_their_names(series: Path, tmp_path: Path) -> None:
    scan = written(tmp_path / "t1.nii")
    parts = [part for part, _ in sent({"T1": scan, "T2": series}, "raw")]
    assert [(part.channel, part.format) for part in parts] == [("T1", "nii"), ("T2", "dicom.zip")]


def test_a_worker_reads_what_was_packed(tmp_path: Path) -> None:
    path, arrived = written(tmp_path / "scan.nii"), tmp_path / "in0"
    arrived.write_bytes(sent(path)[0][1])
    assert b"".join(stages._chunks(arrived)) == path.read_bytes()
