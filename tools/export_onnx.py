"""Write the encoder of a run as ONNX: pixels in 0..1 go in, features of unit length come out, for any batch size."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
