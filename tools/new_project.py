"""Write the folder of a new project: one component, a config that trains at once, a test, a README."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.commands.new_project import main

if __name__ == "__main__":
    sys.exit(main())
