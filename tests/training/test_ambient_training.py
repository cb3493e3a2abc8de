# SPDX-License-Identifier: MIT
"""A training run beside torch's default dtype, which belongs to the caller. (Beside a default device torch's own
DataLoader fails.)"""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from janusflow_min.training.trainer import Trainer


def test_the_default_dtype_changes_no_run(settings, tmp_path):
    """Stops: noise, weights or losses in the caller's default dtype: other weights from a seed."""
    weights = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            Trainer(settings(tmp_path / str(dtype), steps=2, save_every=2)).run()
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(load_file(tmp_path / str(dtype) / "export" / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
