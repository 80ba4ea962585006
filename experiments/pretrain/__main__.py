"""Contrastive pre-training of an open_clip model on (image, text) pairs.

    python -m experiments.pretrain pairs.csv --out FOLDER --architecture ViT-B-32

Writes a checkpoint and a configuration that `backbone=custom` and plain open_clip take. The same command goes on from
the last checkpoint where a run was stopped, and ends with the weights of one that was not.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from coop.clip.backbone import RANDOM, load_backbone
from coop.clip.lit_lite import CHECKPOINT_FILE, CONFIG_FILE
from coop.config import MAX_WORKERS
from coop.errors import CoopError, explanation
from experiments.pretrain.loop import DTYPES, Schedule
from experiments.pretrain.model import image_features, train, write_model
from experiments.pretrain.pairs import read_pairs


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 where the system refuses (disk, permission), 2 for a user's mistake."""
    args = arguments().parse_args(words)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with FileLock(args.out / ".lock", blocking=False):
            return pretrain(args)
    except Timeout:
        return fail(f"another process trains into {args.out}: wait for it, or give another --out", 2)
    except (Exception, KeyboardInterrupt) as error:
        code, text = explanation(error)
        if not text:
            raise
        return fail(text, code)


def fail(message: str, code: int) -> int:
    """Print one sentence on standard error and return the exit code."""
    print(f"pretrain: {' '.join(message.split())[:1000]}", file=sys.stderr)
    return code


def arguments() -> ArgumentParser:
    """Return the command's arguments."""
    parser = ArgumentParser(
        prog="python -m experiments.pretrain",
        description="contrastive pre-training of an open_clip model on (image, text) pairs",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("pairs", type=Path, help="CSV with the columns image and text, or folder with x.txt by x.jpg")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model; a run that stopped goes on")
    parser.add_argument("--architecture", default="ViT-B-32", help="open_clip's name, or its JSON config file")
    parser.add_argument("--pretrained", help="start from this tag or checkpoint file, not from random weights")
    parser.add_argument("--lock-image", action="store_true", help="train the text tower only, on cached image features")
    parser.add_argument("--features", type=Path, help="safetensors file of image features, in the pairs' order")
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256, help="pairs per step: each is contrasted with the others")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--precision", choices=["auto", *DTYPES], default="auto", help="auto: mixed on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=1, help="of batches, captions and augmentation")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    return parser


def pretrain(args: Namespace) -> int:
    """Train and write the model; everything that needs no model is checked first."""
    pairs = read_pairs(args.pairs)
    if args.batch < 2 or len(pairs) < args.batch:
        raise CoopError(f"--batch {args.batch} needs 2 or more, and at most the {len(pairs)} pairs of '{args.pairs}'")
    if args.epochs < 1:
        raise CoopError(f"--epochs {args.epochs}: give 1 or more")
    if not 0 <= args.workers <= MAX_WORKERS:
        raise CoopError(f"--workers {args.workers}: give 0 to {MAX_WORKERS}")
    schedule = Schedule(
        steps=len(pairs) // args.batch * args.epochs,
        lr=args.lr,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        precision=choose_precision(args.precision, args.device),
        seed=args.seed,
        save_every=args.save_every,
    )
    backbone = load_backbone(args.architecture, args.pretrained or RANDOM, args.device)
    features = None
    if args.features is not None or args.lock_image:
        path = args.features or args.out / "image_features.safetensors"
        features = image_features(backbone, pairs, path, given=args.features is not None)
    losses = train(backbone, pairs, schedule, args.batch, args.out, features, args.workers)
    write_model(backbone, args.out)
    last = f", last loss {losses[-1]:.3f}" if losses else " already"
    print(f"{schedule.steps} steps done{last}: {args.out / CHECKPOINT_FILE}")
    print(f"use it with backbone=custom backbone.architecture={args.out / CONFIG_FILE} "
          f"backbone.pretrained={args.out / CHECKPOINT_FILE}")  # fmt: skip
    return 0


def choose_precision(name: str, device: str) -> str:
    """Resolve `auto`: bf16 where the GPU has it, else fp16 with a scaled loss; fp32 on CPU."""
    if name != "auto":
        return name
    if device == "cpu" or not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


if __name__ == "__main__":
    sys.exit(main())
