import sys

from fastreid_uns.commands import main

sys.exit(main())
