"""The frozen text tower, computed once per distinct token, exactly.

Under a causal mask a token's state depends only on what stands before it. So

(a) nothing after EOT is computed;
(b) the slots that all prompts begin with are computed once, and every class attends to their keys and values;
(c) what is left is packed: classes stand one after the other in blocks of a few dozen tokens, which attend to the
    prefix and, under a mask, each class to itself;
(d) the last block computes queries and the MLP at EOT only.

A leading axis of contexts (one per image, as CoCoOp needs) is carried through everything; CoOp's is of size 1.
Activations that exceed a budget are kept in part only and recomputed in the backward pass: as many contexts as fit are
run together, or, where the classes alone are too many, one context and a chunk of classes.

Towers without a causal mask run full sequences: `coop.clip.encode_full`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coop.clip.prompts import Row, shared_length
from coop.clip.towers import Block, TextTower, layer_norm

KeysValues = list[tuple[Tensor, Tensor]]  # one (b, h, p, d/h) pair per block
ACTIVATION_BUDGET = 1400 * 2**20  # bytes that a CPU keeps for the backward pass before recomputation begins
BLOCK_SIZES = (32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class _Chunk:
    """Some classes, packed: `prefix` shared rows (in the first chunk only), then equally long blocks."""

    prefix: int
    base: Tensor  # (t, d) token + positional embedding; positional only where the context goes
    ctx_rows: Tensor  # packed rows that hold a context vector
    ctx_slots: Tensor  # which row of the context table each holds
    mask: Tensor  # (blocks, 1, s, p + s) what each row of a block sees of the prefix and of its block
    ends: Tensor  # (blocks * q) packed rows of the EOTs of each block, padded with its first row
    ends_mask: Tensor  # (blocks, 1, q, p + s) what they see
    last: Tensor  # (c,) which of `ends` is each class's EOT


@runtime_checkable
class TextEncoder(Protocol):
    """What both encoders of prompts are: class features as a function of the context.

    `tokens` is the number of token states that one call computes per context.
    """

    tokens: int

    def __call__(self, context: Float[Tensor, "*b k d"] | None = None) -> Float[Tensor, "*b c e"]:
        """Return unnormalised class features, in float32, for a context table (k, d) or one per image (b, k, d)."""
        ...


class PromptEncoder:
    """The class features of fixed prompts by a tower that shares prefixes, as a function of the context.

    `rows` are prompts as `coop.clip.prompts` makes them. `budget` is in bytes (on a GPU a third of what is free there).
    """

    def __init__(self, tower: TextTower, rows: Sequence[Row], budget: int | None = None) -> None:
        self.tower = tower
        budget = activation_budget(tower.device) if budget is None else budget
        self.limit = max(budget // (12 * tower.width * tower.layers * 4), 1)  # token states whose activations fit
        self.shared = shared_length(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        self.order = torch.tensor(order).argsort().to(tower.device)
        self.chunks = self._pack([rows[i] for i in order])
        self.tokens = sum(len(chunk.base) for chunk in self.chunks)

    def __call__(self, context: Float[Tensor, "*b k d"] | None = None) -> Float[Tensor, "*b c e"]:
        """Return unnormalised class features, in float32, for a context table (k, d) or one per image (b, k, d)."""
        tables = context_tables(self.tower, context)
        together = tables.split(max(self.limit // self.tokens, 1))
        recompute = len(together) * len(self.chunks) > 1 and tables.requires_grad and torch.is_grad_enabled()
        states = torch.cat([self._states(contexts, recompute) for contexts in together])[:, self.order]
        features = self.tower.project(states)
        return features if context is not None and context.ndim == 3 else features[0]

    def _states(self, context: Float[Tensor, "b k d"], recompute: bool) -> Float[Tensor, "b c d"]:
        """Run all chunks, the first of which computes the shared prefix of the others; classes in packed order."""
        prefix: KeysValues = []
        states = []
        for chunk in self.chunks:
            if recompute:
                out, prefix = checkpoint(self._run, chunk, context, prefix, use_reentrant=False)
            else:
                out, prefix = self._run(chunk, context, prefix)
            states.append(out)
        return torch.cat(states, dim=1)

    def _run(
        self, chunk: _Chunk, context: Float[Tensor, "b k d"], prefix: KeysValues
    ) -> tuple[Float[Tensor, "b c d"], KeysValues]:
        """Return the chunk's EOT states before the final norm, and the prefix's keys and values for later chunks."""
        x = chunk.base.expand(len(context), -1, -1)
        x = x.index_add(1, chunk.ctx_rows, context.float()[:, chunk.ctx_slots])
        computed: KeysValues = []
        for i, block in enumerate(self.tower.blocks):
            final = i == len(self.tower.blocks) - 1
            given = None if chunk.prefix or not prefix else prefix[i]
            x, keys_values = self._block(block, x, chunk, given, final)
            computed.append(keys_values)
        return x, prefix or computed

    def _block(
        self, block: Block, x: Float[Tensor, "b t d"], chunk: _Chunk, prefix: tuple[Tensor, Tensor] | None, final: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One residual block over packed rows; the final one returns EOT rows only, in packed order."""
        d, heads, p = self.tower.width, self.tower.heads, chunk.prefix
        normed = layer_norm(x, block.ln_1, self.tower.dtype)

        def split(y: Tensor) -> Tensor:  # (b, t, n * d) -> (n, b, h, t, d/h)
            return y.unflatten(-1, (-1, heads, d // heads)).permute(2, 0, 3, 1, 4)

        if final:
            q = split(F.linear(normed[:, chunk.ends], block.qkv_weight[:d], block.qkv_bias[:d]))[0]
            k, v = split(F.linear(normed, block.qkv_weight[d:], block.qkv_bias[d:]))
        else:
            q, k, v = split(F.linear(normed, block.qkv_weight, block.qkv_bias))
        if prefix is None:
            prefix = (k[:, :, :p], v[:, :, :p])
        own = (k[:, :, p:], v[:, :, p:])
        if final:
            out = _attend(q, *own, prefix, chunk.ends_mask)[:, :, chunk.last]
            x = x[:, chunk.ends[chunk.last]]
        else:
            out = _attend(q[:, :, p:], *own, prefix, chunk.mask)
            if p:
                out = torch.cat([F.scaled_dot_product_attention(q[:, :, :p], *prefix, is_causal=True), out], dim=2)
        out = F.linear(out.transpose(1, 2).flatten(2), block.out.weight, block.out.bias)
        x = x + (out if block.scale_1 is None else out * block.scale_1)
        hidden = F.linear(layer_norm(x, block.ln_2, self.tower.dtype), block.c_fc.weight, block.c_fc.bias)
        out = F.linear(block.activation(hidden), block.c_proj.weight, block.c_proj.bias)
        return x + (out if block.scale_2 is None else out * block.scale_2), prefix

    def _pack(self, rows: Sequence[Row]) -> list[_Chunk]:
        """Return one chunk if its saved activations (12 widths a token and block) fit, else chunks of half of that.

        Half, because recomputing holds a chunk's activations beside the gradients of all that it shares.
        """
        own = [len(row) - self.shared for row in rows]
        limit = self.limit if self.shared + sum(own) <= self.limit else max(self.limit // 2, max(own))
        parts = _fill(own, limit)
        chunks: list[_Chunk] = []
        for part in parts:
            chunks.append(self._chunk([rows[i] for i in part], with_prefix=not chunks, only=len(parts) == 1))
        return chunks

    def _chunk(self, rows: Sequence[Row], with_prefix: bool, only: bool) -> _Chunk:
        shared, device = self.shared, self.tower.device
        own = [len(row) - shared for row in rows]
        size = self._block_size(own)
        blocks = _fill(own, size)
        alone = only and len(blocks) == 1  # a single block takes the prefix in: fewer, larger operations
        lead = shared if alone else 0
        prefix = shared if with_prefix and not alone else 0
        size = lead + max(sum(own[i] for i in block) for block in blocks)
        seen = 0 if alone else shared
        slots = list(rows[0][:shared]) if with_prefix else []
        positions = list(range(shared)) if with_prefix else []
        mask = torch.zeros(len(blocks), 1, size, seen + size, dtype=torch.bool)
        most = max(map(len, blocks))
        ends = torch.zeros(len(blocks), most, dtype=torch.long)
        last = []
        for number, block in enumerate(blocks):
            at = lead
            mask[number, 0, :at, :at] = torch.ones(at, at).tril().bool()
            for place, i in enumerate(block):
                rows_of_class = slice(at, at + own[i])
                mask[number, 0, rows_of_class, : seen + lead] = True
                mask[number, 0, rows_of_class, seen + at : seen + at + own[i]] = (
                    torch.ones(own[i], own[i]).tril().bool()
                )
                slots += rows[i][shared:]
                positions += range(shared, len(rows[i]))
                at += own[i]
                ends[number, place] = at - 1
                last.append(number * most + place)
            mask[number, 0, range(at, size), range(seen + at, seen + size)] = True  # padding sees itself
            slots += [0] * (size - at)
            positions += [0] * (size - at)
        base, ctx_rows, ctx_slots = embedded_slots(self.tower, torch.tensor(slots), torch.tensor(positions))
        ends_mask = mask.gather(2, ends[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))
        starts = prefix + torch.arange(len(blocks))[:, None] * size
        tensors = (mask, (starts + ends).flatten(), ends_mask, torch.tensor(last))
        return _Chunk(prefix, base, ctx_rows, ctx_slots, *(tensor.to(device) for tensor in tensors))

    def _block_size(self, own: Sequence[int]) -> int:
        """Return the block length that costs least: long blocks attend to more, short ones are filled up worse."""
        d, total, longest = self.tower.width, sum(own), max(own)

        def cost(size: int) -> float:
            count = len(_fill(own, size))
            return count * size * (12 * d * d + 2 * d * (self.shared + size)) + count * 1e6

        return min((size for size in (*BLOCK_SIZES, total) if longest <= size <= max(total, longest)), key=cost)


def context_tables(tower: TextTower, context: Float[Tensor, "*b k d"] | None) -> Float[Tensor, "b k d"]:
    """Return the context with a leading axis of images; (1, 0, d) where there is none."""
    if context is None:
        return tower.token_embedding.new_zeros(1, 0, tower.width, dtype=torch.float32)
    return context if context.ndim == 3 else context[None]


def embedded_slots(tower: TextTower, slots: Int[Tensor, " t"], positions: Int[Tensor, " t"]) -> tuple[
    Float[Tensor, "t d"], Int[Tensor, " k"], Int[Tensor, " k"]
]:  # fmt: skip
    """Return frozen embeddings in float32 with gaps for the context, the gaps' rows, and their slots."""
    is_ctx = slots < 0
    ids, positions = slots.clamp(min=0).to(tower.device), positions.to(tower.device)
    tokens = tower.token_embedding.detach()[ids].float()
    tokens[is_ctx.to(tower.device)] = 0
    base = tokens + tower.positional_embedding.detach()[positions].float()
    return base, is_ctx.nonzero()[:, 0].to(tower.device), (-1 - slots[is_ctx]).to(tower.device)


def activation_budget(device: torch.device) -> int:
    """Return how many bytes may be kept for the backward pass before recomputation begins."""
    return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else ACTIVATION_BUDGET


def _fill(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return which items stand in which block of `size`, one after the other."""
    blocks: list[list[int]] = []
    left = 0
    for i, length in enumerate(lengths):
        if not blocks or length > left:
            blocks.append([])
            left = size
        blocks[-1].append(i)
        left -= length
    return blocks


def _attend(
    q: Float[Tensor, "b h r dh"],
    k: Float[Tensor, "b h t dh"],
    v: Float[Tensor, "b h t dh"],
    prefix: tuple[Tensor, Tensor],
    mask: Tensor,
) -> Float[Tensor, "b h r dh"]:
    """Attention of each block's rows to the shared prefix and to the block, as `mask` (n, 1, s, p + s) allows."""
    images, blocks = len(q), len(mask)

    def blocked(y: Tensor) -> Tensor:  # (b, h, n * s, dh) -> (b * n, h, s, dh)
        return y.unflatten(2, (blocks, -1)).transpose(1, 2).flatten(0, 1)

    def with_prefix(y: Tensor, shared: Tensor) -> Tensor:
        if mask.shape[-1] == y.shape[2] // blocks:  # the block holds the prefix itself
            return blocked(y)
        every = shared[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 1)
        return torch.cat([every, blocked(y)], dim=2)

    keys, values = with_prefix(k, prefix[0]), with_prefix(v, prefix[1])
    allowed = mask if images == 1 else mask.repeat(images, 1, 1, 1)
    out = F.scaled_dot_product_attention(blocked(q), keys, values, attn_mask=allowed)
    return out.unflatten(0, (images, blocks)).transpose(1, 2).flatten(2, 3)
