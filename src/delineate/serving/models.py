"""Bundles on offer: copied once, by their digest, so that a bundle that is replaced changes nothing under way.

::

    MODELS/
        models.json     the names on offer, and what they stand for
        DIGEST/         a bundle, as it was; read-only
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import msgspec

from delineate.errors import BundleError, MissingFile, OutputError, ProtocolError
from delineate.io.files import read_bytes, sync_to_disk, writing_beside
from delineate.serving.protocol import VERSION, Model, Welcome, encode

if TYPE_CHECKING:
    from delineate.bundle import Bundle

OFFER = "models.json"
_MANIFEST = "bundle.json"
_LISTED = msgspec.json.Decoder(dict[str, Model])


def publish(bundles: Mapping[str, Path], models: Path, needed: Collection[str] = ()) -> dict[str, Model]:
    """Check bundles, copy those that are new, and offer them by name. Imports torch, so not for the front door.

    Copies that nobody wants any more are removed: those that were not on offer until now, nor are among the digests
    ``needed``. Raises :class:`BundleError` for a bundle that is damaged or being written, or if there are more than a
    server can name when it welcomes somebody, and :class:`OutputError`.
    """
    _remove_others(models, {*needed, *(model.sha256 for model in offered(models).values())})
    offer = {name: _published(name, folder, models) for name, folder in bundles.items()}
    try:
        encode(Welcome(version=VERSION, server="-" * 100, models=tuple(offer.values())))
    except ProtocolError as error:
        raise BundleError(f"{len(offer)} bundles are too many for one server", fix="start several servers") from error
    with writing_beside(models / OFFER) as beside:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(offer), indent=1))
    return offer


def offered(models: Path) -> dict[str, Model]:
    """The models on offer, by name."""
    try:
        return _LISTED.decode((models / OFFER).read_bytes())
    except FileNotFoundError:
        return {}


def changed(models: Path) -> int:
    """When the offer last changed; 0 if there is none."""
    try:
        return os.stat(models / OFFER).st_mtime_ns
    except FileNotFoundError:
        return 0


def kept(models: Path) -> set[str]:
    """The digests of all bundles that are there, also of those that are on offer no more."""
    return {place.name for place in models.iterdir() if re.fullmatch("[0-9a-f]{64}", place.name)}


def bundle_of(models: Path, sha256: str) -> Bundle:
    """A bundle by its digest. Raises :class:`MissingFile` if it is not there any more."""
    from delineate.bundle import Bundle

    if not (models / sha256).is_dir():
        raise MissingFile(f"the server has no bundle {sha256[:12]} any more", fix="send the scan again")
    return Bundle.load(models / sha256)


def _published(name: str, given: Path, models: Path) -> Model:
    from delineate.bundle import Bundle, bundle_folder

    folder = bundle_folder(given)
    opened = Bundle.load(folder)
    if opened.weights is None:
        raise BundleError(f"'{folder}' has no weights yet", fix="wait until its training has validated once")
    digest = _digest(folder)
    if not (models / digest).exists():
        _copy(folder, models, digest)
    try:
        model = Model(
            name=name, sha256=digest, channels=opened.channels, targets=opened.targets.names, about=opened.recipe.name
        )
        return msgspec.convert(msgspec.to_builtins(model), Model)
    except msgspec.ValidationError as error:
        raise BundleError(f"'{name[:80]}' cannot be offered: {error}", fix="use letters, digits, . _ -") from error


def _copy(folder: Path, models: Path, digest: str) -> None:
    """Copy a bundle, and nothing else that lies in its folder; under its name once the copy is whole and checked."""
    from delineate.bundle import Bundle

    beside = models / f".{token_hex(4)}"
    try:
        beside.mkdir(parents=True, mode=0o700)
        for name in _files():
            if (folder / name).is_file():
                shutil.copyfile(folder / name, beside / name)
        if _digest(beside) != digest:
            raise BundleError(f"'{folder}' was replaced while it was copied", fix="try again")
        Bundle.load(beside)
        for name in _files():
            if (beside / name).exists():
                sync_to_disk(beside / name)
                (beside / name).chmod(0o400)
        beside.replace(models / digest)
    except OSError as error:
        raise OutputError(f"'{models}' cannot be written: {error.strerror}", fix="free some space") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _files() -> tuple[str, ...]:
    from delineate.bundle import CARD, CARD_FACTS, PREPROCESSING, RECIPE, WEIGHTS
    from delineate.calibration import CALIBRATION

    return (_MANIFEST, RECIPE, PREPROCESSING, CALIBRATION, CARD_FACTS, CARD, WEIGHTS)


def _digest(folder: Path) -> str:
    """The manifest's digest, by which a bundle is known; a manifest names the digests of all other files.

    Those of format 1 do not: there, the other files count as well.
    """
    digest = hashlib.sha256(read_bytes(folder / _MANIFEST))
    if msgspec.json.decode(read_bytes(folder / _MANIFEST)).get("format") == 1:
        for name in _files()[1:]:
            if (folder / name).exists():
                digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _remove_others(models: Path, wanted: Collection[str]) -> None:
    """Remove copies that are not wanted, and what a process that was killed has left."""
    for place in models.iterdir() if models.is_dir() else ():
        if place.name != OFFER and place.name not in wanted:
            shutil.rmtree(place, ignore_errors=True)
