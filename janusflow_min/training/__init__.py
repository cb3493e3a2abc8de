# SPDX-License-Identifier: MIT
"""Training: the paper's objective and the examples it is computed on."""
