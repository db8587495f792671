"""``delineate networks``: the packaged network configurations and what they cost."""

from __future__ import annotations

from delineate.cli.commands import Commands
from delineate.cli.options import Json

app = Commands(help="Show the packaged networks.")


@app.command("list")
def list_networks(json: Json = False) -> None:
    """List the packaged networks with input, parameters, geometry and the cost of one training step.

    Memory and GFLOP are counted, not measured, for one float32 step with Adam at the input shown.
    """
    from delineate.cli.terminal import print_json, print_table
    from delineate.networks.configurations import described

    rows = described()
    if json:
        print_json(rows)
        return
    cells = [
        [
            row["name"],
            "×".join(map(str, [row["batch"], row["inputs"], *row["sides"]])),
            f"{row['parameters']:,}" + (f" ({row['keras_parameters']:,})" if row["keras"] else ""),
            "×".join(map(str, row["divisor"])),
            str(row["margin"][0]),
            _field(row["receptive_field"]),
            f"{row['gflop']:.0f}",
            f"{row['memory_gb']:.1f}",
        ]
        for row in rows
    ]
    header = ["network", "batch×channels×sides", "parameters (Keras' count)", "divisor", "margin"]
    print_table("", [*header, "receptive field", "GFLOP per step", "GB per step"], cells)


def _field(widths: list[int] | None) -> str:
    return "whole image" if widths is None else f"{widths[0]}…{widths[1]}" if widths[0] < widths[1] else str(widths[0])
