"""``python -m cipherlm.cli``."""

import sys

from cipherlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
