"""Search a folder of images by example: `build` turns it into an index, `query` finds what looks like an image."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
