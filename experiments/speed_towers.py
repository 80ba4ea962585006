"""Time a training step of the methods inside the towers against the released way, in one process.

    python -m experiments.speed_towers                     # ViT-B/16 at half its width and depth, this machine's CPU
    python -m experiments.speed_towers --architecture ViT-B-16 --device cuda --precision bf16

The released way runs 77 positions of every class and the image tower from the pixels on, in every step, by open_clip's
own blocks; TCP's runs the image tower too. Ours shares the prefix between classes, and reads from memory what is frozen
below the first change. Both ways' losses and gradients are compared first. Weights are random: they do not change the
amount of work. Times are medians of steps taken in turn, forward and backward, without the optimiser. Memory is what a
step keeps from the forward pass for the backward one, the weights left out.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import IMAGENET_CLASSNAMES
from tabulate import tabulate
from torch import Tensor, nn

from coop.clip.backbone import Backbone, load_backbone
from coop.clip.towers import Change, Changes
from coop.features import Samples
from coop.machine import keep_freed_memory
from coop.methods import METHODS
from coop.methods.base import Classes
from coop.methods.tower_method import FrozenRows, TowerMethod
from coop.options import OPTIONS
from experiments.speed import _times

HALF_VIT_B16: dict[str, Any] = {  # width and depth; 197 image tokens, so that towers weigh as in ViT-B/16
    "embed_dim": 256,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 384, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6},
}
BATCHES = {"maple": 4, "ivlp": 4, "promptsrc": 4, "clip_lora": 32, "tcp": 32}
BARS = {  # asked of the text part and of the step at 100 classes
    "maple": (8.0, 3.0), "ivlp": (8.0, 3.0), "promptsrc": (8.0, 3.0), "clip_lora": (None, 2.0), "tcp": (None, 12.0),
}  # fmt: skip


class PlainTowers:
    """A method's changed towers as released: hooks on open_clip's own modules, full sequences, everything each step."""

    def __init__(self, method: TowerMethod) -> None:
        self.method, self.model = method, method.backbone.model
        tower = method.backbone.tower
        self.text = tower.transformer.resblocks
        self.image = self.model.visual.transformer.resblocks
        sequences = method.prompts.layouts[-1].sequences
        length = tower.context_length
        tokens, positions = method.prompts.tokens, tower.positional_embedding
        rows = [tokens[torch.tensor(row)] for row in sequences]
        self.base = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows]) + positions
        self.ends = torch.tensor([len(row) - 1 for row in sequences], device=tower.device)

    def class_features(self) -> Tensor:
        """Return normalised class features."""
        method, changes = self.method, self.method.text_changes()
        x, tower = self.base, method.backbone.tower
        if changes.context is not None:
            m = len(changes.context)
            context = (changes.context + tower.positional_embedding[1 : 1 + m]).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], context, x[:, 1 + m :]], dim=1)
        with changed(self.text, changes, start=1):
            x = tower.transformer(x.to(tower.dtype), attn_mask=tower.attn_mask)
        return F.normalize(tower.project(x[torch.arange(len(x), device=x.device), self.ends]), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Return normalised image features."""
        visual, changes = self.model.visual, self.method.image_changes()
        if changes.context is None:
            with changed(self.image, changes, start=1):
                return F.normalize(visual(images), dim=-1)
        tokens = changes.context.to(images.dtype).expand(len(images), -1, -1)
        hook = visual.ln_pre.register_forward_pre_hook(lambda _, args: (torch.cat([args[0], tokens], dim=1),))
        try:
            with changed(self.image, changes, start=-len(changes.context)):
                return F.normalize(visual(images), dim=-1)
        finally:
            hook.remove()

    def loss(self, images: Tensor, labels: Tensor, text_only: bool = False) -> Tensor:
        """Return the method's loss."""
        method: Any = self.method
        sources: dict[str, Callable[..., Tensor]] = {"class_features": self.class_features}
        if not text_only and method.images is not None:
            sources["image_features"] = lambda inputs: self.image_features(images)
            sources["frozen_features"] = lambda inputs: F.normalize(method.backbone.encode_images(images), dim=-1)
        with replaced(method, sources):
            return method.loss(images, labels)


@contextmanager
def replaced(method: Any, functions: dict[str, Callable[..., Tensor]]) -> Any:
    """Give a method other functions for a while."""
    for name, function in functions.items():
        setattr(method, name, function)
    try:
        yield
    finally:
        for name in functions:
            delattr(method, name)


@contextmanager
def changed(blocks: nn.ModuleList, changes: Changes, start: int) -> Any:
    """Apply changes of tokens and low-rank updates to open_clip's blocks, by hooks, for a while."""
    with ExitStack() as stack:
        for i, change in changes.blocks.items():
            if change.tokens is not None:
                stack.enter_context(hook(blocks[i], tokens_hook(change.tokens, start)))
            if change.low_rank:
                stack.enter_context(replaced_forward(blocks[i], change))
        yield


@contextmanager
def hook(module: nn.Module, function: Callable[..., Any]) -> Any:
    """Register a forward pre-hook for a while."""
    handle = module.register_forward_pre_hook(function)
    try:
        yield
    finally:
        handle.remove()


def tokens_hook(tokens: Tensor, start: int) -> Callable[..., Any]:
    """Return a hook that writes tokens over those from `start` on (from the end, if negative)."""
    m = tokens.shape[-2]

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        new = tokens.to(x.dtype).expand(len(x), -1, -1)
        stop = x.shape[1] + start + m if start < 0 else start + m
        return (torch.cat([x[:, : stop - m], new, x[:, stop:]], dim=1), *args[1:])

    return replace


@contextmanager
def replaced_forward(block: Any, change: Change) -> Any:
    """Let a block attend with separate q, k, v and their low-rank updates, as the released layers do."""
    attention, heads = block.attn, block.attn.num_heads

    def attend(q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Tensor | None = None) -> Tensor:
        projected: list[Tensor] = []
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            y = F.linear(q_x, weight, bias)
            y = y + change.low_rank[name](q_x) if name in change.low_rank else y
            projected.append(y.unflatten(-1, (heads, -1)).transpose(1, 2))
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        q, k, v = projected
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return attention.out_proj(out)

    block.attention = attend
    try:
        yield
    finally:
        del block.attention


def made(name: str, backbone: Backbone, classes: Classes) -> Any:
    """Return a method whose settings fit the tower: depths and layers in proportion to 12 blocks."""
    layers = min(backbone.tower.layers, len(backbone.model.visual.transformer.resblocks))

    def part(blocks: int) -> int:
        return max(round(blocks * layers / 12), 1)

    settings: dict[str, dict[str, Any]] = {
        "maple": {"depth": part(9)},
        "ivlp": {"depth_text": layers, "depth_image": layers},
        "promptsrc": {"depth_text": part(9), "depth_image": part(9)},
        "clip_lora": {"place": f"{layers // 2}-{layers - 1}", "dropout": 0.0},
        "tcp": {"layer": part(8)},
    }
    return METHODS[name](backbone, classes, OPTIONS[name](**settings[name]))


def kept_memory(step: Callable[[], None], backbone: Backbone) -> float:
    """Return the MiB that autograd keeps between the forward and the backward pass of a step, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 2**20


def measure(name: str, backbone: Backbone, args: argparse.Namespace) -> list[Any]:
    """Return a row of the table: the method, its batch, milliseconds, ratios, MiB, and how far gradients differ."""
    every = max(len(IMAGENET_CLASSNAMES) // args.classes, 1)
    classes = Classes(tuple(IMAGENET_CLASSNAMES[::every][: args.classes]))
    method, batch = made(name, backbone, classes), BATCHES[name]
    generator = torch.Generator().manual_seed(1)
    height, width = backbone.model.visual.image_size
    images = torch.randn(batch, 3, height, width, generator=generator).to(backbone.device, backbone.dtype)
    labels = torch.randint(args.classes, (batch,), generator=generator).to(backbone.device)
    rows = backbone.encode_images(images) if method.images is None else images
    method.frozen_rows = FrozenRows(Samples(labels, rows, rows.new_empty(0, *rows.shape)))
    numbers = rows if method.images is None else method.frozen_rows.numbers.test_view
    plain, parameters = PlainTowers(method), list(method.parameters().values())

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            loss().backward()

        return run

    def gradient() -> Tensor:
        return torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None])

    def released() -> Tensor:
        if method.images is None:
            return plain.loss(backbone.encode_images(images), labels)
        return plain.loss(images, labels)

    weight = torch.randn(args.classes, backbone.joint_width, generator=generator).to(backbone.device)
    ways = {
        "ours": step(lambda: method.loss(numbers, labels)),
        "released": step(released),
        "our text": step(lambda: (method.class_features() * weight).sum()),
        "plain text": step(lambda: (plain.class_features() * weight).sum()),
    }
    found, memory = [], []
    for name_of_way in ("released", "ours"):
        memory.append(kept_memory(ways[name_of_way], backbone))
        found.append(gradient())
    difference = float((found[1] - found[0]).norm() / found[0].norm())
    times = _times(ways, args.repeats, backbone.device)
    text, whole = times["plain text"] / times["our text"], times["released"] / times["ours"]
    milliseconds = [1000 * times[key] for key in ("plain text", "our text", "released", "ours")]
    bar_text, bar_step = BARS[name]
    asked = f"{f'text {bar_text:.0f}x, ' if bar_text else ''}step {bar_step:.0f}x"
    return [name, batch, *milliseconds, text, whole, asked, *memory, f"{difference:.0e}"]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m experiments.speed_towers", description="steps, timed")
    parser.add_argument(
        "--architecture", help="an open_clip name or JSON; ViT-B/16 at half width and depth unless given"
    )
    parser.add_argument("--methods", nargs="+", default=list(BARS), choices=list(BARS))
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="of the CPU; all unless given")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "half_vit_b16.json"
        config.write_text(json.dumps(HALF_VIT_B16))
        backbone = load_backbone(args.architecture or str(config), "random", args.device, args.precision)
    table = [measure(name, backbone, args) for name in args.methods]
    headers = [
        "method", "batch", "text, released", "ours, ms", "step, released", "ours, ms", "text x", "step x", "asked",
        "kept, released", "ours, MiB", "gradients differ",
    ]  # fmt: skip
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.architecture or 'half ViT-B/16'}, {args.classes} classes, {args.precision}, {where}")
    print(tabulate(table, headers, floatfmt=".1f", disable_numparse=[8, 11]))


if __name__ == "__main__":
    main()
