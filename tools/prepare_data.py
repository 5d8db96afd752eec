"""Check a data set: layout, counts against the published ones, cameras, unreadable images, equal files, sizes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.commands.check import main

if __name__ == "__main__":
    sys.exit(main())
