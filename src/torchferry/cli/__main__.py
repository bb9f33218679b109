"""``python -m torchferry.cli``: the command, too."""

import sys

from torchferry.cli import main

if __name__ == "__main__":
    sys.exit(main())
