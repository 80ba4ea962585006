"""Tip-Adapter's two numbers: what they do to the logits, and the search for the best pair over a whole grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from coop.errors import CoopError
from coop.progress import track

ELEMENTS = 2**24  # numbers in one intermediate tensor


@dataclass(frozen=True)
class Pair:
    """`alpha` weighs the cache against the prompts, `beta` sharpens its similarities; how well they did."""

    alpha: float
    beta: float
    accuracy: float
    cross_entropy: float


def geometric(low: float, high: float, steps: int) -> list[float]:
    """Return `steps` numbers from `low` to `high`, each the same multiple of the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def cache_logits(
    affinity: Float[Tensor, "n k"], values: Float[Tensor, "k c"], betas: Float[Tensor, " g"]
) -> Float[Tensor, "g n c"]:
    """Return exp(-beta (1 - affinity)) @ values for each beta."""
    return torch.exp(-betas[:, None, None] * (1 - affinity)) @ values


@torch.no_grad()
def search(
    prompt_logits: Float[Tensor, "n c"],
    affinity: Float[Tensor, "n k"],
    values: Float[Tensor, "k c"],
    labels: Int[Tensor, " n"],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> Pair:
    """Return the pair with the highest accuracy, among equals the lowest cross-entropy; the first of equals in both.

    All pairs are computed together, in blocks of `ELEMENTS` numbers. Raises CoopError if there is nothing to score on.
    """
    if not len(labels):
        raise CoopError("searching alpha and beta needs validation images, and there are none: give alpha and beta")
    device = prompt_logits.device
    all_alphas, all_betas = torch.tensor(alphas, device=device), torch.tensor(betas, device=device)
    labels = labels.to(device)
    n, c = prompt_logits.shape
    beta_blocks = all_betas.split(max(ELEMENTS // affinity.numel(), 1))
    correct, losses = [], []
    for block in track(beta_blocks, "searching alpha and beta", len(beta_blocks)):
        for cached in cache_logits(affinity, values, block):
            for some in all_alphas.split(max(ELEMENTS // (n * c), 1)):
                logits = prompt_logits + some[:, None, None] * cached
                correct.append((logits.argmax(dim=2) == labels).sum(dim=1))
                true = logits.gather(2, labels.expand(len(some), -1)[:, :, None])[:, :, 0]
                losses.append((logits.logsumexp(dim=2) - true).mean(dim=1))
    hits, cross_entropy = torch.cat(correct), torch.cat(losses)
    best = int(torch.where(hits == hits.max(), cross_entropy, torch.inf).argmin())
    b, a = divmod(best, len(alphas))
    return Pair(alphas[a], betas[b], int(hits[best]) / n, float(cross_entropy[best]))


def one_hot(labels: Int[Tensor, " k"], n_classes: int) -> Float[Tensor, "k c"]:
    """Return the cache's values."""
    return F.one_hot(labels, n_classes).float()
