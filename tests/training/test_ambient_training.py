# SPDX-License-Identifier: MIT
"""A training run beside what belongs to the caller: torch's default dtype, default device and generator."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from janusflow_min.training.trainer import Trainer


def test_torch_s_defaults_change_no_run(settings, tmp_path):
    """Stops: noise, weights or losses in the caller's default dtype or on its default device: other weights from a
    seed; a data loader that draws from the caller's generator."""
    weights, generator = [], torch.get_rng_state()
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        folder = tmp_path / f"{dtype} {device}"
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            Trainer(settings(folder, steps=2, save_every=2)).run()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        weights.append(load_file(folder / "export" / "model.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in weights[0])
    assert torch.equal(torch.get_rng_state(), generator)
