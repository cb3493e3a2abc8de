# SPDX-License-Identifier: MIT
"""The same numbers, several times faster on a GPU. The path to read is the plain one: `model.py`, `sampling.py`."""
