"""JSON files that hold one typed value each: written whole, read back equal, refused where they are anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from delineate.errors import BadFormat, DelineateError
from delineate.io.files import parsing, read_bytes, writing_beside
from delineate.specification import Specification, from_json, to_json


class Document(Specification):
    """A value with a file of its own; ``format`` numbers the file's form, 1 where the file does not say.

    Dataclasses within it are checked by the same rules: known fields of their types, and no others.
    """

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    error: ClassVar[type[DelineateError]] = BadFormat
    """Raised for a file that cannot be read as this value."""
    fix: ClassVar[str] = ""
    """What to do about such a file."""

    format: int = 1

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing. Raises :class:`OutputError`."""
        with writing_beside(path) as beside:
            beside.write_text(to_json(self) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The value in a file. Raises ``cls.error`` where it holds none, or is of a later form."""
        with parsing(path, cls.error, fix=cls.fix):
            return cls.of_bytes(read_bytes(path), path)

    @classmethod
    def of_bytes(cls, content: bytes, path: Path) -> Self:
        """The value that :func:`to_json` wrote; ``path`` is named where it is of a later form."""
        known = cls.model_fields["format"].default
        found = from_json(_Form, content).format
        if found != known:
            raise cls.error(f"'{path}' has format {found!r:.40}; this version reads {known}", fix="update delineate")
        return from_json(cls, content)


class _Form(BaseModel):
    """What every document says, whatever else it holds."""

    format: Any = 1
