# SPDX-License-Identifier: MIT
"""The fast path: the plain model's numbers with static shapes, fused weights and kernels, inside CUDA graphs.

`pipeline.py` uses it on NVIDIA GPUs in bfloat16 (or float16) where Triton is there; `load(fast=False)` turns it off.
It keeps no mathematics of its own: UViT, SigLIP, aligners and the flow are the plain modules, the LLM's blocks are
`ops.py` (or its kernels) over the same weights, and tests hold both paths to the same recordings.

- Painting: a prompt's keys and values are computed once; the attention reads them first and then the image's own, so
  there is no mask, nothing is copied, and the unconditional rows carry BOS alone. One step of the flow is one graph.
- Answering: rows are aligned at their first token, so again no mask. Prompt and step are a graph each; the step
  picks its token itself, and the host looks in only every `LOOK` tokens.

Graphs belong to a shape: number of images or rows, lengths rounded up. The last few are kept.

Legend: B images, R rows of the LLM's batch, T tokens, N image tokens, D hidden size, C slots of a row's cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ..flow import guide
from ..llama import rope_table
from ..model import JanusFlow
from . import ops as plain_ops

PROMPT_STEP, TEXT_STEP, CACHE_STEP = 128, 64, 256  # lengths are rounded up to multiples of these
KEPT = 4  # shapes of each kind whose graphs and buffers stay
LOOK = 16  # tokens between two looks at whether every row has ended


@dataclass(frozen=True)
class Layer:
    """One block's weights; qkv (heads + 2 · key/value heads)·d rows, gate_up 2F rows."""

    norm1: Tensor
    qkv: Tensor
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


@torch.inference_mode(False)  # parameters that may be trained later
@torch.no_grad()
def fuse(model: JanusFlow) -> list[Layer]:
    """Put query, key and value weights, and gate and up, side by side in memory.

    The module's own parameters become views of the result: nothing is held twice, names and values stay.
    """

    def join(*linears: nn.Linear) -> Tensor:
        whole = torch.cat([linear.weight for linear in linears])
        for linear, part in zip(
            linears, whole.split([len(linear.weight) for linear in linears]), strict=True
        ):
            linear.weight = nn.Parameter(part, requires_grad=False)
        return whole

    layers = []
    for block in model.llm.layers:
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


@torch.inference_mode(False)
@torch.no_grad()
def pixels_first(*modules: nn.Module) -> None:
    """Lay convolutions out with the channels last in memory, which halves UViT's time; names and values stay."""
    for module in modules:
        module.to(memory_format=torch.channels_last)


class Engine:
    """Fast `velocity` and `decode` over a loaded model. Made by `make`."""

    def __init__(
        self, model: JanusFlow, ops: ModuleType = plain_ops, graphs: bool = False, compile: bool = False
    ):
        self.model, self.ops, self.graphs = model, ops, graphs
        self.layers = fuse(model)
        if graphs and model.parts != "understanding":
            pixels_first(model.uvit_encoder, model.uvit_decoder)
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        self.shapes: dict[type, OrderedDict] = {}
        config = model.config.llm
        self.heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        self.cache_shape = (config.num_key_value_heads, config.head_dim)
        wrap = torch.compile(dynamic=False) if compile else (lambda function: function)
        self.encode_latents, self.decode_velocity, self.embed_images = (
            wrap(getattr(model, name)) for name in ("encode_latents", "decode_velocity", "embed_images")
        )
        positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
        self.tables = {}
        for rounding in (False, True):
            table = rope_table(positions, config.head_dim, config.rope_theta, model.dtype, rounding)
            self.tables[rounding] = tuple(t[0, 0, :, : config.head_dim // 2].contiguous() for t in table)

    @property
    def current(self) -> bool:
        """Whether the model still has the weights that were fused: not after `.to(...)` or a replaced parameter."""
        first, last = self.model.llm.layers[0].self_attn, self.model.llm.layers[-1].mlp
        return (
            first.q_proj.weight.data_ptr() == self.layers[0].qkv.data_ptr()
            and last.gate_proj.weight.data_ptr() == self.layers[-1].gate_up.data_ptr()
        )

    def shape(self, kind: type, *key):
        """The kept buffers and graphs of a kind and shape, made anew where there are none."""
        kept = self.shapes.setdefault(kind, OrderedDict())
        if key not in kept:
            while len(kept) >= KEPT:
                kept.popitem(last=False)
            kept[key] = kind(self, *key)
        kept.move_to_end(key)
        return kept[key]

    def captured(self, function: Callable[[], None], *state: Tensor) -> Callable[[], None]:
        """`function`, which reads and writes fixed tensors only, as a graph that is captured at its first call.

        state: tensors that a call moves on; the run that warms up must not.
        """
        if not self.graphs:
            return function
        graph = None

        def call() -> None:
            nonlocal graph
            if graph is None:
                before = [tensor.clone() for tensor in state]
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    function()
                torch.cuda.current_stream().wait_stream(side)
                for tensor, old in zip(state, before, strict=True):
                    tensor.copy_(old)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    function()
            graph.replay()

        return call

    def here(self) -> AbstractContextManager:
        """Streams, graphs and kernels belong to the current card, which need not be the model's."""
        return torch.cuda.device(self.model.device) if self.graphs else nullcontext()

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, device=self.model.device, dtype=dtype or self.model.dtype)

    def blocks(self, x: Tensor, mix: Callable[[int, Tensor], Tensor]) -> Tensor:
        """All blocks over x (R, T, D) -> (R·T, D), before the final norm.

        mix(i, qkv): layer i's attention, from (R, T, (H + 2G)·d) to (R·T, H·d).
        """
        ops, (rows, tokens, _) = self.ops, x.shape
        x = x.reshape(rows * tokens, -1).clone()  # the blocks add to it in place
        for i, layer in enumerate(self.layers):
            qkv = ops.norm_linear(x, layer.norm1, self.eps, layer.qkv).view(rows, tokens, -1)
            x = ops.linear_add(mix(i, qkv), layer.out, x)
            x = ops.linear_add(ops.norm_mlp(x, layer.norm2, self.eps, layer.gate_up), layer.down, x)
        return x

    def cached(self, cache: Tensor, position: Tensor, tables, attend: Callable | None = None):
        """A `mix` that puts keys and values into cache (2, layers, R, C, G, d) from each row's position on.

        attend(q, keys, values); without it the tokens are the rows' first and see each other.
        """
        ops, attend = self.ops, attend or self.ops.attend

        def mix(i: int, qkv: Tensor) -> Tensor:
            keys, values = cache[:, i]
            q = ops.rope_store(qkv, *tables, position, keys, values, self.heads)
            return attend(q, keys, values)

        return mix

    # What the pipeline calls -----------------------------------------------------------------------

    def velocity(
        self, prompts: Sequence[Sequence[int]], parallel_size: int, cfg_weight: float, upstream_rounding: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """As `Pipeline.velocity`."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        index = {ids: i for i, ids in enumerate(distinct)}
        chosen = [index[tuple(p)] for p in prompts for _ in range(parallel_size)]
        guided = cfg_weight != 1.0
        limit = self.model.config.llm.max_position_embeddings
        prompt = min(limit, _up(max(map(len, distinct)), PROMPT_STEP))
        with self.here():
            painting = self.shape(Painting, len(chosen), guided, prompt, upstream_rounding)
            unconditional = [len(distinct)] * (len(chosen) if guided else 0)
            painting.read([*distinct, distinct[0][:1]], chosen + unconditional)

        def evaluate(z: Tensor, timestep: Tensor) -> Tensor:
            painting.latents.copy_(z)
            painting.timestep.copy_(timestep)
            with self.here():
                painting.step()
            v = painting.v.to(z.dtype)
            return guide(*v.chunk(2), cfg_weight) if guided else v

        return evaluate

    def decode(
        self,
        batch,
        max_new_tokens: int,
        eos_id: int,
        choose: Callable[[Tensor], Tensor] | None,
        upstream_rounding: bool,
    ) -> list[list[int]]:
        """As `pipeline.decode`, from the processor's batch; `choose` None is greedy."""
        with self.here():
            return self._decode(batch, max_new_tokens, eos_id, choose, upstream_rounding)

    def _decode(self, batch, max_new_tokens, eos_id, choose, upstream_rounding) -> list[list[int]]:
        lengths = batch.attention_mask.sum(1)
        rows, longest = len(lengths), int(lengths.max())
        room = min(self.model.config.llm.max_position_embeddings, _up(longest + max_new_tokens, CACHE_STEP))
        answering = self.shape(Answering, rows, min(room, _up(longest, TEXT_STEP)), room, upstream_rounding)
        answering.read(batch, lengths, eos_id)
        answering.prompt()
        for n in range(max_new_tokens):
            if n:
                answering.step() if choose is None else answering.forward()
            if choose is not None:
                answering.take(choose(answering.logits))
            elif n == 0:
                answering.pick()
            if (choose is not None or n % LOOK == LOOK - 1) and bool(answering.ended.all()):
                break
        answers = answering.tokens[:, : n + 1].tolist()
        return [ids[: ids.index(eos_id) + 1] if eos_id in ids else ids for ids in answers]


class Painting:
    """Buffers and graphs for B images of prompts of up to P tokens."""

    def __init__(self, engine: Engine, images: int, guided: bool, prompt: int, upstream_rounding: bool):
        self.engine, model = engine, engine.model
        self.rows, self.image_tokens = images * (2 if guided else 1), 1 + model.num_image_tokens
        self.copies = 2 if guided else 1
        self.tables, whole = engine.tables[upstream_rounding], torch.int32
        # Distinct prompts, at most one an image, and BOS alone.
        self.ids = engine.buffer(images + 1, prompt, dtype=torch.long)
        self.prefix = engine.buffer(2, len(engine.layers), images + 1, prompt, *engine.cache_shape)
        self.zero = engine.buffer(images + 1, dtype=whole)
        self.source, self.length, self.position = (engine.buffer(self.rows, dtype=whole) for _ in range(3))
        self.latents = engine.buffer(images, *model.latent_shape)
        if engine.graphs:
            self.latents = self.latents.contiguous(memory_format=torch.channels_last)
        self.timestep = engine.buffer(images, dtype=torch.float32)
        self.v = engine.buffer(self.rows, *model.latent_shape)
        self.read_prompts, self.step = engine.captured(self._read), engine.captured(self._step)

    def read(self, prompts: Sequence[Sequence[int]], source: Sequence[int]) -> None:
        """Keys and values of the prompts; row r of the batch continues prompt source[r].

        An unconditional row's image takes the positions of its twin's, as if its prompt were there but unseen.
        """
        ids = torch.zeros(self.ids.shape, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        length = torch.tensor([len(prompts[i]) for i in source], dtype=torch.int32)
        self.ids.copy_(ids)
        self.source.copy_(torch.tensor(source, dtype=torch.int32))
        self.length.copy_(length)
        self.position.copy_(length[: self.rows // self.copies].repeat(self.copies))
        self.read_prompts()

    def _read(self) -> None:
        engine = self.engine
        x = engine.model.llm.embed_tokens(self.ids)
        engine.blocks(x, engine.cached(self.prefix, self.zero, self.tables))

    def _step(self) -> None:
        engine, model = self.engine, self.engine.model
        x, t_emb, skip = engine.encode_latents(self.latents, self.timestep)
        tokens = torch.cat([t_emb[:, None], x], dim=1).repeat(self.copies, 1, 1)  # (R, 1 + N, D)

        def mix(i: int, qkv: Tensor) -> Tensor:
            prefix = (*self.prefix[:, i], self.source, self.length)
            return engine.ops.attend_image(qkv, *self.tables, self.position, engine.heads, prefix)

        x = engine.blocks(tokens, mix)
        x = x.view(self.rows, self.image_tokens, -1)[:, 1:].flatten(0, 1)
        hidden = engine.ops.rms_norm(x, model.llm.norm.weight, engine.eps).view(self.rows, -1, x.shape[-1])
        skip = torch.cat([skip] * self.copies)  # keeps the order in memory
        self.v.copy_(engine.decode_velocity(hidden, skip, torch.cat([t_emb] * self.copies)))


class Seeing:
    """Buffers and graph for the embeddings of n images."""

    def __init__(self, engine: Engine, count: int):
        model, size = engine.model, engine.model.config.siglip.image_size
        self.pixels = engine.buffer(count, 3, size, size)
        self.features = engine.buffer(
            count * (1 + model.config.siglip.num_patches), model.config.llm.hidden_size
        )

        def look() -> None:
            self.features.copy_(engine.embed_images(self.pixels).flatten(0, 1))

        self.look = engine.captured(look)


class Answering:
    """Buffers and graphs for R conversations of up to T tokens and, with their answers, C."""

    def __init__(self, engine: Engine, rows: int, tokens: int, slots: int, upstream_rounding: bool):
        self.engine, model = engine, engine.model
        self.tables, whole = engine.tables[upstream_rounding], torch.int32
        self.embeds = engine.buffer(rows, tokens, model.config.llm.hidden_size)
        self.cache = engine.buffer(2, len(engine.layers), rows, slots, *engine.cache_shape)
        self.length, self.zero = engine.buffer(rows, dtype=whole), engine.buffer(rows, dtype=whole)
        self.logits = engine.buffer(rows, model.config.llm.vocab_size, dtype=torch.float32)
        self.ids, self.count = engine.buffer(rows, dtype=torch.long), engine.buffer(1, dtype=torch.long)
        self.tokens = engine.buffer(rows, slots, dtype=torch.long)
        self.ended, self.eos = engine.buffer(rows, dtype=torch.bool), engine.buffer(1, dtype=torch.long)
        self.prompt = engine.captured(self._prompt)
        self.forward = engine.captured(self._forward, self.length)

        def step() -> None:
            self._forward()
            self.pick()

        self.step = engine.captured(step, self.length, self.ids, self.count, self.tokens, self.ended)

    def read(self, batch, lengths: Tensor, eos_id: int) -> None:
        """The processor's left-padded batch, on the CPU: its embeddings, every row from its first token on."""
        engine, model = self.engine, self.engine.model
        rows, width = self.embeds.shape[:2]
        present = batch.images_emb_mask[..., 0].bool()
        count = int(present.sum())
        if count:  # first what keeps the GPU busy
            seeing = engine.shape(Seeing, count)
            whole = bool(present.all())
            seeing.pixels.copy_(batch.pixel_values.flatten(0, 1) if whole else batch.pixel_values[present])
            seeing.look()
        ids, images = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.bool)
        for row, length in enumerate(lengths.tolist()):  # padding is on the left
            ids[row, :length] = batch.input_ids[row, -length:]
            images[row, :length] = batch.images_seq_mask[row, -length:]
        self.embeds.copy_(model.llm.embed_tokens(ids.to(model.device)))
        if count:
            places = images.flatten().nonzero()[:, 0].to(model.device)
            self.embeds.view(rows * width, -1).index_copy_(0, places, seeing.features)
        self.length.copy_(lengths)
        self.eos.fill_(eos_id)
        self.ended.zero_()
        self.count.zero_()

    def _prompt(self) -> None:
        x = self.engine.blocks(self.embeds, self.engine.cached(self.cache, self.zero, self.tables))
        x = x.view(*self.embeds.shape)
        last = torch.arange(len(x), device=x.device), self.length.long() - 1
        self._logits(x[last])

    def _forward(self) -> None:
        """The chosen tokens in, the next ones' logits out."""

        def attend(q, keys, values):
            return self.engine.ops.attend_one(q[:, 0], keys, values, self.length)

        x = self.engine.model.llm.embed_tokens(self.ids)[:, None]
        x = self.engine.blocks(x, self.engine.cached(self.cache, self.length, self.tables, attend))
        self._logits(x)
        self.length += 1

    def _logits(self, x: Tensor) -> None:
        llm = self.engine.model.llm
        self.logits.copy_(
            self.engine.ops.norm_linear(x, llm.norm.weight, self.engine.eps, llm.lm_head.weight)
        )

    def pick(self) -> None:
        self.take(self.logits.argmax(-1))

    def take(self, ids: Tensor) -> None:
        """Note the next token of each row; a row that ended is filled up with EOS."""
        self.ids.copy_(torch.where(self.ended, self.eos, ids))
        self.tokens.index_copy_(1, self.count, self.ids[:, None])
        self.ended |= self.ids == self.eos
        self.count += 1


def make(model: JanusFlow, compile: bool = False) -> Engine | None:
    """The engine for a model, or None where the plain path is the only one: no NVIDIA GPU of Ampere's generation or
    later, fp32, heads too wide for the attention kernel, no Triton."""
    if (
        model.device.type != "cuda"
        or torch.version.cuda is None
        or model.dtype not in (torch.bfloat16, torch.float16)
    ):
        return None
    if torch.cuda.get_device_capability(model.device) < (8, 0) or model.config.llm.head_dim > 128:
        return None
    try:
        from . import kernels
    except ImportError:
        return None
    return Engine(model, kernels, graphs=True, compile=compile)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
