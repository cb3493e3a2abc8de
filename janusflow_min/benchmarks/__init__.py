# SPDX-License-Identifier: MIT
"""Benchmarks: what a model is asked, and how its answers and pictures are judged."""
