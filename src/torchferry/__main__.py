"""``python -m torchferry``: the command."""

import sys

from torchferry.cli import main

sys.exit(main())
