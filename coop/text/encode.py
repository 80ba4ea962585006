"""The frozen text tower, computed once per distinct token, exactly.

Under a causal mask a token's state depends only on what stands before it. So

(a) nothing after EOT is computed;
(b) the slots that all prompts begin with are computed once, and every class attends to their keys and values;
(c) what is left is packed without padding: classes are ordered by length, so that equally long ones are a
    contiguous block and need neither padding nor a gather;
(d) the last block computes queries and the MLP at EOT only.

A leading axis of contexts (one per image, as CoCoOp needs) is carried through everything; CoOp's is of size 1.
Prompts whose activations exceed a budget are run in chunks of classes and recomputed in the backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coop.text.layout import Row, shared_length
from coop.text.tower import Block, TextTower, layer_norm

KeysValues = list[tuple[Tensor, Tensor]]  # one (b, h, p, d/h) pair per block
ACTIVATION_BUDGET = 2 * 2**30  # bytes kept for the backward pass before recomputation begins


@dataclass(frozen=True)
class _Chunk:
    """Some classes, packed: `prefix` shared rows (in the first chunk only), then blocks of equally long classes."""

    prefix: int
    groups: tuple[tuple[int, int], ...]  # (number of classes, own length), in packed order
    base: Tensor  # (t, d) token + positional embedding; positional only where the context goes
    ctx_rows: Tensor  # packed rows that hold a context vector
    ctx_slots: Tensor  # which row of the context table each holds
    last: Tensor  # (c,) packed row of each class's EOT


@dataclass(frozen=True)
class _FullChunk:
    """Some classes as padded sequences, for towers whose tokens look at everything."""

    base: Tensor  # (c * l, d), as in _Chunk
    ctx_rows: Tensor
    ctx_slots: Tensor
    ids: Tensor  # (c, l) token ids, with a stand-in where the context goes
    pooled: Tensor  # (c,) position whose state is the class's


class PromptEncoder:
    """The class features of fixed prompts as a function of the context.

    `rows` are prompts as `coop.text.layout` makes them. `budget` is in bytes.
    `tokens` is the number of token states that one call computes per context.
    """

    def __init__(self, tower: TextTower, rows: Sequence[Row], pad: int = 0, budget: int = ACTIVATION_BUDGET) -> None:
        self.tower = tower
        if tower.shares_prefixes:
            self.shared = shared_length(rows)
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            self.order = torch.tensor(order).argsort().to(tower.device)
            self.chunks = self._pack([rows[i] for i in order], budget)
            self.tokens = sum(len(chunk.base) for chunk in self.chunks)
        else:
            self.full_chunks = self._pack_full(rows, pad, budget)
            self.tokens = sum(chunk.ids.numel() for chunk in self.full_chunks)

    def __call__(self, context: Float[Tensor, "*b k d"] | None = None) -> Float[Tensor, "*b c e"]:
        """Return unnormalised class features, in float32, for a context table (k, d) or one per image (b, k, d)."""
        batched = context is not None and context.ndim == 3
        if context is None:
            context = self.tower.token_embedding.new_zeros(1, 0, self.tower.width, dtype=torch.float32)
        elif not batched:
            context = context[None]
        states = self._shared_states(context) if self.tower.shares_prefixes else self._full_states(context)
        features = self.tower.project(states)
        return features if batched else features[0]

    # shared prefixes

    def _shared_states(self, context: Float[Tensor, "b k d"]) -> Float[Tensor, "b c d"]:
        prefix: KeysValues = []
        states = []
        recompute = len(self.chunks) > 1 and context.requires_grad and torch.is_grad_enabled()
        for chunk in self.chunks:
            if recompute:
                out, prefix = checkpoint(self._run, chunk, context, prefix, use_reentrant=False)
            else:
                out, prefix = self._run(chunk, context, prefix)
            states.append(out)
        return torch.cat(states, dim=1)[:, self.order]

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
        """One residual block over packed rows; the final one returns EOT rows only."""
        d, heads = self.tower.width, self.tower.heads
        normed = layer_norm(x, block.ln_1, self.tower.dtype)

        def split(y: Tensor) -> Tensor:  # (b, t, n * d) -> (n, b, h, t, d/h)
            return y.unflatten(-1, (-1, heads, d // heads)).permute(2, 0, 3, 1, 4)

        if final:
            q = split(F.linear(normed[:, chunk.last], block.qkv_weight[:d], block.qkv_bias[:d]))[0]
            k, v = split(F.linear(normed, block.qkv_weight[d:], block.qkv_bias[d:]))
            x = x[:, chunk.last]
        else:
            q, k, v = split(F.linear(normed, block.qkv_weight, block.qkv_bias))
        p = chunk.prefix
        if prefix is None:
            prefix = (k[:, :, :p], v[:, :, :p])
        out = _attend(q, k[:, :, p:], v[:, :, p:], prefix, chunk.groups, queries_per_class=1 if final else None)
        if p and not final:
            out = torch.cat([F.scaled_dot_product_attention(q[:, :, :p], *prefix, is_causal=True), out], dim=2)
        out = F.linear(out.transpose(1, 2).flatten(2), block.out.weight, block.out.bias)
        x = x + (out if block.scale_1 is None else out * block.scale_1)
        hidden = F.linear(layer_norm(x, block.ln_2, self.tower.dtype), block.c_fc.weight, block.c_fc.bias)
        out = F.linear(block.activation(hidden), block.c_proj.weight, block.c_proj.bias)
        return x + (out if block.scale_2 is None else out * block.scale_2), prefix

    def _pack(self, rows: Sequence[Row], budget: int) -> list[_Chunk]:
        """Split rows, ordered by length, into chunks whose saved activations (about 9 widths a token and block) fit."""
        per_token = 9 * self.tower.width * self.tower.layers * 4
        limit = max(budget // per_token, 1)
        chunks, start = [], 0
        while start < len(rows):
            used = 0 if start else self.shared
            end = start
            while end < len(rows) and (end == start or used + len(rows[end]) - self.shared <= limit):
                used += len(rows[end]) - self.shared
                end += 1
            chunks.append(self._chunk(rows[start:end], with_prefix=start == 0))
            start = end
        return chunks

    def _chunk(self, rows: Sequence[Row], with_prefix: bool) -> _Chunk:
        shared = self.shared
        slots: list[int] = list(rows[0][:shared]) if with_prefix else []
        positions = list(range(shared)) if with_prefix else []
        groups: list[tuple[int, int]] = []
        last = []
        for row in rows:
            own = len(row) - shared
            slots += row[shared:]
            positions += range(shared, len(row))
            last.append(len(slots) - 1)
            if groups and groups[-1][1] == own:
                groups[-1] = (groups[-1][0] + 1, own)
            else:
                groups.append((1, own))
        device = self.tower.device
        base, ctx_rows, ctx_slots = self._base(torch.tensor(slots), torch.tensor(positions))
        prefix = shared if with_prefix else 0
        return _Chunk(prefix, tuple(groups), base, ctx_rows, ctx_slots, torch.tensor(last, device=device))

    def _base(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return frozen embeddings (t, d) in float32 with gaps for the context, the gaps' rows, and their slots."""
        tower = self.tower
        is_ctx = slots < 0
        ids, positions = slots.clamp(min=0).to(tower.device), positions.to(tower.device)
        tokens = tower.token_embedding.detach()[ids].float()
        tokens[is_ctx.to(tower.device)] = 0
        base = tokens + tower.positional_embedding.detach()[positions].float()
        return base, is_ctx.nonzero()[:, 0].to(tower.device), (-1 - slots[is_ctx]).to(tower.device)

    # full sequences, for towers without a causal mask

    def _pack_full(self, rows: Sequence[Row], pad: int, budget: int) -> list[_FullChunk]:
        """Pad rows to the tower's length and split them into chunks whose activations (18 widths a token) fit."""
        tower, length = self.tower, self.tower.context_length
        per_class = 18 * tower.width * tower.layers * 4 * length
        size = max(budget // per_class, 1)
        stand_in = next(i for i in (0, 1, 2) if i != pad)  # any token but padding: masks and pooling look at ids
        chunks = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            slots = torch.tensor([list(row) + [pad] * (length - len(row)) for row in some])
            ends = {"last": [length - 1] * len(some), "first": [0] * len(some)}.get(
                tower.pool, [len(row) - 1 for row in some]
            )
            ids = torch.where(slots < 0, stand_in, slots).to(tower.device)
            base = self._base(slots.flatten(), torch.arange(length).repeat(len(some)))
            chunks.append(_FullChunk(*base, ids, torch.tensor(ends, device=tower.device)))
        return chunks

    def _full_states(self, context: Float[Tensor, "b k d"]) -> Float[Tensor, "b c d"]:
        recompute = len(self.full_chunks) * len(context) > 1 and context.requires_grad and torch.is_grad_enabled()
        states = []
        for table in context.float():
            runs = [
                checkpoint(self._run_full, chunk, table, use_reentrant=False)
                if recompute
                else self._run_full(chunk, table)
                for chunk in self.full_chunks
            ]
            states.append(torch.cat(runs))
        return torch.stack(states)

    def _run_full(self, chunk: _FullChunk, table: Float[Tensor, "k d"]) -> Float[Tensor, "c d"]:
        x = chunk.base.index_add(0, chunk.ctx_rows, table[chunk.ctx_slots])
        return self.tower.run_full(x.view(*chunk.ids.shape, -1), chunk.ids, chunk.pooled)


def _attend(
    q: Float[Tensor, "b h q dh"],
    k: Float[Tensor, "b h t dh"],
    v: Float[Tensor, "b h t dh"],
    prefix: tuple[Tensor, Tensor],
    groups: tuple[tuple[int, int], ...],
    queries_per_class: int | None,
) -> Float[Tensor, "b h r dh"]:
    """Causal attention of every class to the shared prefix and to its own tokens.

    `q` holds the prefix's queries first (they are skipped here), or one query, EOT's, per class.
    """
    prefix_k, prefix_v = prefix
    scale = q.shape[-1] ** -0.5
    p = prefix_k.shape[2]
    if queries_per_class is None:
        q = q[:, :, q.shape[2] - k.shape[2] :]
    to_prefix = (q * scale) @ prefix_k.transpose(-1, -2)
    outputs = []
    q_start = start = 0
    for count, own in groups:
        per_class = queries_per_class or own
        q_rows, rows = slice(q_start, q_start + count * per_class), slice(start, start + count * own)
        q_start, start = q_rows.stop, rows.stop
        queries = q[:, :, q_rows].unflatten(2, (count, per_class)) * scale
        keys, values = (y[:, :, rows].unflatten(2, (count, own)) for y in (k, v))
        scores = queries @ keys.transpose(-1, -2)
        if per_class > 1:
            scores = scores + torch.full((own, own), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
        scores = torch.cat([to_prefix[:, :, q_rows].unflatten(2, (count, per_class)), scores], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
        from_prefix = weights[..., :p].flatten(2, 3) @ prefix_v
        outputs.append(from_prefix + (weights[..., p:] @ values).flatten(2, 3))
    return torch.cat(outputs, dim=2)
