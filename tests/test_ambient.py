# SPDX-License-Identifier: MIT
"""torch's global defaults belong to the caller: nothing here may depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import janusflow_min as jf
from janusflow_min.fast.sampler import GraphSampler
from janusflow_min.flow import sample_time
from janusflow_min.sampling import PlainSampler

DEFAULTS = {
    "float64": (torch.float64, "cpu"),
    "meta": (torch.float32, "meta"),
    "both": (torch.float64, "meta"),
}


@pytest.fixture(params=DEFAULTS)
def defaults(request) -> Iterator[None]:
    """Another default dtype, another default device, or both, from when a test asks for it."""
    dtype, device = DEFAULTS[request.param]

    def switch() -> None:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    yield switch
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def results(folder, sampler: type) -> list:
    """One of each call, the loading included."""
    pipe = jf.load(folder, device="cpu", progress=False)
    pipe.sampler = sampler(pipe.model)
    made = pipe.generate(["a cat", "two red dogs"], 2, num_inference_steps=2, seed=3, progress=False)
    image = folder / "images" / "tall.png"
    options = {"max_new_tokens": 6, "seed": 1}
    answers = [
        pipe.understand(["What is it?", "hi"], [image, None], temperature=t, **options) for t in (0.0, 1.0)
    ]
    noise = torch.zeros(1, 4, 8, 8, dtype=torch.float32, device="cpu")
    other = pipe.generate("a cat", 1, num_inference_steps=1, latents=noise, progress=False)
    generator = torch.Generator("cpu").manual_seed(1)
    encoded = pipe.vae.encode(torch.zeros(1, 3, 64, 64, dtype=torch.float32, device="cpu"), generator)
    tensors = [made.latents, other.latents, encoded, sample_time(5, generator=generator)]
    return [tensors, [i.tobytes() for i in made.images], answers]


@pytest.mark.parametrize("sampler", [PlainSampler, GraphSampler])
def test_torch_s_defaults_change_no_result(parity_dir, defaults, sampler):
    """Stops: noise, times or masks in the caller's default dtype or on its default device: other images from a seed."""
    wanted_tensors, *wanted = results(parity_dir, sampler)
    defaults()
    tensors, *rest = results(parity_dir, sampler)
    for actual, expected in zip(tensors, wanted_tensors, strict=True):
        assert actual.dtype == torch.float32 and actual.device.type == "cpu"
        assert bool(torch.equal(actual, expected))
    assert rest == wanted
