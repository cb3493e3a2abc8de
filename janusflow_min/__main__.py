# SPDX-License-Identifier: MIT
"""`python -m janusflow_min` is the command `janusflow-min`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
