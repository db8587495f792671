"""``delineate card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.options import BundlePlace, Overwrite


def card(
    bundle: BundlePlace,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write a page to this file (default: print the card as Markdown)."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show a bundle's model card: what it is for, on whom it was trained, and how well it was measured to do.

    Edit the card as bundle/card.md; what stands outside the facts is kept.
    """
    from delineate.bundle import Bundle, bundle_folder
    from delineate.core.text import printable, printable_lines
    from delineate.evaluation.card import card_of
    from delineate.io.overwriting import check_outputs
    from delineate.reporting.card import write_card_page

    folder = bundle_folder(bundle)
    opened = Bundle.load(folder)
    if out is None:
        typer.echo(printable_lines(card_of(opened)))
        return
    check_outputs([out], folder.iterdir(), overwrite=overwrite)
    write_card_page(out, opened)
    typer.echo(f"page  {printable(str(out))}")
