"""Make the embedded CLIP's text tower from packages only.

    python -m experiments.lit_lite                           # writes the files of coop/assets/lit_lite
    python -m experiments.lit_lite --steps 50 --out /tmp/x   # a short run, to try

`README.md` beside this file says what it takes, what it does and what it reached. A run that was stopped goes on when
the command is given again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP

from coop.clip.lit_lite import ASSETS, CONFIG_FILE, TEXT_FILE, TRUNK_PREFIX
from coop.clip.towers import TextTower
from coop.errors import CoopError
from coop.io import cache_folder, write_json
from experiments.lit_lite.concepts import build_concepts, choose_synsets, predict_targets
from experiments.lit_lite.image_side import project_classifier
from experiments.lit_lite.sentences import sentence_vectors, start_from_word_pieces
from experiments.lit_lite.student import Lessons
from experiments.lit_lite.wordnet import FILES, read_synsets
from experiments.pretrain.loop import Schedule, fit
from experiments.pretrain.model import save_tensors

EMBED_DIM, WIDTH, HEADS, LAYERS = 256, 224, 4, 4
BATCH, STEPS, LR, WEIGHT_DECAY, SEED = 512, 750, 1.5e-3, 0.05, 1
HORIZON, COOLDOWN = 1200, 250  # a cosine over 1,200 steps, ended early by a linear cooldown
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def make(work: Path, wordnet: Path, steps: int, seed: int) -> CLIP:
    """Train the text tower, keeping sentence vectors and checkpoints in `work`, and return the whole model."""
    synsets = read_synsets(wordnet)
    keys = choose_synsets(synsets)
    side = project_classifier(EMBED_DIM)
    sentences = sentence_vectors(keys, synsets, work / "sentences.safetensors")
    targets, certainty = predict_targets(keys, synsets, sentences, side.targets)
    concepts, frequency = build_concepts(keys, synsets, certainty)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**CONFIG["model_cfg"])
        start_from_word_pieces(model)
    model.visual.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    with torch.no_grad():
        model.visual.head.proj.weight.copy_(side.weight)
        model.visual.head.proj.bias.copy_(side.bias)
    schedule = Schedule(
        steps=steps,
        horizon=max(HORIZON, steps),
        cooldown=min(COOLDOWN, steps // 3),
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        precision="bf16",
        seed=seed,
        save_every=50,
    )
    lessons = Lessons(TextTower(model), concepts, targets, frequency, BATCH, seed)
    fit(model, lessons.steps_from, lessons.loss, schedule, work / f"seed-{seed}", "training lit_lite")
    return model


def write_assets(model: CLIP, folder: Path) -> None:
    """Write the config, and everything but the trunk in float16; the logit scale is CLIP's 100."""
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(100.0).log())
    rest = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(TRUNK_PREFIX)
    }
    save_tensors(rest, folder / TEXT_FILE)
    write_json(folder / CONFIG_FILE, CONFIG)


def main() -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(prog="python -m experiments.lit_lite", description="make the embedded CLIP")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the model's files")
    parser.add_argument("--work", type=Path, default=cache_folder() / "lit_lite-recipe", help="folder to work in")
    parser.add_argument("--wordnet", type=Path, default=FILES, help="folder of WordNet 3.0's files")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1, help="results differ in the last digits with their number")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        write_assets(make(args.work, args.wordnet, args.steps, args.seed), args.out)
    except CoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
