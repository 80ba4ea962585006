"""The arguments of `coop pretrain`, without the libraries that it needs: `coop --help` need not wait for them."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp16")


def add_pretrain_command(subparsers: Any) -> None:
    """Add `pretrain` to an argparse sub-parser; it sets `run`, a function of the arguments."""
    text = "contrastive pre-training of an open_clip model on (image, text) pairs"
    parser: ArgumentParser = subparsers.add_parser(
        "pretrain", help=text, description=text, formatter_class=ArgumentDefaultsHelpFormatter
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
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help="auto: mixed on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--seed", type=int, default=1, help="of batches, captions and augmentation")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.set_defaults(run=_run)


def _run(args: Namespace) -> int:
    from coop.pretrain.command import run_pretrain

    return run_pretrain(args)
