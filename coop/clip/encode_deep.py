"""Class features of prompts through a text tower that a method changes, computed once per distinct token within a step.

All classes see the same changed weights and tokens, so what holds for the frozen tower (`coop.clip.encode`) holds here:
under a causal mask nothing after EOT counts, and the slots that all prompts begin with have the same states for every
class in every block. They are computed once; the rest of the classes is packed, row after row, and attends to them.
Tokens that differ by class end the sharing where they come in. Below its first change the tower is frozen: the states
there are computed once and kept. Towers without a causal mask run full sequences through the same loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coop.clip.encode import ACTIVATION_BUDGET
from coop.clip.prompts import Row, shared_length
from coop.clip.towers import UNCHANGED, Change, Changes, TextTower, run_block, wide
from coop.errors import CoopError

WIDTHS_PER_STATE = 30  # activations that a block keeps for the backward pass, in widths of a token's state


@dataclass(frozen=True)
class _Layout:
    """Where the states of prompts stand: `prefix` rows for all classes, then each class's own, packed.

    `take` are the rows of the former states (after which the class's new tokens are counted) that it is made of.
    """

    prefix: int
    sequences: list[list[int]]  # the rows of each class's sequence, the prefix included
    take: Tensor  # (n,)
    padded: Tensor  # (c * s,) own rows of each class, filled up with its first
    packed: Tensor  # (n - prefix,) where each own row stands in `padded`
    mask: Tensor | None  # (s, prefix + s) what an own row sees; None: everything

    def rows(self, start: int, count: int) -> list[int]:
        """Return the rows of `count` positions from `start` on: of the prefix, or of every class in turn."""
        if start + count <= self.prefix:
            return list(range(start, start + count))
        assert start >= self.prefix, "tokens stand in the prefix, or behind it"
        return [row for sequence in self.sequences for row in sequence[start : start + count]]


class DeepPromptEncoder:
    """The class features of fixed prompts as a function of `Changes` of the text tower.

    `rows` are prompts as `coop.clip.prompts` makes them, `class_tokens` the block, if any, at whose input each class
    gets tokens of its own, and `insert` the block and the number of tokens that are inserted there. Tokens of a block
    stand at `start` positions from the left. `share_prefix=False` runs every class's whole prompt, for changes that
    are not the same for all classes (dropout). Raises CoopError for a tower of other than standard residual blocks.
    """

    def __init__(
        self,
        tower: TextTower,
        rows: Sequence[Row],
        pad: int = 0,
        start: int = 1,
        class_tokens: tuple[int, int] | None = None,
        insert: tuple[int, int] | None = None,
        share_prefix: bool = True,
        budget: int = ACTIVATION_BUDGET,
    ) -> None:
        if not tower.blocks or tower.pad_mask is not None:
            raise CoopError(
                "the text tower has blocks of a kind that cannot be changed: choose a backbone with standard "
                "residual blocks and without a padding mask, such as ViT-B-32 or ViT-B-16"
            )
        self.tower, self.start, self.budget = tower, start, budget
        self.causal = tower.attn_mask is not None
        length = tower.context_length
        ends = [len(row) - 1 for row in rows]
        if not tower.shares_prefixes:
            ends = {"last": [length - 1] * len(rows), "first": [0] * len(rows)}.get(tower.pool, ends)
            rows = [(*row, *[pad] * (length - len(row))) for row in rows]
        shared = shared_length(rows) if tower.shares_prefixes and share_prefix else 0
        slots = [list(rows[0][:shared]), *(list(row[shared:]) for row in rows)]
        positions = [list(range(shared)), *(list(range(shared, len(row))) for row in rows)]
        self._base(torch.tensor(list(chain(*slots))), torch.tensor(list(chain(*positions))))
        sequences = _numbered(shared, [len(row) - shared for row in rows])
        self.layouts = {-1: self._layout(sequences, shared)}
        self.ends, self.classes = ends, len(rows)
        if class_tokens is not None:
            block, m = class_tokens
            self._relay(block, m, shared=start, replace=m, copies=len(rows))
        if insert is not None:
            block, m = insert
            self._relay(block, m, shared=shared + m if shared else 0, replace=0, copies=1)
            self.ends = [end + m for end in ends]
        self._frozen: dict[int, Tensor] = {}
        final = self.layouts[max(self.layouts)]
        self.final_rows = self._tensor([row[end] for row, end in zip(final.sequences, self.ends, strict=True)])
        own = self._tensor([end - final.prefix for end in self.ends])
        self.final_mask = None if final.mask is None else final.mask[own][:, None, None]
        self._rows: dict[tuple[int, int], Tensor] = {}

    def __call__(self, changes: Changes) -> Float[Tensor, "c e"]:
        """Return unnormalised class features, differentiable in the tensors of `changes`."""
        start, layers = changes.first, len(self.tower.blocks)
        if start < 0:
            return self.tower.project(self._run(self._embed(changes), changes, 0, layers))
        start = min(start, layers)
        if start not in self._frozen:
            with torch.no_grad():
                x = self._run(self._embed(Changes()), Changes(), 0, start)
                self._frozen[start] = x if start < layers else self.tower.project(x)
        x = self._frozen[start]
        return x if start == layers else self.tower.project(self._run(x, changes, start, layers))

    @property
    def states(self) -> int:
        """The number of token states in the last block."""
        return len(self.layouts[max(self.layouts)].take)

    def _embed(self, changes: Changes) -> Float[Tensor, "n d"]:
        """Return the input of the first block, in the first layout."""
        x = self.tokens
        if changes.context is not None:
            x = x.index_add(0, self.context_rows, changes.context.to(x.dtype)[self.context_slots])
        if changes.embedding is not None:
            x = x + changes.embedding(x.to(self.tower.dtype))
        return x + self.positions

    def _run(self, x: Float[Tensor, "n d"], changes: Changes, start: int, stop: int) -> Tensor:
        """Run some blocks; after the last one of the tower only the pooled states (c, d) are left."""
        size = len(x) * self.tower.width * (stop - start) * WIDTHS_PER_STATE * 4
        recompute = torch.is_grad_enabled() and size > self.budget
        for i in range(start, stop):
            change = changes.blocks.get(i, UNCHANGED)
            since = max(key for key in self.layouts if key <= i)
            layout = self.layouts[since]
            if change.tokens is not None:
                x = self._with_tokens(x, change.tokens.to(x.dtype), since, moved=since == i)
            final = i == len(self.tower.blocks) - 1
            args = (i, x, change, layout, final)
            x = checkpoint(self._block, *args, use_reentrant=False) if recompute else self._block(*args)
        return x

    def _with_tokens(self, x: Tensor, tokens: Tensor, since: int, moved: bool) -> Tensor:
        """Return the states with tokens (m, d) or (c, m, d) at `start`; `moved` into the layout that begins here."""
        if moved:
            return torch.cat([x, tokens.flatten(0, -2)]).index_select(0, self.layouts[since].take)
        key = (since, tokens.shape[-2])
        if key not in self._rows:
            self._rows[key] = self._tensor(self.layouts[since].rows(self.start, tokens.shape[-2]))
        rows, tokens = self._rows[key], tokens.flatten(0, -2)
        return x.index_copy(0, rows, tokens.repeat(len(rows) // len(tokens), 1))

    def _block(self, i: int, x: Tensor, change: Change, layout: _Layout, final: bool) -> Tensor:
        ends = self.final_rows

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(q, k, v, layout, final)

        select = (lambda y: y.index_select(0, ends)) if final else None
        return run_block(self.tower.blocks[i], x, change, attend, self.tower.dtype, select)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: _Layout, final: bool) -> Tensor:
        """Attend from every row, or in the last block from the pooled rows; (n, d) in, (n, d) or (c, d) out."""
        p, heads, c = layout.prefix, self.tower.heads, self.classes

        def own(y: Tensor) -> Tensor:  # (n, d) -> (c, h, s, d/h)
            return y.index_select(0, layout.padded).view(c, -1, heads, y.shape[-1] // heads).transpose(1, 2)

        def shared(y: Tensor) -> Tensor:  # (n, d) -> (1, h, p, d/h)
            return y[:p].view(1, p, heads, y.shape[-1] // heads).transpose(1, 2)

        keys, values = own(k), own(v)
        if p:
            keys = torch.cat([shared(k).expand(c, -1, -1, -1), keys], dim=2)
            values = torch.cat([shared(v).expand(c, -1, -1, -1), values], dim=2)
        if final:
            asking = q.view(c, 1, heads, -1).transpose(1, 2)
            out = F.scaled_dot_product_attention(asking, keys, values, attn_mask=self.final_mask)
            return out.transpose(1, 2).flatten(2)[:, 0]
        out = F.scaled_dot_product_attention(own(q), keys, values, attn_mask=layout.mask)
        out = out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, layout.packed)
        if not p:
            return out
        first = F.scaled_dot_product_attention(shared(q), shared(k), shared(v), is_causal=True)
        return torch.cat([first.transpose(1, 2).flatten(2)[0], out])

    def _relay(self, block: int, count: int, shared: int, replace: int, copies: int) -> None:
        """Add the layout from `block` on, where `count` new tokens (a set for each of `copies`) stand at `start`."""
        former = self.layouts[max(self.layouts)]
        n, start = len(former.take), self.start
        sequences = [
            [*row[:start], *(n + (c % copies) * count + j for j in range(count)), *row[start + replace :]]
            for c, row in enumerate(former.sequences)
        ]
        self.layouts[block] = self._layout(sequences, shared)

    def _layout(self, sources: list[list[int]], shared: int) -> _Layout:
        """Return the layout of sequences given as rows of the former states."""
        own = [len(row) - shared for row in sources]
        sequences, longest = _numbered(shared, own), max(own)
        take = [*sources[0][:shared], *(row for source in sources for row in source[shared:])]
        padded = [row for s in sequences for row in s[shared:] + s[shared : shared + 1] * (longest - len(s) + shared)]
        packed = [c * longest + j for c, count in enumerate(own) for j in range(count)]
        mask = None
        if self.causal:
            mask = torch.ones(longest, shared + longest, dtype=torch.bool, device=self.tower.device).tril(shared)
        return _Layout(shared, sequences, self._tensor(take), self._tensor(padded), self._tensor(packed), mask)

    def _base(self, slots: Tensor, positions: Tensor) -> None:
        """Keep token embeddings, zero where the context goes, positions, and where which context vector goes."""
        tower = self.tower
        context = slots < 0
        self.tokens = wide(tower.token_embedding.detach()[slots.clamp(min=0).to(tower.device)])
        self.tokens[context.to(tower.device)] = 0
        self.positions = wide(tower.positional_embedding.detach()[positions.to(tower.device)])
        self.context_rows = context.nonzero()[:, 0].to(tower.device)
        self.context_slots = (-1 - slots[context]).to(tower.device)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.tower.device)


def _numbered(shared: int, own: Sequence[int]) -> list[list[int]]:
    """Return each class's rows: the shared ones, then its own, which follow those of the class before."""
    sequences, row = [], shared
    for count in own:
        sequences.append([*range(shared), *range(row, row + count)])
        row += count
    return sequences
