"""Show what a run has learned: rank lists, clusters, a map of features, and curves over epochs, as one web page."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
