"""Time one CoOp training step against the plain way, in one process.

    python -m experiments.speed                       # RN50, 100 classes, M = 16, fp32, this machine's CPU
    python -m experiments.speed --device cuda --precision bf16 --classes 1000
    python -m experiments.speed --runs 3 --classes 10 # steps of three seeds taken together, against one by one

The plain way is the original's: 77 positions for every class, by open_clip's own blocks, and the image tower in every
step. Ours shares the prefix between classes, and takes image features from the cache. Weights are random: they do not
change the amount of work. Reported are medians, their ratio, the token states that each way computes, and the share of
the machine's matrix-product rate (measured here, at the size of the tower's largest product) that our step achieves.
Then one step at 1000 classes runs in a process of its own for its peak memory.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from coop.clip.backbone import Backbone, load_backbone
from coop.machine import keep_freed_memory
from coop.methods.coop import PromptLearner
from experiments import speed_encoding, speed_process
from experiments.speed_cocoop import measure, report


@dataclass(frozen=True)
class StepSpeed:
    """What one step of a setting took: median seconds of each way, and how far from the machine's limit ours is."""

    tokens: int  # token states that our step computes
    plain_tokens: int
    gradient_error: float  # relative, between ours and the plain way
    rounding: float | None  # relative, between ours and ours in float32; None in float32
    seconds: dict[str, float]  # ours, plain_text (cached images), plain
    flops: float  # of our step's linear layers
    rate: float  # FLOP/s of a matrix product of the tower's size

    @property
    def share(self) -> float:
        """The share of the matrix-product rate that our step achieves."""
        return self.flops / self.seconds["ours"] / self.rate


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    args = _arguments(arguments)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cocoop:
        print(report(measure(threads=args.threads or torch.get_num_threads())))
    elif args.encoding:
        speed_encoding.main(args.architecture, args.repeats)
    elif args.process:
        speed_process.main(args.repeats)
    elif args.runs:
        _print_runs(args)
    elif args.memory_only:
        print(f"{_peak_memory(args):.2f}")
    else:
        _print_step(args)


def _print_step(args: argparse.Namespace) -> None:
    architecture = args.architecture or "RN50"
    cuda = torch.device(args.device).type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{architecture}, {args.classes} classes, M = {args.n_ctx} {args.ctx_position}, batch {args.batch_size}, ")
    print(f"{args.precision}, {where}")
    step = measure_step(args)
    print(f"token states: {step.tokens} of {step.plain_tokens} ({step.plain_tokens / step.tokens:.1f}x fewer)")
    rounding = f", to float32: {step.rounding:.1e}" if step.rounding is not None else ""
    print(f"relative difference of the gradients: {step.gradient_error:.1e}{rounding}")
    for name, text in (("ours", "our step"), ("plain_text", "plain text, cached images"), ("plain", "plain step")):
        seconds = step.seconds[name]
        print(f"{text:28} {1000 * seconds:9.1f} ms  {seconds / step.seconds['ours']:6.1f}x")
    done = step.flops / step.seconds["ours"]
    print(f"our step computes {done / 1e9:.0f} GFLOP/s, {step.share:.0%} of {step.rate / 1e9:.0f} in matrix products")
    if cuda:
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    command = [sys.executable, "-m", "experiments.speed", "--memory-only", "--classes", "1000", "--device", args.device]
    command += ["--architecture", architecture, "--precision", args.precision, "--n-ctx", str(args.n_ctx)]
    command += ["--ctx-position", args.ctx_position, *(["--class-specific"] * args.class_specific)]
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    print(f"peak resident memory of a process that takes one step at 1000 classes: {peak} GiB")


def _print_runs(args: argparse.Namespace) -> None:
    """Time the steps of several seeds in one pass of the text tower, against one after the other."""
    architecture = args.architecture or "RN50"
    backbone = load_backbone(architecture, None if architecture == "lit_lite" else "random", args.device)
    learner = _learner(backbone, args)
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randn(args.runs, *learner.ctx.shape, generator=generator).mul(0.02).requires_grad_()
    images = F.normalize(torch.randn(args.runs, args.batch_size, backbone.joint_width, generator=generator), dim=-1)
    labels = torch.randint(args.classes, (args.batch_size,), generator=generator)

    def loss(text: Tensor, image: Tensor) -> Tensor:
        return F.cross_entropy(backbone.logit_scale * image @ F.normalize(text, dim=-1).T, labels)

    def one_by_one() -> None:
        for context, image in zip(contexts, images, strict=True):
            loss(learner.encoder(context), image).backward()

    def together() -> None:
        torch.stack([loss(t, i) for t, i in zip(learner.encoder(contexts), images, strict=True)]).sum().backward()

    gradients: list[Tensor] = []
    for way in (together, one_by_one):
        contexts.grad = None
        way()
        assert contexts.grad is not None
        gradients.append(contexts.grad.clone())
    error = _difference(*gradients)
    seconds = _times({"one by one": one_by_one, "together": together}, args.repeats, backbone.device)
    ratio = seconds["one by one"] / seconds["together"]
    print(f"{architecture}, {args.classes} classes, {args.runs} runs, {torch.get_num_threads()} threads: ", end="")
    print(", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items()), end="")
    print(f", {ratio:.2f}x; relative difference of the gradients {error:.1e}")


def measure_step(args: argparse.Namespace) -> StepSpeed:
    """Time one training step in each way; `args` are this module's options."""
    backbone = load_backbone(args.architecture or "RN50", "random", args.device, args.precision)
    learner = _learner(backbone, args)
    images, labels = _batch(backbone, args)
    features = backbone.encode_images(images)

    def loss(text: Tensor, image: Tensor) -> Tensor:
        return F.cross_entropy(backbone.logit_scale * F.normalize(image, dim=-1) @ text.T, labels)

    def ours() -> None:
        loss(learner.class_features(), features).backward()

    def plain_text() -> None:
        loss(plain_class_features(learner), features).backward()

    def plain() -> None:
        loss(plain_class_features(learner), backbone.encode_images(images)).backward()

    gradient = _gradient(loss, features, learner, learner.class_features())
    error = _difference(gradient, _gradient(loss, features, learner, plain_class_features(learner)))
    rounding = None
    if args.precision != "fp32":
        exact = _learner(load_backbone(args.architecture or "RN50", "random", args.device), args)
        rounding = _difference(gradient, _gradient(loss, features, exact, exact.class_features()))
    if backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _times({"ours": ours, "plain_text": plain_text, "plain": plain}, args.repeats, backbone.device)
    tokens, plain_tokens = learner.encoder.tokens, backbone.tower.context_length * args.classes
    return StepSpeed(tokens, plain_tokens, error, rounding, seconds, _step_flops(learner), _matrix_rate(backbone))


def plain_class_features(learner: PromptLearner) -> Tensor:
    """Return what `learner.class_features()` does, by open_clip's blocks over the full length of every class."""
    backbone = learner.backbone
    tower = backbone.tower
    rows = backbone.learned_rows(learner.class_names, learner.n_ctx, learner.ctx_position, learner.class_specific)
    slots = torch.tensor([list(row) + [0] * (tower.context_length - len(row)) for row in rows])
    ends = torch.tensor([len(row) - 1 for row in rows], device=tower.device)
    table = torch.cat([backbone.token_embedding.float(), learner.ctx.flatten(0, -2).flip(0)])
    x = table[slots.to(tower.device) % len(table)] + tower.positional_embedding.float()
    x = tower.transformer(x.to(tower.dtype), attn_mask=tower.attn_mask)
    return F.normalize(tower.project(x[torch.arange(len(x), device=x.device), ends]), dim=-1)


def _learner(backbone: Backbone, args: argparse.Namespace) -> PromptLearner:
    step = max(len(IMAGENET_CLASSNAMES) // args.classes, 1)
    names = IMAGENET_CLASSNAMES[::step][: args.classes]
    generator = torch.Generator().manual_seed(1)
    return PromptLearner(backbone, names, args.n_ctx, args.ctx_position, args.class_specific, generator=generator)


def _batch(backbone: Backbone, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = backbone.model.visual.image_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    images = torch.randn(args.batch_size, 3, height, width, generator=generator)
    labels = torch.randint(args.classes, (args.batch_size,), generator=generator)
    return images.to(backbone.device), labels.to(backbone.device)


def _gradient(
    loss: Callable[[Tensor, Tensor], Tensor], features: Tensor, learner: PromptLearner, text: Tensor
) -> Tensor:
    learner.ctx.grad = None
    loss(text, features).backward()
    assert learner.ctx.grad is not None
    return learner.ctx.grad.clone()


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _times(ways: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each way, run in turn so that a drift of the machine meets all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first does not count
        for name, way in ways.items():
            times = 3 if name == "ours" else 1
            start = time.perf_counter()
            for _ in range(times):
                way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append((time.perf_counter() - start) / times)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _step_flops(learner: PromptLearner) -> float:
    """Return the floating-point operations of the tower's linear layers, forward and backward to activations."""
    tower, tokens = learner.backbone.tower, learner.encoder.tokens
    return 2 * 2.0 * tokens * 12 * tower.width**2 * tower.layers


def _matrix_rate(backbone: Backbone) -> float:
    """Return the rate, in FLOP/s, of a product of 512 token states with the tower's widest weights."""
    d = backbone.width
    a = torch.randn(512, d, device=backbone.device, dtype=backbone.dtype)
    b = torch.randn(d, 4 * d, device=backbone.device, dtype=backbone.dtype)

    def product() -> None:
        for _ in range(50):
            a @ b

    seconds = _times({"product": product}, 5, backbone.device)["product"]
    return 50 * 2 * 512 * d * 4 * d / seconds


def _peak_memory(args: argparse.Namespace) -> float:
    backbone = load_backbone(args.architecture or "RN50", "random", args.device, args.precision)
    _learner(backbone, args).class_features().sum().backward()
    return peak_resident_memory()


def peak_resident_memory() -> float:
    """Return this process's peak resident memory in GiB; on Linux without that of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def step_arguments(**changed: object) -> argparse.Namespace:
    """Return this module's default options with some of them changed, for `measure_step`."""
    return argparse.Namespace(**{**vars(_arguments([])), **changed})


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.speed", description="one training step, timed")
    parser.add_argument("--architecture", help="RN50; --encoding: lit_lite, RN50 and ViT-B-32")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--n-ctx", type=int, default=16)
    parser.add_argument("--ctx-position", default="end")
    parser.add_argument("--class-specific", action="store_true")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="of the CPU; all unless given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cocoop", action="store_true", help="time CoCoOp's step instead (experiments.speed_cocoop)")
    parser.add_argument("--encoding", action="store_true", help="time image encoding (experiments.speed_encoding)")
    parser.add_argument("--process", action="store_true", help="time thread and memory settings (speed_process)")
    parser.add_argument("--runs", type=int, help="time the steps of so many seeds together and one by one instead")
    parser.add_argument("--memory-only", action="store_true", help="print the peak memory of one step, in GiB")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
