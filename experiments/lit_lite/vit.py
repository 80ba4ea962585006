"""Distil a small ViT from lit_lite, so that methods which need visual tokens can be tried without a download.

    python -m experiments.lit_lite.vit IMAGES [IMAGES ...] --output FOLDER [--steps 2000]

The text tower and the joint space are lit_lite's. The image tower is a ViT of 4 layers (112 x 112 pixels, patches of
16, width 192) that learns from crops of the images below the given folders, without labels; images that a split file
there lists as test images are left out. A patch covers what one cell of lit_lite's last feature map does, so every
token has a target: the map at stride 16 after block 2, the one at stride 32 after block 3, and at the end the projected
map, whose mean is lit_lite's image feature; the class token learns that feature. Patch embeddings start from the
principal components of patches. `FOLDER/config.json` and `FOLDER/model.safetensors` are what `backbone=custom
backbone.architecture=... backbone.pretrained=...` takes.
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
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from coop.clip.backbone import load_backbone
from coop.clip.lit_lite import ASSETS, CONFIG_FILE
from coop.data import open_rgb
from coop.data.images import SUFFIXES
from coop.io import track

VISION = {"image_size": 112, "patch_size": 16, "width": 192, "layers": 4, "head_width": 64}
CELLS = VISION["image_size"] // VISION["patch_size"]  # a side, of lit_lite's last feature map too
SHIFT = 4  # pixels by which a stored crop is moved at most
AFTER = {"stride 16": 2, "stride 32": 3}  # the blocks whose tokens learn the teacher's maps
WEIGHTS = {"feature": 1.0, "cells": 1.0, "stride 16": 0.5, "stride 32": 0.5, "likeness": 0.3}
LIKENESS_SCALE = 20.0


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, distil, and write the model."""
    parser = argparse.ArgumentParser(description="Distil a small ViT from lit_lite.")
    parser.add_argument("images", nargs="+", type=Path, help="folders of images; labels are not used")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which to end with fewer steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--crops", type=int, default=2, help="per image: the centre, and random ones (2)")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    files = [path for place in args.images for path in training_images(place)]
    model = open_clip.CLIP(**configuration()["model_cfg"])
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "crops.safetensors"  # what the slow half of the work makes; training may be started again
    if not kept.is_file():
        save_file(teacher_crops(files, args.crops), kept)
    losses = distil(model, load_file(kept), args)
    print(
        f"{len(files)} images, {len(losses)} steps, loss {losses[0]:.3f} -> {sum(losses[-50:]) / len(losses[-50:]):.3f}"
    )
    (args.output / "config.json").write_text(json.dumps(configuration(), indent=1))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.output / "model.safetensors")


def configuration() -> dict[str, Any]:
    """Return lit_lite's configuration with the ViT as its image tower."""
    config: dict[str, Any] = json.loads((ASSETS / CONFIG_FILE).read_text())
    config["model_cfg"]["vision_cfg"] = VISION
    return config


def training_images(place: Path) -> list[Path]:
    """Return the images below a folder, without those that a `split*.json` in it lists as test images."""
    tests = {row[0] for split in place.glob("split*.json") for row in json.loads(split.read_text())["test"]}
    files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    ends = {file: file.relative_to(place).parts for file in files}
    return [f for f in files if not any("/".join(ends[f][i:]) in tests for i in range(len(ends[f])))]


@torch.no_grad()
def teacher_crops(files: list[Path], count: int) -> dict[str, Tensor]:
    """Return crops (n, 3, s, s) uint8 of the images as `pixels`, and lit_lite's maps (n, d, h, h) of them, float16."""
    visual = load_backbone("lit_lite").model.visual.to(memory_format=torch.channels_last)
    out: dict[str, list[Tensor]] = {"pixels": [], "cells": [], **{name: [] for name in AFTER}}
    for file in track(files, "encoding crops", len(files)):
        image = open_rgb(file)
        side = min(image.size)
        boxes = [((image.height - side) // 2, (image.width - side) // 2, side, side)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(out["cells"]))  # torchvision draws crops from the global generator
            boxes += [RandomResizedCrop.get_params(image, [0.3, 1.0], [0.8, 1.25]) for _ in range(count - 1)]
        crops = [
            image.resize((224, 224), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
            for top, left, h, w in boxes
        ]
        size = (VISION["image_size"],) * 2
        out["pixels"] += [pil_to_tensor(crop.resize(size, Image.Resampling.BICUBIC)) for crop in crops]
        x = normalised(torch.stack([pil_to_tensor(crop) for crop in crops])).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            last, maps = visual.trunk.forward_intermediates(x, indices=[3, 4])
        cells = visual.head.proj(last.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for name, rows in zip(("cells", *AFTER), (cells, *maps), strict=True):
            out[name] += list(rows.half().contiguous())
    return {name: torch.stack(rows) for name, rows in out.items()}


def normalised(pixels: Tensor) -> Tensor:
    """Return uint8 pixels from -1 to 1, as lit_lite reads them."""
    return pixels.float() / 127.5 - 1


def cell_rows(maps: Tensor) -> Tensor:
    """Return maps (b, d, h, h) as rows of cells (b, cells, d'), in the order of a ViT's patches."""
    return F.pixel_unshuffle(maps.float(), maps.shape[-1] // CELLS).flatten(2).transpose(1, 2)


@torch.no_grad()
def patch_components(pixels: Tensor) -> Tensor:
    """Return the first principal components of patches as weights (width, 3, p, p), half whitened."""
    size, width = VISION["patch_size"], VISION["width"]
    patches = (
        F.unfold(normalised(pixels[:: max(len(pixels) // 1000, 1)]), size, stride=size).transpose(1, 2).flatten(0, 1)
    )
    values, vectors = torch.linalg.eigh(patches.T.cov())
    weights = (vectors * values.clamp(min=1e-6) ** -0.25).T.flip(0)[:width]
    return (0.1 * weights / (patches @ weights.T).std()).view(width, 3, size, size)


def distil(model: Any, crops: dict[str, Tensor], args: argparse.Namespace) -> list[float]:
    """Train the image tower by AdamW with warm-up and cosine; copy lit_lite's text tower; return the losses."""
    random = torch.Generator().manual_seed(0)
    teacher = load_backbone("lit_lite").model.state_dict()
    model.load_state_dict({k: v if k.startswith("visual.") else teacher[k] for k, v in model.state_dict().items()})
    visual, states = model.visual.train(), dict[str, Tensor]()
    visual.conv1.weight.data.copy_(patch_components(crops["pixels"]))
    heads, statistics = nn.ModuleDict(), dict[str, tuple[Tensor, Tensor]]()
    for name, block in {**AFTER, "cells": VISION["layers"]}.items():
        visual.transformer.resblocks[block - 1].register_forward_hook(
            lambda _module, _inputs, output, name=name: states.update({name: output[:, 1:]})
        )
        if name in AFTER:
            rows = cell_rows(crops[name][:: max(len(crops[name]) // 300, 1)]).flatten(0, 1)
            statistics[name] = rows.mean(dim=0), rows.std(dim=0) + 1e-3
            heads[name] = nn.Linear(VISION["width"], rows.shape[1])
    parameters = [*visual.parameters(), *heads.parameters()]
    groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.05}, {"params": groups[1], "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )

    def terms(rows: Tensor, flip: bool, shift: list[int]) -> dict[str, Tensor]:
        views = {name: values[rows].flip(3) if flip else values[rows] for name, values in crops.items()}
        x = normalised(views.pop("pixels"))
        targets = {name: cell_rows(values) for name, values in views.items()}
        x = F.pad(x, (SHIFT,) * 4, mode="replicate").roll(shift, (2, 3))[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT]
        with torch.autocast("cpu", torch.bfloat16):
            feature = visual(x).float()
            cells = (visual.ln_post(states["cells"]) @ visual.proj).float()
            found = {name: heads[name](states[name]).float() for name in AFTER}
        aim = targets["cells"].mean(dim=1)
        own, wanted = F.normalize(feature, dim=1), F.normalize(aim, dim=1)
        out = {
            "feature": (1 - F.cosine_similarity(feature, aim)).mean(),
            "cells": (1 - F.cosine_similarity(cells, targets["cells"], dim=-1)).mean(),
            "likeness": F.kl_div(
                (LIKENESS_SCALE * own @ wanted.T).log_softmax(dim=1),
                (LIKENESS_SCALE * wanted @ wanted.T).softmax(dim=1),
                reduction="batchmean",
            ),
        }
        for name, (mean, deviation) in statistics.items():
            out[name] = F.mse_loss(found[name], (targets[name] - mean) / deviation)
        return out

    losses: list[float] = []
    started = time.perf_counter()
    for step in track(range(args.steps), "distilling", args.steps):
        progress = max(step / args.steps, (time.perf_counter() - started) / (60 * args.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * progress)))
        rows = torch.randint(len(crops["pixels"]), (args.batch,), generator=random)
        flip, *shift = (int(torch.randint(n, (), generator=random)) for n in (2, 2 * SHIFT + 1, 2 * SHIFT + 1))
        found = terms(rows, bool(flip), [pixels - SHIFT for pixels in shift])
        loss = torch.stack([WEIGHTS[name] * term for name, term in found.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            now = ", ".join(f"{name} {float(term.detach()):.3f}" for name, term in found.items())
            print(f"step {step + 1}: {now}; {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    return losses


if __name__ == "__main__":
    main()
