"""`python -m conceptzap` is the same program as `conceptzap`."""

import sys

from conceptzap.cli import main

if __name__ == "__main__":
    sys.exit(main())
