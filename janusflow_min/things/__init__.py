# SPDX-License-Identifier: MIT
"""A world of things: scenes of emoji in two styles at 128 px, their captions and questions, and a judge of images."""
