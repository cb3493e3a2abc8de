# SPDX-License-Identifier: MIT
"""Commands that stand in files of their own; `cli.py` adds them."""
