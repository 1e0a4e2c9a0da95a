"""``python -m nbvision``: the command line, where its script is not on the path."""

import sys

from nbvision.cli import main

sys.exit(main())
