"""Train configs over seeds and print the table: methods, their ablations, the untrained network and true labels.

One JSON line is appended for each finished run; runs that stand in the file already are not done again. Without names
of configs: the two real sets, with the method of the core and with every project and its ablation. `--into` also puts
the rows of a project, next to those of the core, into the README of the project.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastreid_uns.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
