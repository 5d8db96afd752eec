"""`python -m fastreid_uns` is the command `fastreid-uns`."""

import sys

from fastreid_uns.commands import main

if __name__ == "__main__":
    sys.exit(main())
