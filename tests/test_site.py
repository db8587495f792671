"""The documentation's site: it builds without a warning, and whoever reads it asks no other host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import delineate
from delineate import errors, testing

ROOT = Path(__file__).parents[1]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """What a page loads by itself, what it names, and which classes it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and values.get("rel") not in ("prev", "next"):
            self.loads.add(values["href"])
        elif tag in LOADED and LOADED[tag] in values:
            self.loads.add(values[LOADED[tag]])
        self.ids.add(values.get("id", ""))
        self.classes |= {*values.get("class", "").split()}


def test_no_page_asks_another_host_for_anything(site) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len([*(ROOT / "docs").glob("*.md")])
    for page in pages:
        found = Loads(page)
        assert any(one.endswith(".css") for one in found.loads)
        elsewhere = {one for one in found.loads if not (page.parent / one.partition("?")[0]).is_file()}
        assert page.name == "404.html" or not elsewhere, page
        assert not any(re.match(r"(\w+:)?//", one) for one in elsewhere), page
        # What the theme's script would fetch for: diagrams, and the figures of a repository.
        assert not found.classes & {"mermaid", "md-source"}, page
    styles = [file.read_text(encoding="utf-8") for file in site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style) for style in styles)


def test_every_public_name_is_in_the_reference(site) -> None:
    ids = Loads(site / "docs/reference.html").ids
    public = {f"delineate.{name}" for name in delineate.__all__ if name not in ("__version__", "errors", "interop")}
    laws = {f"delineate.testing.{name}" for name in testing.__all__}
    raised = {f"delineate.errors.{name}" for name, e in vars(errors).items() if isinstance(e, type)}
    interop = {f"delineate.interop.{name}" for name in ("from_nibabel", "to_simpleitk")}
    assert public | laws | raised | interop <= ids


def test_docstrings_are_shown_as_they_are_meant(site) -> None:
    page = (site / "docs/reference.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert not re.search(r":(class|func|meth|mod|data|attr):", text)
    assert "<blockquote>" not in page, "an example that is no code"
    assert 'href="#delineate.errors.GridMismatch"' in page


def test_links_lead_to_files_wherever_the_checkout_has_them(site) -> None:
    leads = 0
    for page in set(site.rglob("*.html")) - {site / "404.html"}:
        links = re.findall(r'<a href="([^"#]+)', page.read_text(encoding="utf-8"))
        local = {link for link in links if "://" not in link}
        assert not {link for link in local if not (page.parent / link).is_file()}, page
        leads += sum(link.endswith(".txt") for link in local)
    assert leads >= 2, "sources of the examples, shown as text"
