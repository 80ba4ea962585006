"""Layers whose initial weights come from a generator of their own."""

import torch
from torch import nn


@torch.no_grad()
def linear(inputs: int, outputs: int, bias: bool = True, *, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with PyTorch's default distribution: uniform within 1/sqrt(inputs)."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    bound = inputs**-0.5
    for parameter in layer.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
    return layer
