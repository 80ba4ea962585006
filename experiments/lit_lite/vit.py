"""Distil a small ViT from lit_lite, so that methods which need visual tokens can be tried without a download.

    python -m experiments.lit_lite.vit IMAGES [IMAGES ...] --output FOLDER [--steps 2000]

The text tower and the joint space are lit_lite's. The image tower is a ViT of 6 layers (64 x 64 pixels, patches of 8,
width 192) that learns lit_lite's image features by the loss 1 - cos, on crops of the images below the given folders;
labels are not used. `FOLDER/config.json` and `FOLDER/model.safetensors` are what `backbone=custom
backbone.architecture=... backbone.pretrained=...` takes. The model is a toy: it ranks methods only where its own
zero-shot accuracy is well above chance.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from coop.clip.backbone import load_backbone
from coop.clip.lit_lite import ASSETS, CONFIG_FILE
from coop.data import open_rgb
from coop.data.images import SUFFIXES
from coop.io import track

VISION = {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64}
STORED = 72  # pixels of a stored crop; training takes random 64 x 64 windows of it


def main() -> None:
    """Parse the command line, distil, and write the model."""
    parser = argparse.ArgumentParser(description="Distil a small ViT from lit_lite.")
    parser.add_argument("images", nargs="+", type=Path, help="folders of images; labels are not used")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--crops", type=int, default=3, help="per image: the centre, and random ones (3)")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    files = sorted(path for place in args.images for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    model = open_clip.CLIP(**configuration()["model_cfg"])
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "crops.safetensors"  # what the slow half of the work makes; training may be started again
    if not kept.is_file():
        save_file(dict(zip(("pixels", "targets"), teacher_crops(files, args.crops), strict=True)), kept)
    pixels, targets = load_file(kept)["pixels"], load_file(kept)["targets"]
    losses = distil(model, pixels, targets, args.steps, args.batch, args.lr)
    print(f"{len(files)} images, loss {losses[0]:.3f} -> {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    (args.output / "config.json").write_text(json.dumps(configuration(), indent=1))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.output / "model.safetensors")


def configuration() -> dict[str, Any]:
    """Return lit_lite's configuration with the ViT as its image tower."""
    config: dict[str, Any] = json.loads((ASSETS / CONFIG_FILE).read_text())
    config["model_cfg"]["vision_cfg"] = VISION
    return config


@torch.no_grad()
def teacher_crops(files: list[Path], count: int) -> tuple[Tensor, Tensor]:
    """Return crops (n, 3, s, s) uint8 of the images, and lit_lite's unit features of them (n, e)."""
    teacher = load_backbone("lit_lite")
    pixels: list[Tensor] = []
    targets: list[Tensor] = []
    for file in track(files, "encoding crops", len(files)):
        image = open_rgb(file)
        side = min(image.size)
        boxes = [((image.height - side) // 2, (image.width - side) // 2, side, side)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(pixels))  # torchvision draws crops from the global generator
            boxes += [RandomResizedCrop.get_params(image, [0.3, 1.0], [1.0, 1.0]) for _ in range(count - 1)]
        crops = [image.crop((left, top, left + w, top + h)) for top, left, h, w in boxes]
        targets.append(teacher.encode_images(torch.stack([teacher.preprocess(crop) for crop in crops])))
        pixels += [pil_to_tensor(crop.resize((STORED, STORED), Image.Resampling.BICUBIC)) for crop in crops]
    return torch.stack(pixels), F.normalize(torch.cat(targets), dim=-1)


def distil(model: Any, pixels: Tensor, targets: Tensor, steps: int, batch: int, lr: float) -> list[float]:
    """Train the image tower by AdamW with warm-up and cosine; copy lit_lite's text tower; return the losses."""
    random = torch.Generator().manual_seed(0)
    teacher = load_backbone("lit_lite").model
    own = model.state_dict()
    model.load_state_dict(
        {k: own[k] if k.startswith("visual.") else v for k, v in teacher.state_dict().items() if k in own}
        | {k: v for k, v in own.items() if k.startswith("visual.")}
    )
    visual = model.visual.train()
    groups = [[p for p in visual.parameters() if p.ndim > 1], [p for p in visual.parameters() if p.ndim < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.05}, {"params": groups[1], "weight_decay": 0.0}], lr=lr
    )
    losses: list[float] = []
    started = time.perf_counter()
    for step in track(range(steps), "distilling", steps):
        rate = lr * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(pixels), (batch,), generator=random)
        top, left, flip = (
            int(torch.randint(limit, (), generator=random)) for limit in (STORED - 64 + 1, STORED - 64 + 1, 2)
        )
        x = pixels[rows, :, top : top + 64, left : left + 64].float() / 127.5 - 1
        features = model.encode_image(x.flip(3) if flip else x)
        loss = (1 - F.cosine_similarity(features, targets[rows])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            print(
                f"step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    model.eval()
    return losses


if __name__ == "__main__":
    main()
