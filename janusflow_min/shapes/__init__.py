# SPDX-License-Identifier: MIT
"""The default model's world: scenes of shapes at 128 px, their captions and questions, and a judge of images."""
