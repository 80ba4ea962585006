"""Make the compact recordings of this folder from the full ones.

    python -m tests.golden.make ASSETS

`ASSETS` is the folder of development assets that `COOP_TEST_ASSETS` names: `golden/`, `splits/` and
`reference/few_shot_oracle.json`. Nothing here imports `coop`: image features come from open_clip, and the places of
the published few-shot samples are found by drawing them anew and comparing the digests that were published.
"""

import hashlib
import json
import random
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
COOP_CASES = [
    "end-unified-m16", "end-csc-m4", "middle-unified-m16", "middle-csc-m4", "front-unified-m16", "front-csc-m4",
    "end-unified-photo",
]  # fmt: skip
CASES = [*COOP_CASES, "cocoop-m4-batch1", "clip-adapter"]
WITH_IMAGES = {"end-unified-m16", "cocoop-m4-batch1"}  # the others hold the image features: 6 KB instead of 295 KB
TEXTS = ("a photo of a", "a photo of a .", "X X X .")  # what stands around the class names
EMBEDDING = "token_embedding.weight"
SPLIT_FILES = {
    "caltech101": "Caltech101",
    "dtd": "DescribableTextures",
    "eurosat": "EuroSAT",
    "oxford_flowers": "OxfordFlowers",
    "oxford_pets": "OxfordPets",
    "stanford_cars": "StanfordCars",
    "ucf101": "UCF101",
}


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tiny CLIP's weights in float32, from the full file or the compact one.

    In the compact one `token_embedding.rows` (n, d) are the rows `token_embedding.ids` (n,) of the table; the other
    rows of the 49,408 are zero here, and no test reads them.
    """
    weights = load_file(folder / "tiny_clip.safetensors")
    if EMBEDDING not in weights:
        ids, rows = weights.pop("token_embedding.ids"), weights.pop("token_embedding.rows")
        weights[EMBEDDING] = torch.zeros(49408, rows.shape[1], dtype=rows.dtype).index_copy(0, ids.long(), rows)
    return {name: tensor.float() for name, tensor in weights.items()}


def tiny_model(folder: Path) -> open_clip.CLIP:
    """Return the tiny CLIP that the original codes were recorded on."""
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3},
        quick_gelu=True,
    )
    model.load_state_dict(load_weights(folder))
    return model.eval().requires_grad_(False)


def compact_weights(golden: Path, class_names: list[str]) -> dict[str, Tensor]:
    """Return the tiny CLIP's weights with the embedding's rows that the class names and `TEXTS` use."""
    tokenizer = open_clip.SimpleTokenizer()
    texts = [*TEXTS, *class_names, *(name.replace("_", " ") for name in class_names)]
    ids = tokenizer(texts).unique()  # with start, end and padding
    weights = load_file(golden / "tiny_clip.safetensors")
    table = weights.pop(EMBEDDING)
    return {**weights, "token_embedding.ids": ids.int(), "token_embedding.rows": table[ids]}


def compact_record(golden: Path, name: str, model: open_clip.CLIP) -> dict[str, Tensor]:
    """Return a recording, with image features in the place of most images."""
    record = load_file(golden / f"{name}.safetensors")
    if name not in WITH_IMAGES:
        record["features"] = model.encode_image(record.pop("images"))
    return record


def few_shot_cases(assets: Path) -> dict[str, Any]:
    """Return for each dataset the classes' runs in the official split, and the digests of its published samples.

    A sample depends on the labels' order alone, so the split's paths are not needed to check one: `places` is the
    SHA-256 of the sampled places in the part, joined by commas. It belongs to the published sample, since the rows at
    these places have the published digest (`published`), which this function checks.
    """
    published = json.loads((assets / "reference" / "few_shot_oracle.json").read_text())["cases"]
    out: dict[str, Any] = {}
    for name, file in SPLIT_FILES.items():
        split = json.loads((assets / "splits" / f"split_zhou_{file}.json").read_text())
        parts = {part: split[part] for part in ("train", "val")}
        runs = {
            part: [[label, len(list(run))] for label, run in groupby(row[1] for row in rows)]
            for part, rows in parts.items()
        }
        cases: dict[str, Any] = {}
        for case, expected in published[name].items():
            shots, seed = (int(word) for word in case.replace("-shot seed", "").split())
            stream = random.Random(seed)
            cases[case] = {}
            for part, count in (("train", shots), ("val", min(shots, 4))):
                places = draw([row[1] for row in parts[part]], count, stream)
                lines = "\n".join("\t".join(map(str, parts[part][place])) for place in places)
                assert digest(lines) == expected[part]["digest"], f"{name}, {case}, {part}"
                cases[case][part] = {"published": digest(lines), "places": digest(",".join(map(str, places)))}
        out[name] = {"runs": runs, "cases": cases}
    return out


def draw(labels: list[int], shots: int, stream: random.Random) -> list[int]:
    """Return the places of `shots` items per class, as Dassl draws them."""
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return [place for some in places.values() for place in (some if len(some) < shots else stream.sample(some, shots))]


def digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def main(assets: Path) -> None:
    """Write every file of this folder that is not Python or prose."""
    golden = assets / "golden"
    about = json.loads((golden / "cases.json").read_text())
    model = tiny_model(golden)
    save_file(compact_weights(golden, about["class_names"]), HERE / "tiny_clip.safetensors")
    for name in CASES:
        save_file(compact_record(golden, name, model), HERE / f"{name}.safetensors")
    (HERE / "cases.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (HERE / "few_shot.json").write_text(json.dumps(few_shot_cases(assets), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
