"""The frozen text tower over full padded sequences, by its own blocks: for towers whose tokens look at everything."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coop.clip.encode import PromptEncoder, TextEncoder, activation_budget, context_tables, embedded_slots
from coop.clip.prompts import Row
from coop.clip.towers import TextTower


def prompt_encoder(tower: TextTower, rows: Sequence[Row], pad: int, budget: int | None = None) -> TextEncoder:
    """Return the encoder that the tower allows: of shared prefixes, or of full sequences."""
    return PromptEncoder(tower, rows, budget) if tower.shares_prefixes else FullEncoder(tower, rows, pad, budget)


@dataclass(frozen=True)
class _Chunk:
    """Some classes as padded sequences."""

    base: Tensor  # (c * l, d) token + positional embedding; positional only where the context goes
    ctx_rows: Tensor  # rows that hold a context vector
    ctx_slots: Tensor  # which row of the context table each holds
    ids: Tensor  # (c, l) token ids, with a stand-in where the context goes
    pooled: Tensor  # (c,) position whose state is the class's


class FullEncoder:
    """The class features of fixed prompts as a function of the context; any tower, 77 positions for every class.

    `pad` is the tokenizer's padding id; `budget` as in `coop.clip.encode.PromptEncoder`.
    """

    def __init__(self, tower: TextTower, rows: Sequence[Row], pad: int, budget: int | None = None) -> None:
        self.tower = tower
        length, budget = tower.context_length, activation_budget(tower.device) if budget is None else budget
        size = max(budget // (18 * tower.width * tower.layers * 4 * length), 1)  # classes: 18 widths a token are kept
        self.chunks = [_chunk(tower, rows[start : start + size], pad) for start in range(0, len(rows), size)]
        self.tokens = len(rows) * length

    def __call__(self, context: Float[Tensor, "*b k d"] | None = None) -> Float[Tensor, "*b c e"]:
        """Return unnormalised class features, in float32, for a context table (k, d) or one per image (b, k, d)."""
        tables = context_tables(self.tower, context).float()
        recompute = len(self.chunks) * len(tables) > 1 and tables.requires_grad and torch.is_grad_enabled()
        states = []
        for table in tables:
            runs = [
                checkpoint(self._run, chunk, table, use_reentrant=False) if recompute else self._run(chunk, table)
                for chunk in self.chunks
            ]
            states.append(torch.cat(runs))
        features = self.tower.project(torch.stack(states))
        return features if context is not None and context.ndim == 3 else features[0]

    def _run(self, chunk: _Chunk, table: Float[Tensor, "k d"]) -> Float[Tensor, "c d"]:
        x = chunk.base.index_add(0, chunk.ctx_rows, table[chunk.ctx_slots])
        return self.tower.run_full(x.view(*chunk.ids.shape, -1), chunk.ids, chunk.pooled)


def _chunk(tower: TextTower, rows: Sequence[Row], pad: int) -> _Chunk:
    length = tower.context_length
    stand_in = next(i for i in (0, 1, 2) if i != pad)  # any token but padding: masks and pooling look at ids
    slots = torch.tensor([list(row) + [pad] * (length - len(row)) for row in rows])
    ends = {"last": [length - 1] * len(rows), "first": [0] * len(rows)}.get(tower.pool, [len(row) - 1 for row in rows])
    ids = torch.where(slots < 0, stand_in, slots).to(tower.device)
    base = embedded_slots(tower, slots.flatten(), torch.arange(length).repeat(len(rows)))
    return _Chunk(*base, ids, torch.tensor(ends, device=tower.device))
