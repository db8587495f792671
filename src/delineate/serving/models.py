"""Bundles on offer: copied once, by their digest, so that a bundle that is replaced changes nothing under way.

::

    MODELS/
        models.json     the names on offer, and what they stand for
        DIGEST/         a bundle, as it was
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

import msgspec

from delineate.errors import BundleError, MissingFile
from delineate.io.files import writing_beside
from delineate.serving.protocol import Model

if TYPE_CHECKING:
    from delineate.bundle import Bundle

OFFER = "models.json"
_MANIFEST = "bundle.json"
_LISTED = msgspec.json.Decoder(dict[str, Model])


def publish(bundles: Mapping[str, Path], models: Path) -> dict[str, Model]:
    """Check bundles, copy those that are new, and offer them by name. Imports torch, so not for the front door.

    Raises :class:`BundleError` for one that is damaged or being written.
    """
    from delineate.bundle import Bundle, bundle_folder

    offered = {}
    for name, given in bundles.items():
        folder = bundle_folder(given)
        opened = Bundle.load(folder)
        if opened.weights is None:
            raise BundleError(f"'{folder}' has no weights yet", fix="wait until its training has validated once")
        digest = hashlib.sha256((folder / _MANIFEST).read_bytes()).hexdigest()
        place = models / digest
        if not place.exists():
            models.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = models / f".{token_hex(4)}"
            shutil.copytree(folder, beside)
            if hashlib.sha256((beside / _MANIFEST).read_bytes()).hexdigest() != digest:
                shutil.rmtree(beside)
                raise BundleError(f"'{folder}' was replaced while it was copied", fix="try again")
            Bundle.load(beside)
            for file in beside.iterdir():
                file.chmod(0o400)
            beside.replace(place)
        recipe = opened.recipe.name
        try:
            model = Model(
                name=name, sha256=digest, channels=opened.channels, targets=opened.targets.names, about=recipe
            )
            offered[name] = msgspec.convert(msgspec.to_builtins(model), Model)
        except msgspec.ValidationError as error:
            raise BundleError(
                f"'{name[:80]}' cannot be a model's name: {error}", fix="use letters, digits, . _ -"
            ) from error
    with writing_beside(models / OFFER) as beside:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(offered), indent=1))
    return offered


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


def bundle_of(models: Path, sha256: str) -> Bundle:
    """A bundle by its digest. Raises :class:`MissingFile` if it is not there any more."""
    from delineate.bundle import Bundle

    if not (models / sha256).is_dir():
        raise MissingFile(f"the server has no bundle {sha256[:12]} any more", fix="send the scan again")
    return Bundle.load(models / sha256)
