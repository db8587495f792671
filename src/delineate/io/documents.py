"""JSON files that hold one typed value each: written whole, read back equal, and refused if they hold anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from delineate.errors import BadFormat, DelineateError
from delineate.io.files import parsing, read_bytes, writing_beside
from delineate.specification import Specification, explained, from_json, to_json


class Document(Specification):
    """A value with its own file; ``format`` is the version of the file's format, 1 if the file does not say.

    Dataclasses in it are checked by the same rules: known fields with the right types, and no others.
    """

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    error: ClassVar[type[DelineateError]] = BadFormat
    """Raised for a file that cannot be read as this value."""
    fix: ClassVar[str] = ""
    """What to do about such a file."""

    format: int = 1

    def write(self, path: Path) -> None:
        """Write the whole file or nothing. Raises :class:`OutputError`."""
        with writing_beside(path) as beside:
            beside.write_text(to_json(self) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The value in a file. Raises ``cls.error`` if it holds none, or has a later format."""
        with parsing(path, cls.error, fix=cls.fix):
            return cls.of_bytes(read_bytes(path), path)

    @classmethod
    def of_bytes(cls, content: bytes, path: Path) -> Self:
        """The value that :func:`to_json` wrote; ``path`` is named in the error if its format is later."""
        known = cls.model_fields["format"].default
        found = from_json(_Form, content).format
        if found != known:
            raise cls.error(f"'{path}' has format {found!r:.40}; this version reads {known}", fix="update delineate")
        try:
            return from_json(cls, content)
        except ValidationError as error:
            raise cls.error(f"'{path}' is not valid:\n{explained(error, cls)}", fix=cls.fix) from error


class _Form(BaseModel):
    """The field that every document has, whatever else it holds."""

    format: Any = 1
