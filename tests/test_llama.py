# SPDX-License-Identifier: MIT
"""The language model against transformers' Llama, and its cache, masks and rotary tables against themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from janusflow_min.config import LlamaConfig
from janusflow_min.llama import KVCache, Llama, RMSNorm, apply_rotary, causal_mask, rotary_cos_sin

BASE = dict(
    vocab_size=50, hidden_size=32, intermediate_size=72, num_hidden_layers=3, max_position_embeddings=64
)
VARIANTS = {
    "as many key/value heads": dict(num_attention_heads=4),
    "grouped heads": dict(num_attention_heads=4, num_key_value_heads=2),
    "one key/value head": dict(num_attention_heads=8, num_key_value_heads=1),
    "one wide head, other theta": dict(num_attention_heads=1, rope_theta=500.0),
    "other eps": dict(num_attention_heads=2, rms_norm_eps=0.1),
}
TOLERANCE = dict(atol=2e-6, rtol=1e-5)


def build(**variant) -> Llama:
    """A small model with every weight far from its initial value, norms included."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**BASE, **variant)).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if p.ndim == 1 else 0.0))
    return model


@pytest.fixture(autouse=True)
def the_global_generator_stays():
    """`build` seeds the global generator; other tests don't notice."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


@pytest.fixture
def llama() -> Llama:
    return build(num_attention_heads=4, num_key_value_heads=2)


def new_cache(model: Llama, batch: int, capacity: int) -> KVCache:
    return KVCache(model.config, batch, capacity, torch.device("cpu"), torch.float32)


def left_padded(lengths: list[int], longest: int) -> tuple[Tensor, Tensor]:
    """mask (B, T) bool and positions (B, T) that count from a row's first real token."""
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths])
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


# transformers ---------------------------------------------------------------------------------------------------


def witness(model: Llama):
    """transformers' LlamaForCausalLM with our weights, its plain attention."""
    transformers = pytest.importorskip("transformers")
    names = [*BASE, "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"]
    options = {name: getattr(model.config, name) for name in names}
    config = transformers.LlamaConfig(**options, attn_implementation="eager", tie_word_embeddings=False)
    theirs = transformers.LlamaForCausalLM(config).eval()
    head = {"lm_head.weight": model.lm_head.weight}
    body = {f"model.{k}": v for k, v in model.state_dict().items() if k not in head}
    theirs.load_state_dict(body | head, strict=True)
    return theirs


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_transformers_computes_the_same(variant):
    """Stops: heads grouped in another order, interleaved rotation, theta or eps ignored, gate and up swapped."""
    model = build(**variant)
    theirs = witness(model)
    embeds = torch.randn(2, 11, 32)
    wanted = theirs.model(inputs_embeds=embeds, output_hidden_states=True)
    last, hidden = model(embeds, hidden_layer=2)
    assert_close(last, wanted.last_hidden_state, **TOLERANCE)
    assert_close(hidden, wanted.hidden_states[2], **TOLERANCE)
    assert_close(model.lm_head(last), theirs(inputs_embeds=embeds).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_transformers_pads_on_the_left_the_same(variant):
    """Stops: padding that attention sees, positions that count it."""
    model = build(**variant)
    mask, positions = left_padded([9, 4, 1], 9)
    embeds = torch.randn(3, 9, 32)
    wanted = witness(model).model(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions)
    assert_close(model(embeds, positions, mask)[mask], wanted.last_hidden_state[mask], **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_transformers_decodes_the_same(variant):
    """Stops: positions or masks that fall behind once tokens come one by one from the cache."""
    model = build(**variant)
    mask, _ = left_padded([5, 3], 9)
    mask[:, 5:] = True
    mask[:, :5] = left_padded([5, 3], 5)[0]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = torch.randn(2, 9, 32)
    wanted = witness(model).model(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions)
    cache, parts = new_cache(model, 2, 9), []
    for start, end in [(0, 5), (5, 6), (6, 7), (7, 8), (8, 9)]:
        parts.append(model(embeds[:, start:end], positions[:, start:end], mask[:, :end], cache))
    assert_close(torch.cat(parts, 1)[mask], wanted.last_hidden_state[mask], **TOLERANCE)


def test_position_ids_may_be_anything(llama):
    """Stops: positions taken from the place in the sequence although others are given."""
    positions = torch.tensor([[0, 7, 8, 30, 63]])
    embeds = torch.randn(1, 5, 32)
    wanted = witness(llama).model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    assert_close(llama(embeds, positions), wanted, **TOLERANCE)
    assert not torch.allclose(llama(embeds), wanted, atol=1e-3)


# The cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 7], [1, 4, 2, 5], [11, 1], [3, 1, 1, 7]], ids=str)
@pytest.mark.parametrize("spare", [0, 9])
def test_cached_equals_uncached(llama, chunks, spare):
    """Stops: a chunk that sees its own future or not all of its past, positions that start again, unused room that
    is attended to."""
    embeds = torch.randn(2, sum(chunks), 32)
    cache = new_cache(llama, 2, sum(chunks) + spare)
    assert cache.capacity == sum(chunks) + spare
    parts = [llama(chunk, cache=cache) for chunk in embeds.split(chunks, dim=1)]
    assert cache.length == sum(chunks)
    assert_close(torch.cat(parts, 1), llama(embeds), **TOLERANCE)


@pytest.mark.parametrize("chunks", [[10], [6, 4], [1] * 10, [2, 5, 3]], ids=str)
def test_left_padded_rows_in_the_cache_equal_rows_alone(llama, chunks):
    """Stops: masks sliced from the wrong end when they cover the cache too, rows that influence each other."""
    lengths = [10, 7, 1]
    mask, positions = left_padded(lengths, 10)
    embeds, cache = torch.randn(3, 10, 32), new_cache(llama, 3, 10)
    parts, start = [], 0
    for count in chunks:
        end = start + count
        parts.append(llama(embeds[:, start:end], positions[:, start:end], mask[:, :end], cache))
        start = end
    out = torch.cat(parts, 1)
    for row, count in enumerate(lengths):
        assert_close(out[row, -count:], llama(embeds[row : row + 1, -count:])[0], **TOLERANCE)


def test_setting_length_back_forgets(llama):
    """Stops: the sampler's prompt spoilt by the image tokens of the step before."""
    prompt, first, second = torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    cache = new_cache(llama, 1, 7)
    llama(prompt, cache=cache)
    llama(first, cache=cache)
    cache.length = 4
    assert_close(llama(second, cache=cache), llama(torch.cat([prompt, second], 1))[:, 4:], **TOLERANCE)


def test_a_full_cache_is_an_error(llama):
    """Stops: tokens that are silently dropped, or written over the first ones."""
    cache = new_cache(llama, 1, 4)
    llama(torch.randn(1, 3, 32), cache=cache)
    with pytest.raises(ValueError, match=r"holds 4 tokens; 5 are needed"):
        llama(torch.randn(1, 2, 32), cache=cache)
    llama(torch.randn(1, 1, 32), cache=cache)
    assert cache.length == 4


def test_a_fixed_cache_keeps_the_prompt_alone(llama):
    """Stops: image tokens of one step seen in the next, or room for all layers' keys and values of an image."""
    embeds, growing, fixed = torch.randn(2, 9, 32), new_cache(llama, 2, 9), new_cache(llama, 2, 4)
    for cache in (growing, fixed):
        llama(embeds[:, :4], cache=cache)
    fixed.fixed = True
    wanted = llama(embeds[:, 4:], cache=growing)
    for _ in range(2):
        assert_close(llama(embeds[:, 4:], cache=fixed), wanted, rtol=0, atol=0)
    assert fixed.length == fixed.capacity == 4


def test_selected_rows_go_on_alone(llama):
    """Stops: rows in another order, repeats that share memory, a selection that writes into its source."""
    prompts, new = torch.randn(3, 4, 32), torch.randn(4, 2, 32)
    source = new_cache(llama, 3, 4)
    llama(prompts, cache=source)
    before = source.keys.clone()
    rows = torch.tensor([2, 0, 2, 1])
    cache = source.select(rows, 6)
    assert (cache.capacity, cache.length, cache.keys.shape[1]) == (6, 4, 4)
    wanted = llama(torch.cat([prompts[rows], new], 1))[:, 4:]
    assert_close(llama(new, cache=cache), wanted, **TOLERANCE)
    assert torch.equal(source.keys, before) and source.length == 4


# Masks ----------------------------------------------------------------------------------------------------------


def test_the_future_is_not_seen(llama):
    """Stops: bidirectional attention, over image tokens above all."""
    embeds = torch.randn(1, 8, 32)
    changed = embeds.clone()
    changed[:, 5:] += 1.0
    before, after = llama(embeds), llama(changed)
    assert_close(before[:, :5], after[:, :5], **TOLERANCE)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


@pytest.mark.parametrize("content", [0.0, 1.0, 1e4])
def test_padding_has_no_influence_and_makes_no_nan(llama, content):
    """Stops: rows of padding that see nothing, whose NaN reaches real tokens through masked values."""
    mask, positions = left_padded([8, 3], 8)
    embeds = torch.randn(2, 8, 32)
    wanted = llama(embeds[1:, -3:])[0]
    embeds[~mask] = content
    out = llama(embeds, positions, mask)
    assert torch.isfinite(out).all()
    assert_close(out[1, -3:], wanted, **TOLERANCE)


def test_holes_in_the_mask_are_not_seen(llama):
    """Stops: guidance's unconditional rows, BOS and then hidden prompt, that see the prompt after all."""
    embeds = torch.randn(1, 9, 32)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[:, 1:5] = False
    keep = torch.tensor([0, 5, 6, 7, 8])
    out = llama(embeds, attention_mask=mask)[:, keep]
    assert_close(out, llama(embeds[:, keep], position_ids=keep[None]), **TOLERANCE)


def test_visible_is_the_plain_rule():
    """Stops: an off-by-one between cached and new keys, a mask where none is needed (slow) or none where one is."""
    for length, past in ((4, 0), (1, 3), (2, 3)):
        given = torch.tensor([[True] * (past + length), [False, False] + [True] * (past + length - 2)])
        mask = causal_mask(length, past, given, torch.device("cpu"))
        for b in range(2):
            for q in range(length):
                for k in range(past + length):
                    rule = (k <= past + q and bool(given[b, k])) or k == past + q
                    assert bool(mask[b, 0, q, k]) == rule
    assert (
        causal_mask(4, 0, None, torch.device("cpu")) is None
        and causal_mask(1, 3, None, torch.device("cpu")) is None
    )
    assert causal_mask(2, 3, None, torch.device("cpu"))[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_hidden_layer_is_the_state_behind_a_block(llama, layer):
    """Stops: alignment taught on the wrong block, or on states after the final norm."""
    embeds = torch.randn(1, 5, 32)
    last, hidden = llama(embeds, hidden_layer=layer)
    assert torch.equal(last, llama(embeds))
    cut = build(num_attention_heads=4, num_key_value_heads=2)
    cut.layers = cut.layers[:layer]
    assert_close(cut.norm(hidden), cut(embeds), **TOLERANCE)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_hidden_layer_outside_the_blocks_is_an_error(llama, layer):
    """Stops: None in place of states, which fails far away."""
    with pytest.raises(ValueError, match="hidden_layer"):
        llama(torch.randn(1, 2, 32), hidden_layer=layer)


# Norm and rotary tables -----------------------------------------------------------------------------------------


def test_rms_norm_by_the_formula():
    """Stops: a mean taken off, eps outside the root, bf16 statistics, the weight multiplied before the cast."""
    norm = RMSNorm(24, 1e-2)
    norm.weight.copy_(torch.randn(24))
    x = torch.randn(5, 24) * 0.1
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight.double()
    assert_close(norm(x).double(), wanted, atol=1e-6, rtol=1e-6)
    x, norm = x.bfloat16() * 100, norm.bfloat16()
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-2)
    assert torch.equal(norm(x), y.bfloat16() * norm.weight)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotary_tables_by_the_formula(theta):
    """Stops: frequencies of the wrong base or step, tables for pairs (2i, 2i + 1)."""
    positions = torch.tensor([[0, 1, 63], [5, 9, 2]])
    cos, sin = rotary_cos_sin(positions, 8, theta, torch.float32)
    assert cos.shape == sin.shape == (2, 1, 3, 8)
    i = torch.arange(8, dtype=torch.float64) % 4
    angles = positions[:, None, :, None].double() * theta ** (-2 * i / 8)
    assert_close(cos.double(), angles.cos(), atol=1e-5, rtol=0)
    assert_close(sin.double(), angles.sin(), atol=1e-5, rtol=0)


def test_rotation_turns_pairs_half_a_head_apart():
    """Stops: the other pairing, and a turn in the other direction."""
    x = torch.randn(1, 2, 3, 8)
    positions = torch.tensor([[4, 5, 17]])
    cos, sin = rotary_cos_sin(positions, 8, 100.0, torch.float32)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos[..., :4], sin[..., :4])
    assert_close(apply_rotary(x, cos, sin), torch.cat([turned.real, turned.imag], -1), atol=1e-6, rtol=1e-6)


def test_rotary_tables_are_float32_until_the_end():
    """Stops: positions or frequencies in bfloat16, which cannot count beyond 256; and rounding where only the
    published code's numbers are wanted."""
    positions = torch.arange(1000, 1010)[None]
    exact = rotary_cos_sin(positions, 16, 10000.0, torch.float32)
    cast = rotary_cos_sin(positions, 16, 10000.0, torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact, cast, strict=True))

    frequencies = (1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)).bfloat16().float()
    angles = positions[..., None].float() * frequencies
    wanted = torch.cat([angles, angles], -1)[:, None].cos().bfloat16()
    rounded = rotary_cos_sin(positions, 16, 10000.0, torch.bfloat16, upstream_rounding=True)
    assert torch.equal(rounded[0], wanted) and not torch.equal(rounded[0], cast[0])
    same = rotary_cos_sin(positions, 16, 10000.0, torch.float32, upstream_rounding=True)
    assert all(torch.equal(a, b) for a, b in zip(exact, same, strict=True))


def test_nothing_but_weights_is_stored(llama):
    """Stops: rotary buffers, which a meta device would lose and `.to(bfloat16)` would round."""
    assert list(llama.buffers()) == []


# torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_compiles_whole_and_once_for_all_lengths(llama, masked):
    """Stops: training that breaks the graph where a length is a symbol, and compiles until the compiler gives up."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, block = CompileCounter(), llama.layers[0]
    compiled = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=True)
    for rows, length in ((2, 7), (3, 9), (5, 20)):
        x = torch.randn(rows, length, llama.config.hidden_size)
        rope = rotary_cos_sin(torch.arange(length)[None], llama.config.head_dim, 1e4, torch.float32)
        seen = torch.ones(rows, length, dtype=torch.bool) if masked else None
        mask = causal_mask(length, 0, seen, x.device)
        assert_close(compiled(x, rope, mask, None), block(x, rope, mask, None), **TOLERANCE)
    assert counter.frame_count == 1
    torch._dynamo.reset()
