"""`python -m hotglm`."""

from __future__ import annotations

import sys

from hotglm.cli import main

if __name__ == "__main__":
    sys.exit(main())
