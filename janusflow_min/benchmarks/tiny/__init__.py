# SPDX-License-Identifier: MIT
"""The tiny world: drawn scenes of 128 px, their captions and questions, and a reader that judges pictures."""
