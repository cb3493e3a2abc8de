# SPDX-License-Identifier: MIT
"""Commands with a file of their own; `cli.py` lists them all."""
