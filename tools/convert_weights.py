"""Convert the weights of another project into an encoder of ours, and show what became of each tensor."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
