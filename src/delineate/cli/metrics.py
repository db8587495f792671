"""``delineate metrics``: all metrics and sets of metrics by name."""

from __future__ import annotations

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Json

app = Commands(help="Explain the metrics.")


@app.command("list")
def list_metrics(json: Json = False) -> None:
    """List all metrics with their definitions, and the sets that challenges rank by."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.metrics.catalogue import METRICS, SETS

    if json:
        metrics = {m.name: {"title": m.title, "definition": m.definition, "better": m.better} for m in METRICS.values()}
        print_json({"metrics": metrics, "sets": {name: s.metrics for name, s in SETS.items()}})
        return
    print_table("", ["metric", "title", "definition"], [[m.name, m.title, m.definition] for m in METRICS.values()])
    typer.echo()
    print_table("", ["set", "for", "metrics"], [[n, s.about, ", ".join(s.metrics)] for n, s in SETS.items()])
