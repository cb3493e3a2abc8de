# SPDX-License-Identifier: MIT
"""The fast sampler: the plain one's numbers with static shapes, fused weights and kernels, inside CUDA graphs.

`Pipeline.sampler` uses it on NVIDIA GPUs in bfloat16 (or float16) where Triton is installed; `load(fast=False)` turns
it off. It has no mathematics of its own: UViT, SigLIP and the aligners are the plain modules, the LLM's blocks are
`ops.py` (or its kernels) over the same weights, and tests hold both samplers to the same recordings.

- Generation: a prompt's keys and values are computed once; attention reads them first and then the image's own, so
  there is no mask, nothing is copied, and the unconditional rows carry BOS alone. One evaluation is one graph.
- Answers: rows are aligned at their first token, so again there is no mask. The prompt is one graph, a token
  another; the graph picks the best token itself, and the host checks for the end every `EOS_CHECK_EVERY` tokens.

Graphs belong to a shape: number of images or rows, lengths rounded up. Those used lately are kept. What is only needed
during a call, keys and values above all, lies in one buffer for all shapes: as large as the largest of those kept.

Legend: B images, R rows of the LLM's batch, T tokens, N image tokens, D hidden size, C slots of a row's cache,
H heads, G key/value heads, d head size.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..llama import Block, rotary_cos_sin
from ..model import JanusFlow
from ..processor import Batch
from ..sampling import RowPlan, RowsVelocity, SampleFn, check_logits, cut_at_eos
from . import ops as plain_ops
from .quantized import Quantized, Weight

PROMPT_STEP, TEXT_STEP, CACHE_STEP = 64, 64, 256  # lengths are rounded up to multiples of these
KEPT_BYTES = (
    2**28
)  # of buffers and graphs that belong to one shape each; the oldest beyond that are given up,
LATELY = 64  # and those that nobody needed for so many requests
GRAPH_BYTES = 2**22  # what a graph is taken for, besides its buffers
EOS_CHECK_EVERY = 16  # tokens between two checks whether every row has ended


@dataclass(frozen=True)
class Layer:
    """One block's weights; qkv has (H + 2G)·d rows, gate_up twice the MLP's width."""

    norm1: Tensor
    qkv: Weight
    out: Weight
    norm2: Tensor
    gate_up: Weight
    down: Weight


@torch.inference_mode(False)  # parameters that may be trained later
@torch.no_grad()
def fuse(model: JanusFlow) -> list[Layer]:
    """Put query, key and value weights, and gate and up, side by side in memory.

    The module's own parameters become views of the result: nothing is held twice, names and values stay.
    """

    def join(*linears: nn.Linear) -> Weight:
        joined = []
        for name, _ in linears[0].named_parameters():  # weight; values and scale where it is quantized
            whole = torch.cat([getattr(linear, name) for linear in linears])
            parts = whole.split([linear.weight.shape[0] for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                setattr(linear, name, nn.Parameter(part, requires_grad=False))
            joined.append(whole)
        return joined[0] if len(joined) == 1 else Quantized(*joined)

    layers = []
    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                block.input_layernorm.weight,
                join(attention.q_proj, attention.k_proj, attention.v_proj),
                attention.o_proj.weight,
                block.post_attention_layernorm.weight,
                join(mlp.gate_proj, mlp.up_proj),
                mlp.down_proj.weight,
            )
        )
    return layers


def _blocks(model: JanusFlow) -> list[Block]:
    return cast(list[Block], list(model.llm.layers))


@torch.inference_mode(False)
@torch.no_grad()
def to_channels_last(*modules: nn.Module) -> None:
    """Lay convolutions out with the channels last in memory, which halves UViT's time; names and values stay."""
    for module in modules:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class GraphSampler:
    """The `Sampler` for a GPU; `build_sampler` makes one."""

    kept: dict[tuple, tuple[Any, int]]  # kind and shape -> graph, the last request for it
    shared: Tensor  # what lives no longer than a call of the owner's
    owner: Any

    def __init__(
        self, model: JanusFlow, ops: ModuleType = plain_ops, graphs: bool = False, compile: bool = False
    ):
        self.model, self.ops, self.graphs = model, ops, graphs
        self.layers = fuse(model)
        self.fused = self._places()
        if graphs and model.parts != "understanding":
            to_channels_last(model.uvit_encoder, model.uvit_decoder)
        self.lock = threading.RLock()  # a thread at a time: they would share buffers
        # One for warm-ups and captures: cuBLAS keeps 32 MiB for every stream that it has seen.
        self.stream: Any = torch.cuda.Stream(model.device) if graphs else None
        self.requests = 0
        self.forget()
        config = model.config.llm
        self.heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        self.cache_shape = (config.num_key_value_heads, config.head_dim)
        # Not for each number of images: the second one makes it a symbol. SigLIP's blocks are alike: one is compiled.
        wrap: Callable[[Any], Any] = torch.compile if compile else (lambda function: function)
        self.encode_latents = wrap(model.encode_latents)
        self.decode_velocity = wrap(model.decode_velocity)
        if compile and model.parts != "generation":
            for block in model.siglip.blocks:
                block.compile()
        self.upstream_rounding = model.llm.upstream_rounding
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        table = rotary_cos_sin(
            positions, config.head_dim, config.rope_theta, model.dtype, self.upstream_rounding
        )
        cos, sin = (t[0, 0, :, : config.head_dim // 2].contiguous() for t in table)
        self.rotary = cos, sin  # (positions, d/2)

    @property
    def is_current(self) -> bool:
        """Whether the model still has the weights that were fused: not after `.to(...)` or a replaced parameter."""
        return self.fused == self._places() and self.upstream_rounding == self.model.llm.upstream_rounding

    def _places(self) -> list[int]:
        """Where in memory the first and the last of the fused weights lie."""
        first, last = _blocks(self.model)[0].self_attn.q_proj, _blocks(self.model)[-1].mlp.gate_proj
        return [next(linear.parameters()).data_ptr() for linear in (first, last)]

    # The Sampler's methods -----------------------------------------------------------------------

    def prefill(self, plan: RowPlan) -> RowsVelocity:
        limit = self.model.config.llm.max_position_embeddings
        length = min(limit, _round_up(max(map(len, plan.prompts)), PROMPT_STEP))
        prompts = len(plan.prompts) if len(plan.prompts) <= 2 else max(plan.images + 1, len(plan.prompts))
        with self.alone():
            graph = self.graphs_for(DenoiseGraph, len(plan.source), plan.images, prompts, length)
            graph.prefill(plan)

        def velocity(z: Tensor, timestep: Tensor) -> Tensor:
            with self.alone():
                if graph.plan is not plan or self.owner is not graph:  # others have used the buffer since
                    graph.prefill(plan)
                graph.latents.copy_(z)
                graph.timestep.copy_(timestep)
                graph.step()
                return graph.v.to(z.dtype, copy=True)  # the next step writes into the buffer

        return velocity

    def generate_tokens(
        self, batch: Batch, max_new_tokens: int, eos_id: int, sample_fn: SampleFn | None = None
    ) -> list[list[int]]:
        lengths = batch.attention_mask.sum(1)
        rows, longest = len(lengths), int(lengths.max())
        limit = self.model.config.llm.max_position_embeddings
        slots = min(limit, _round_up(longest + max_new_tokens, CACHE_STEP))
        with self.alone():
            graph = self.graphs_for(DecodeGraph, rows, min(slots, _round_up(longest, TEXT_STEP)), slots)
            graph.prefill(batch, lengths, eos_id)
            for n in range(max_new_tokens):
                if sample_fn is not None:
                    if n:
                        graph.forward()
                    graph.append_tokens(sample_fn(graph.logits))
                elif n:
                    graph.step()
                else:
                    graph.append_best()
                check = sample_fn is not None or n % EOS_CHECK_EVERY == EOS_CHECK_EVERY - 1
                if check and bool(graph.ended.all()):
                    break
            if sample_fn is None:
                check_logits(graph.health)
            return cut_at_eos(graph.tokens[:, : n + 1].tolist(), eos_id)

    # What the graphs are built from -----------------------------------------------------------------------

    def graphs_for(self, kind: type, *key: int) -> Any:
        """The kept buffers and graphs of a kind and shape, made anew where there are none."""
        self.requests += 1
        name = kind, *key
        graph = self.kept.pop(name)[0] if name in self.kept else kind(weakref.proxy(self), *key)
        self.kept[name] = graph, self.requests
        for old in list(self.kept)[:-2]:  # an answer needs two
            unused = self.requests - self.kept[old][1]
            if unused > LATELY or sum(self.bytes_of(g)[0] for g, _ in self.kept.values()) > KEPT_BYTES:
                del self.kept[old]
        if self.shared.nbytes > 2 * max(self.bytes_of(g)[1] for g, _ in self.kept.values()):
            self.forget()
        return graph

    def bytes_of(self, graph: Any) -> tuple[int, int]:
        """A shape's own, and those it needs of the shared buffer."""
        own, shared = GRAPH_BYTES, 0
        for tensor in vars(graph).values():
            if isinstance(tensor, Tensor):
                if tensor.untyped_storage().data_ptr() == self.shared.untyped_storage().data_ptr():
                    shared += tensor.nbytes
                else:
                    own += tensor.nbytes
        return own, shared

    def share(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Parts of the buffer that all shapes share: theirs until another one's `prefill` makes it the `owner`."""
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) > self.shared.numel():
            self.forget()  # graphs read and write at the old addresses
            self.shared = self.buffer(sum(sizes))
        parts = self.shared[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def forget(self) -> None:
        """Give up all shapes. A call that still runs one holds on to what it needs."""
        self.kept, self.shared, self.owner = {}, self.buffer(0), None
        # The old one's memory is freed with the last of its graphs, and then no new graph may join it.
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None

    def capture(self, function: Callable[[], None], *state: Tensor) -> Callable[[], None]:
        """`function`, which reads and writes fixed tensors only, as a graph that is captured at its first call.

        state: tensors that a call advances; the warm-up before the capture must not.
        """
        # Neither a shape's graphs nor the sampler hold on to themselves: their memory goes with them, at once.
        sampler, method = weakref.proxy(self), weakref.WeakMethod(function)
        graph: torch.cuda.CUDAGraph | None = None

        def call() -> None:
            nonlocal graph
            run = method()
            assert run is not None
            if not sampler.graphs:
                return run()
            if graph is None:
                before = [tensor.clone() for tensor in state]
                sampler.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(sampler.stream):
                    run()
                torch.cuda.current_stream().wait_stream(sampler.stream)
                for tensor, old in zip(state, before, strict=True):
                    tensor.copy_(old)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=sampler.pool, stream=sampler.stream):
                    run()
            graph.replay()

        return call

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread is inside; the model's card is the current one, to which streams and kernels belong."""
        with self.lock, torch.cuda.device(self.model.device) if self.graphs else nullcontext():
            yield

    def upload(self, tensor: Tensor) -> Tensor:
        """To the model's device; a GPU need not be done with what came before."""
        if not self.graphs:
            return tensor.to(self.model.device)
        return tensor.pin_memory().to(self.model.device, non_blocking=True)

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, device=self.model.device, dtype=dtype or self.model.dtype)

    def blocks(self, x: Tensor, attention: Callable[[int, Tensor], Tensor]) -> Tensor:
        """All blocks over x (R, T, D) -> (R·T, D), before the final norm.

        attention(i, qkv): layer i's, from (R, T, (H + 2G)·d) to (R·T, H·d).
        """
        ops, (rows, tokens, _) = self.ops, x.shape
        x = x.reshape(rows * tokens, -1).clone()  # the blocks add to it in place
        for i, layer in enumerate(self.layers):
            qkv = ops.norm_linear(x, layer.norm1, self.eps, layer.qkv).view(rows, tokens, -1)
            x = ops.linear_add(attention(i, qkv), layer.out, x)
            x = ops.linear_add(ops.norm_mlp(x, layer.norm2, self.eps, layer.gate_up), layer.down, x)
        return x

    def cached_attention(
        self,
        cache: Tensor,
        position: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Callable[[int, Tensor], Tensor]:
        """An attention that puts keys and values into cache (2, layers, R, C, G, d) from each row's position on.

        attend(q, keys, values); without it the tokens are the rows' first and see each other.
        """
        ops, attend = self.ops, attend or self.ops.attend

        def attention(i: int, qkv: Tensor) -> Tensor:
            keys, values = cache[:, i]
            q = ops.rope_store(qkv, *self.rotary, position, keys, values, self.heads)
            return attend(q, keys, values)

        return attention


class DenoiseGraph:
    """Buffers and graphs for R rows of image tokens, which continue up to P prompts of up to T tokens."""

    def __init__(self, sampler: GraphSampler, rows: int, images: int, prompts: int, tokens: int):
        self.sampler, model, whole = sampler, sampler.model, torch.int32
        self.rows, self.copies = rows, rows // images
        self.plan: RowPlan | None = None  # whose prompts are in the cache
        self.ids = sampler.buffer(prompts, tokens, dtype=torch.long)
        (self.cache,) = sampler.share((2, len(sampler.layers), prompts, tokens, *sampler.cache_shape))
        self.zero = sampler.buffer(prompts, dtype=whole)
        self.source, self.length, self.position = (sampler.buffer(rows, dtype=whole) for _ in range(3))
        self.latents = sampler.buffer(images, *model.latent_shape)
        if sampler.graphs:
            self.latents = self.latents.contiguous(memory_format=torch.channels_last)
        self.timestep = sampler.buffer(images, dtype=torch.float32)
        self.v = sampler.buffer(rows, *model.latent_shape)
        self.read_prompts, self.step = sampler.capture(self._read_prompts), sampler.capture(self._step)

    def prefill(self, plan: RowPlan) -> None:
        """Keys and values of the plan's prompts."""
        self.sampler.owner = self
        ids = torch.zeros(self.ids.shape, dtype=torch.long, device="cpu")
        for i, prompt in enumerate(plan.prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt, device="cpu")
        self.ids.copy_(ids)
        length = [len(plan.prompts[i]) for i in plan.source]
        for buffer, values in (
            (self.source, plan.source),
            (self.length, length),
            (self.position, plan.position),
        ):
            buffer.copy_(torch.tensor(values, dtype=torch.int32, device="cpu"))
        self.read_prompts()
        self.plan = plan

    def _read_prompts(self) -> None:
        x = self.sampler.model.llm.embed_tokens(self.ids)
        self.sampler.blocks(x, self.sampler.cached_attention(self.cache, self.zero))

    def _step(self) -> None:
        sampler, model = self.sampler, self.sampler.model
        x, t_emb, skip = sampler.encode_latents(self.latents, self.timestep)
        tokens = torch.cat([t_emb[:, None], x], dim=1).repeat(self.copies, 1, 1)  # (R, 1 + N, D)

        def attention(i: int, qkv: Tensor) -> Tensor:
            prefix = (*self.cache[:, i], self.source, self.length)
            return sampler.ops.attend_image(qkv, *sampler.rotary, self.position, sampler.heads, prefix)

        last = sampler.blocks(tokens, attention)
        last = last.view(*tokens.shape)[:, 1:].flatten(0, 1)
        hidden = sampler.ops.rms_norm(last, model.llm.norm.weight, sampler.eps)
        hidden = hidden.view(self.rows, -1, hidden.shape[-1])  # (R, N, D)
        skip = torch.cat([skip] * self.copies)  # keeps the order in memory
        self.v.copy_(sampler.decode_velocity(hidden, skip, torch.cat([t_emb] * self.copies)))


class VisionGraph:
    """Buffers and graph for the embeddings of `count` images."""

    def __init__(self, sampler: GraphSampler, count: int):
        config = sampler.model.config
        size = config.siglip.image_size
        self.sampler, self.pixels = sampler, sampler.buffer(count, 3, size, size)
        self.features = sampler.buffer(count * (1 + config.siglip.num_patches), config.llm.hidden_size)
        self.encode_images = sampler.capture(self._encode_images)

    def _encode_images(self) -> None:
        self.features.copy_(self.sampler.model.embed_images(self.pixels).flatten(0, 1))


class DecodeGraph:
    """Buffers and graphs for R conversations of up to T tokens and, with their answers, C."""

    def __init__(self, sampler: GraphSampler, rows: int, tokens: int, slots: int):
        self.sampler, config = sampler, sampler.model.config.llm
        self.cache, self.embeds = sampler.share(
            (2, len(sampler.layers), rows, slots, *sampler.cache_shape), (rows, tokens, config.hidden_size)
        )
        self.length, self.zero = (sampler.buffer(rows, dtype=torch.int32) for _ in range(2))
        self.logits = sampler.buffer(rows, config.vocab_size, dtype=torch.float32)
        self.health = sampler.buffer(rows, dtype=torch.float32)  # 0 until a best logit is NaN or infinite
        self.ids, self.count = (sampler.buffer(n, dtype=torch.long) for n in (rows, 1))
        self.tokens = sampler.buffer(rows, slots, dtype=torch.long)
        self.ended, self.eos = sampler.buffer(rows, dtype=torch.bool), sampler.buffer(1, dtype=torch.long)
        self.read_prompts = sampler.capture(self._read_prompts)
        self.forward = sampler.capture(self._forward, self.length)
        state = self.length, self.ids, self.count, self.tokens, self.ended, self.health
        self.step = sampler.capture(self._step, *state)

    def prefill(self, batch: Batch, lengths: Tensor, eos_id: int) -> None:
        """Read the processor's left-padded batch, which is on the CPU, every row moved to the front."""
        sampler, model = self.sampler, self.sampler.model
        sampler.owner = self
        rows, width = self.embeds.shape[:2]
        present = batch.images_emb_mask[..., 0].bool()
        count = int(present.sum())
        if count:  # first, so that the GPU is busy while the host goes on
            vision = sampler.graphs_for(VisionGraph, count)
            vision.pixels.copy_(batch.image_pixels(model.device, model.dtype))
            vision.encode_images()
        ids = torch.zeros(rows, width, dtype=torch.long, device="cpu")
        images = torch.zeros(rows, width, dtype=torch.bool, device="cpu")
        for row, length in enumerate(lengths.tolist()):  # padding is on the left
            ids[row, :length] = batch.input_ids[row, -length:]
            images[row, :length] = batch.images_seq_mask[row, -length:]
        self.embeds.copy_(model.llm.embed_tokens(sampler.upload(ids)))
        if count:
            places = sampler.upload(images.flatten().nonzero()[:, 0])
            self.embeds.view(rows * width, -1).index_copy_(0, places, vision.features)
        self.length.copy_(sampler.upload(lengths))
        self.eos.fill_(eos_id)
        for tensor in (self.ended, self.count, self.health):
            tensor.zero_()
        self.read_prompts()

    def _read_prompts(self) -> None:
        x = self.sampler.blocks(self.embeds, self.sampler.cached_attention(self.cache, self.zero))
        x = x.view(*self.embeds.shape)
        last = torch.arange(len(x), device=x.device), self.length.long() - 1
        self._write_logits(x[last])

    def _forward(self) -> None:
        """The last tokens in, the next ones' logits out."""

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self.sampler.ops.attend_one(q[:, 0], keys, values, self.length)

        x = self.sampler.model.llm.embed_tokens(self.ids)[:, None]
        self._write_logits(
            self.sampler.blocks(x, self.sampler.cached_attention(self.cache, self.length, attend))
        )
        self.length += 1

    def _write_logits(self, x: Tensor) -> None:
        llm, sampler = self.sampler.model.llm, self.sampler
        assert llm.lm_head is not None
        self.logits.copy_(sampler.ops.norm_linear(x, llm.norm.weight, sampler.eps, llm.lm_head.weight))

    def _step(self) -> None:
        self._forward()
        self.append_best()

    def append_best(self) -> None:
        best, ids = self.logits.max(-1)
        self.health += best * 0  # NaN from then on where the best logit is not finite
        self.append_tokens(ids)

    def append_tokens(self, ids: Tensor) -> None:
        """Note the next token of each row; a row that has ended is filled up with EOS."""
        self.ids.copy_(torch.where(self.ended, self.eos, ids))
        self.tokens.index_copy_(1, self.count, self.ids[:, None])
        self.ended |= self.ids == self.eos
        self.count += 1


def build_sampler(model: JanusFlow, compile: bool = False) -> GraphSampler | None:
    """The fast sampler for a model, or None where only the plain one works: no NVIDIA GPU of the Ampere generation or
    later, fp32, heads too wide for the attention kernel, no Triton."""
    if model.device.type != "cuda" or torch.version.cuda is None:
        return None
    if model.dtype not in (torch.bfloat16, torch.float16) or model.config.llm.head_dim > 128:
        return None
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        return None
    try:
        from . import kernels
    except ImportError:
        return None
    return GraphSampler(model, kernels, graphs=True, compile=compile)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
