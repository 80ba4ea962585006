"""Training by steps: AdamW, warm-up and cosine, mixed precision, and checkpoints from which a run goes on exactly."""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coop.errors import CoopError
from coop.io import track

CHECKPOINT = "checkpoint.pt"
Batch = TypeVar("Batch")
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; CLIP's own constants where the paper gives them (section 2.5, table 18)."""

    steps: int
    lr: float = 5e-4
    warmup: int = 100  # steps of linear growth to lr
    weight_decay: float = 0.2
    beta2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 1
    save_every: int = 200  # steps
    horizon: int | None = None  # where the cosine would reach 0, if not at the last step
    cooldown: int = 0  # steps of linear decay to 0 at the end, for a horizon beyond it

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step (0-based): linear growth, then half a cosine, ended by the cooldown."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, (self.horizon or self.steps) - self.warmup)
        cooled = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        return self.lr * 0.5 * (1 + cos(pi * done)) * cooled


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    loss: Callable[[Batch], Tensor],
    schedule: Schedule,
    folder: Path,
    description: str = "training",
) -> list[float]:
    """Minimise `loss(batch)` over the model's trainable parameters; return the losses of the steps run in this call.

    `batches(start)` yields the batch of step `start` and those after it. A step's randomness comes from (seed, step)
    alone: so should its batch, and torch's generators, on which dropout relies, are set so for the step's duration. A
    run that goes on from `folder`'s checkpoint therefore ends with the weights of one that was never interrupted.
    """
    device = next(model.parameters()).device
    optimizer = _optimizer(model, schedule)
    scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "fp16")
    start = _resume(folder, model, optimizer, scaler, schedule)
    losses: list[float] = []
    steps = zip(range(start, schedule.steps), batches(start), strict=False)
    for step, batch in track(steps, description, total=schedule.steps - start):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(schedule.seed * 1_000_003 + step)
            dtype = DTYPES[schedule.precision]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                value = loss(batch)
        losses.append(_step(model, value, optimizer, scaler, schedule, step))
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            _save(folder, model, optimizer, scaler, schedule, step + 1)
    return losses


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """Return AdamW that does not decay gains, biases and the logit scale (CLIP, section 2.5)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, schedule.beta2), eps=schedule.eps)


def _step(
    model: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
    step: int,
) -> float:
    """Take one optimiser step and return the loss; a loss that is not a number ends the run."""
    value = loss.item()
    if value != value or value in (float("inf"), float("-inf")):
        raise CoopError(f"the loss is {value} at step {step}: lower lr ({schedule.lr}), or train with precision fp32")
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    return value


def _save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
    step: int,
) -> None:
    """Write everything that going on needs, under another name first: a checkpoint is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "schedule": asdict(schedule),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    partial = folder / f"{CHECKPOINT}.partial"
    torch.save(state, partial)
    os.replace(partial, folder / CHECKPOINT)


def _resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
) -> int:
    """Load the folder's checkpoint, if any, and return the step to go on with."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    device = next(model.parameters()).device
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    changed = [name for name, value in asdict(schedule).items() if state["schedule"].get(name) != value]
    changed = [name for name in changed if name != "save_every"]
    if changed:
        then = ", ".join(f"{name}={state['schedule'].get(name)}" for name in changed)
        raise CoopError(f"'{path}' is from a run with {then}: train with these, or into another folder")
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CoopError(f"'{path}' is of another architecture: train it on, or train into another folder") from error
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return int(state["step"])
