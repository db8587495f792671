"""What the documentation's site needs beyond MkDocs: pages from all over the checkout, and our docstrings.

Pages keep the paths that they have in the checkout, so that one link works there and on the site.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import delineate
from delineate import errors

LINK = re.compile(r"\]\(([^)#:\s]+)[^):\s]*\)")
ROLE = re.compile(r":(?:class|data|func|meth|attr|mod|exc):`~?([\w.]+)`")
CODE, OPTION = re.compile(r"<code>[^<\n]+</code>"), re.compile(r"(?<![\w-])--?[a-z][\w-]*")
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of ``docs``, the README, and every file of the checkout that these link to."""
    root = Path(config.config_file_path).parent
    site = [path.relative_to(root).as_posix() for path in (root / "docs/site").glob("*.[cj]s*")]
    pages = [path.relative_to(root).as_posix() for path in (root / "docs").glob("*.md")]
    found, ahead = dict[str, File](), ["README.md", *pages, *site]
    while ahead:
        name = ahead.pop()
        if name in found or not (root / name).is_file():
            continue  # what is missing is MkDocs' to report
        found[name] = File.generated(config, name, abs_src_path=str(root / name))
        if name.endswith(".md"):
            text = (root / name).read_text(encoding="utf-8")
            ahead += [_normal(PurePosixPath(name).parent / target) for target in LINK.findall(text)]
        elif not name.endswith((".css", ".js", ".png", ".webp")):
            found[name].dest_uri = f"{name}.txt"  # shown by every browser, where a .toml is saved
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *found.values()])


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Lines break between words of code, not at an option's hyphens."""
    return CODE.sub(lambda code: OPTION.sub(r"<span>\g<0></span>", code[0]), html)


class Docstrings(griffe.Extension):
    """Our docstrings as Markdown: roles become links, examples and literal blocks become code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(lambda role: _reference(role[1], obj), obj.docstring.value)
            text = DOCTEST.sub(lambda example: f"```pycon\n{example[0]}\n```", text)
            obj.docstring.value = re.sub(r"^::$\n", "", text, flags=re.MULTILINE).replace("::\n", ":\n")


def _reference(path: str, obj: griffe.Object) -> str:
    """A link where the site documents ``path``, as a public name or beside ``obj``, otherwise its last name."""
    name = path.split(".")[-1]
    if hasattr(errors, name):
        return f"[`{name}`][delineate.errors.{name}]"
    if name in delineate.__all__ and (path == name or path.startswith("delineate.")):
        return f"[`{name}`][delineate.{name}]"
    return f"`{name}`"
