"""The text tower's training: a batch of prompts, their features, and the loss against the image side's targets."""

import random
from collections.abc import Iterator
from itertools import count

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from coop.clip.towers import TextTower
from experiments.lit_lite.texts import Concept, Prompt, draw_prompt, tokenizer

CHUNKS = 4  # a batch is encoded in so many parts of similar length, to save padding


def encode_prompts(
    tower: TextTower, prompts: list[Prompt], generator: torch.Generator, std: float = 0.02
) -> Float[Tensor, "n e"]:
    """Return the prompts' text features, not normalised, with random vectors ~ N(0, std) in their first slots."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    size = -(-len(order) // CHUNKS)
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    features = torch.cat([_encode_chunk(tower, [prompts[i] for i in part], generator, std) for part in parts])
    places = torch.empty(len(order), dtype=torch.long)
    places[torch.tensor(order)] = torch.arange(len(order))
    return features[places]


def _encode_chunk(
    tower: TextTower, prompts: list[Prompt], generator: torch.Generator, std: float
) -> Float[Tensor, "n e"]:
    """Encode prompts padded to the longest: under the causal mask, what follows EOT does not matter."""
    sot, eot = tokenizer().sot_token_id, tokenizer().eot_token_id
    length = max(len(prompt.ids) for prompt in prompts) + 2
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    is_random = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.ids) + 2] = torch.tensor([sot, *prompt.ids, eot])
        is_random[row, 1 : 1 + prompt.n_random] = True
    assert tower.attn_mask is not None
    x = F.embedding(ids, tower.token_embedding)
    noise = torch.randn(x.shape, generator=generator) * std
    x = torch.where(is_random[..., None], noise, x) + tower.positional_embedding[:length]
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward pass is slow on short sequences on CPU
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    last = torch.tensor([len(prompt.ids) + 1 for prompt in prompts])
    return tower.project(x[torch.arange(len(prompts)), last])


class Lessons:
    """Batches drawn by step number, and their loss."""

    def __init__(
        self,
        tower: TextTower,
        concepts: list[Concept],
        targets: Float[Tensor, "n e"],
        frequency: Float[Tensor, " n"],
        batch: int,
        seed: int,
        scale: float = 30.0,
    ) -> None:
        """Hold normalised `targets` for each concept, drawn in proportion to `frequency`, none twice in a batch."""
        self.tower, self.concepts, self.targets, self.frequency = tower, concepts, targets, frequency
        self.batch, self.seed, self.scale = batch, seed, scale
        self.contrastive = ClipLoss()

    def steps_from(self, start: int) -> Iterator[int]:
        """Yield step numbers: a step's batch is drawn from its number."""
        return count(start)

    def loss(self, step: int) -> Tensor:
        """Return the loss of a step's batch: symmetric contrastive, and how far the features are from the targets."""
        rng = random.Random(f"{self.seed}-{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        chosen = torch.multinomial(self.frequency, self.batch, generator=generator)
        prompts = [draw_prompt(self.concepts[i], rng) for i in chosen.tolist()]
        texts = F.normalize(encode_prompts(self.tower, prompts, generator), dim=-1)
        images = self.targets[chosen]
        cosine = (texts * images).sum(dim=-1)
        return self.contrastive(images, texts, self.scale) + 5 * (1 - cosine).mean()
