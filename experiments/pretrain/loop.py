"""Training by steps: AdamW, warm-up and cosine, mixed precision, and checkpoints from which a run goes on exactly."""

import errno
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import cos, inf, pi
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coop.clip.backbone import check_finite
from coop.errors import CoopError, first_line, unknown
from coop.io import atomic_write, track

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

    def __post_init__(self) -> None:
        """Refuse values that no training can use, NaN among them; raises CoopError."""
        for name, least in (("steps", 1), ("warmup", 0), ("save_every", 1), ("seed", 0), ("cooldown", 0)):
            if getattr(self, name) < least:
                raise CoopError(f"{name}={getattr(self, name)}: give {least} or more")
        if self.seed >= 2**32:
            raise CoopError(f"seed={self.seed}: give one below 2^32, {2**32}")
        if not 0 < self.lr < inf:
            raise CoopError(f"lr={self.lr}: give a finite number above 0")
        if not 0 <= self.weight_decay < inf:
            raise CoopError(f"weight_decay={self.weight_decay}: give a finite number, 0 or more")
        if self.precision not in DTYPES:
            raise unknown("precision", self.precision, DTYPES)

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
    """Write everything that going on needs, atomically."""
    state = {
        "step": step,
        "schedule": asdict(schedule),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    with atomic_write(folder / CHECKPOINT) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's writer does not raise the system's own error
            raise OSError(errno.EIO, "cannot write the checkpoint (is the disk full?)", str(temporary)) from error


def _resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
) -> int:
    """Load the folder's checkpoint, if any, and return the step to go on with; remove what a killed run left behind.

    Raises CoopError for a checkpoint of another schedule or architecture, and for a file that is none.
    """
    for leftover in (*folder.glob(f".{CHECKPOINT}.*.tmp"), *folder.glob(f"{CHECKPOINT}.partial")):
        leftover.unlink(missing_ok=True)
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    state = read_checkpoint(path, next(model.parameters()).device)
    changed = [name for name, value in asdict(schedule).items() if state["schedule"].get(name) != value]
    changed = [name for name in changed if name != "save_every"]
    if changed:
        then = ", ".join(f"{name}={str(state['schedule'].get(name))[:40]}" for name in changed)
        raise CoopError(f"'{path}' is from a run with {then}: train with these, or into another folder")
    if not 0 <= state["step"] <= schedule.steps:
        raise CoopError(f"'{path}' is at step {state['step']} of {schedule.steps}: it is damaged, delete it")
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CoopError(f"'{path}' is of another architecture: train it on, or train into another folder") from error
    for name, tensor in state["model"].items():
        check_finite(tensor, f"'{path}' is damaged, delete it: {name} holds NaN or infinite values")
    try:
        moments = state["optimizer"]["state"]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            for name in ("exp_avg", "exp_avg_sq") if moments else ():
                if optimizer.state[parameter][name].shape != parameter.shape:
                    raise ValueError(name)
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CoopError(f"'{path}' has no usable state of the optimiser: it is damaged, delete it") from error
    return int(state["step"])


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what `_save` wrote; nothing in the file is executed. Raises CoopError for any other file."""
    kinds = {"step": int, "schedule": dict, "model": dict, "optimizer": dict, "scaler": dict}
    try:
        with warnings.catch_warnings(action="ignore"):  # about other pickle protocols
            state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        raise CoopError(
            f"'{path}' is no checkpoint of tensors and numbers ({first_line(error)}): delete it to start again"
        ) from error
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise CoopError(f"'{path}' is no checkpoint of this training: delete it to start again")
    return state
