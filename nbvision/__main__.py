"""``python -m nbvision``: the command line."""

import sys

from nbvision.cli import main

sys.exit(main())
