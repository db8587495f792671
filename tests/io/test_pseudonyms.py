"""Names that are recognised again but not read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from delineate.errors import OutputError, UnknownKey
from delineate.io.pseudonyms import key_file, key_id, pseudonym


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELINEATE_KEY", str(tmp_path / "deep/key"))
    return tmp_path / "deep/key"


def test_a_name_has_one_pseudonym_by_key_and_kind(key: Path, tmp_path: Path, monkeypatch) -> None:
    first = pseudonym("patient", "4711")
    assert first == pseudonym("patient", "4711")
    assert len({first, pseudonym("patient", "4712"), pseudonym("subject", "4711"), key_id()}) == 4
    assert len(first) * 4 >= 64
    monkeypatch.setenv("DELINEATE_KEY", str(tmp_path / "other"))
    assert pseudonym("patient", "4711") != first


def test_nobody_without_the_key_can_try_all_numbers(key: Path) -> None:
    """A digest that anybody can compute is no pseudonym."""
    found = pseudonym("patient", "4711")
    for text in ("4711", "patient\04711"):
        for kind in ("sha256", "blake2b", "md5"):
            assert found not in hashlib.new(kind, text.encode()).hexdigest()


def test_the_key_is_its_user_s_alone(key: Path) -> None:
    key_id()
    assert key.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key.parent.iterdir()] == ["key"]


def test_processes_that_make_a_key_at_once_agree(key: Path) -> None:
    command = [sys.executable, "-c", "from delineate.io.pseudonyms import key_id; print(key_id())"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert len({child.communicate()[0] for child in children}) == 1
    assert key.exists()


def test_it_lies_in_the_user_s_data(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("DELINEATE_KEY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert key_file() == tmp_path / "delineate/key"


@pytest.mark.parametrize("content", [b"", b"short", b"z" * 64, b"a" * 65, b"\xff\xfe" * 32])
def test_a_damaged_key_is_refused_and_left_alone(key: Path, content: bytes) -> None:
    key.parent.mkdir()
    key.write_bytes(content)
    with pytest.raises(UnknownKey, match="restore it from a backup"):
        key_id()
    assert key.read_bytes() == content


def test_a_key_that_cannot_be_made_says_what_to_set(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("DELINEATE_KEY", os.fspath(tmp_path / "file/key"))
    with pytest.raises(OutputError, match="set DELINEATE_KEY"):
        key_id()
