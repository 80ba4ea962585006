"""`coop pretrain`: contrastive training of an open_clip model on (image, text) pairs."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.utils.data import DataLoader

from coop.clip.backbone import Backbone, load_backbone
from coop.clip.lit_lite import CHECKPOINT_FILE, CONFIG_FILE
from coop.errors import CoopError
from coop.pretrain.files import image_features, write_model
from coop.pretrain.loop import Schedule, fit
from coop.pretrain.objective import contrastive_loss
from coop.pretrain.pairs import Pair, PairDataset, batch_keys, read_pairs

Batch = tuple[Tensor, Tensor]


def run_pretrain(args: Namespace) -> int:
    """Train, and write a checkpoint that `backbone.pretrained` and plain open_clip take."""
    pairs = read_pairs(args.pairs)
    if args.batch < 2 or len(pairs) < args.batch:
        raise CoopError(f"batch={args.batch} needs 2 or more, and at most the {len(pairs)} pairs of '{args.pairs}'")
    if args.epochs < 1:
        raise CoopError(f"epochs={args.epochs}: train for 1 or more")
    backbone = load_backbone(args.architecture, args.pretrained, args.device)
    schedule = Schedule(
        steps=len(pairs) // args.batch * args.epochs,
        lr=args.lr,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        precision=_precision(args.precision, backbone.device),
        seed=args.seed,
        save_every=args.save_every,
    )
    features = _locked_features(args, backbone, pairs)
    losses = train(backbone, pairs, schedule, args.batch, args.out, features, args.workers)
    write_model(backbone, args.out)
    last = f", last loss {losses[-1]:.3f}" if losses else " already"
    print(f"{schedule.steps} steps done{last}: {args.out / CHECKPOINT_FILE}")
    print(f"use it with backbone.architecture={args.out / CONFIG_FILE} "
          f"backbone.pretrained={args.out / CHECKPOINT_FILE}")  # fmt: skip
    return 0


def train(
    backbone: Backbone,
    pairs: list[Pair],
    schedule: Schedule,
    batch: int,
    folder: Path,
    features: Tensor | None = None,
    workers: int = 0,
) -> list[float]:
    """Train the backbone's model in place, with `features` its text half only; return the losses of the steps run."""
    model, device = backbone.model.train().requires_grad_(True), backbone.device
    if features is not None:
        model.visual.eval().requires_grad_(False)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=True)
    dataset = PairDataset(pairs, transform, backbone.tokenizer, schedule.seed, features)

    def batches(start: int) -> Iterator[Batch]:
        loader = DataLoader(
            dataset,
            batch_sampler=batch_keys(len(pairs), batch, schedule.seed, start),
            num_workers=0 if features is not None else workers,
            pin_memory=device.type == "cuda",
        )
        for images, texts in loader:
            yield images.to(device, non_blocking=True), texts.to(device, non_blocking=True)

    losses = fit(model, batches, contrastive_loss(model, locked=features is not None), schedule, folder, "pre-training")
    model.eval().requires_grad_(False)
    return losses


def _precision(name: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 where the GPU has it, else fp16 with a scaled loss; fp32 on CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _locked_features(args: Namespace, backbone: Backbone, pairs: list[Pair]) -> Tensor | None:
    if args.features is None and not args.lock_image:
        return None
    path = args.features or args.out / "image_features.safetensors"
    return image_features(backbone, pairs, path, given=args.features is not None)
