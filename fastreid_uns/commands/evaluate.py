"""Score the newest checkpoint of OUTPUT_DIR, or MODEL.WEIGHTS, on the test sets of a config."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastreid_uns.commands import train


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`; the same as `train --eval-only`."""
    return train.main(["--eval-only", *(sys.argv[1:] if arguments is None else arguments)])
