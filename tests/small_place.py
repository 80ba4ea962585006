"""A tiny CLIP on disk and three classes of coloured images: what the command line needs, small enough to run often."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2},
}
COLOURS = {"red cup": (200, 30, 30), "green_leaf": (30, 200, 30), "blue car": (30, 30, 200)}


def make_place(folder: Path) -> Path:
    """Write the model's config and weights, and class folders of images."""
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.CLIP(**CONFIG).state_dict(), folder / "tiny.pt")
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2), ("test", 5)):
        for name, colour in COLOURS.items():
            (folder / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.integers(-30, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"{i}.png")
    return folder


def words_for(place: Path, results: Path) -> list[str]:
    """Return what `coop run` needs to hear of the place."""
    return [
        "dataset=folder",
        f"dataset.root={place / 'images'}",
        "dataset.name=colours",
        "backbone=custom",
        "backbone.name=tiny",
        f"backbone.architecture={place / 'tiny.json'}",
        f"backbone.pretrained={place / 'tiny.pt'}",
        "epochs=3",
        "augment.views=2",
        "workers=0",
        f"results={results}",
    ]
