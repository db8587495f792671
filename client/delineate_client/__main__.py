"""``delineate-send``: a scan to a server, its segmentation back."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from .errors import DelineateError
from .serving.client import Client
from .serving.formats import SUFFIXES
from .serving.protocol import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = ArgumentParser("delineate-send", description="Segment a scan on a server. Not for diagnosis.")
    parser.add_argument("scan", help="a .nii.gz, .nii, .mha or .nrrd file, or the folder or zip of a DICOM series")
    parser.add_argument("-o", "--out", required=True, help=f"a name that ends in {', '.join(SUFFIXES)}")
    parser.add_argument("--key", help="the key file from whoever runs the server")
    parser.add_argument("--address", default="", help="connect to this address instead of the one in the key file")
    parser.add_argument("--model", help="the model to use; not needed if the server has only one")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds to wait at most (default: 3600)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    asked = parser.parse_args(arguments)
    try:
        with Client(asked.key, asked.address, timeout_s=asked.timeout) as client:
            result = client.segment(
                asked.scan, asked.out, model=asked.model, overwrite=asked.overwrite, on_progress=_show
            )
    except DelineateError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
    for file in result.files:
        print(file)
    return 0


def _show(progress: Progress) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        place = f" {progress.position}." if progress.position else ""
        print(f"\r{progress.state}{place} {progress.stage} {progress.fraction:4.0%}\033[K", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
