"""The reference's tables of published numbers, read as single numbers in the toolkit's names."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DATASETS = {
    "ImageNet": "imagenet", "Caltech101": "caltech101", "OxfordPets": "oxford_pets", "StanfordCars": "stanford_cars",
    "Flowers102": "oxford_flowers", "Food101": "food101", "FGVCAircraft": "fgvc_aircraft", "SUN397": "sun397",
    "DTD": "dtd", "EuroSAT": "eurosat", "UCF101": "ucf101", "ImageNetV2": "imagenetv2",
    "ImageNet-Sketch": "imagenet_sketch", "ImageNet-A": "imagenet_a", "ImageNet-R": "imagenet_r",
}  # fmt: skip
COLUMNS = {
    **DATASETS, "ImageNet(source)": "imagenet", "Average(10 targets)": "average", "Average": "average",
    "base": "base", "new": "new", "H": "harmonic_mean",
}  # fmt: skip
BACKBONES = {
    "RN50": "rn50", "RN101": "rn101", "RN50x4": "rn50x4", "RN50x16": "rn50x16", "ViT-B/32": "vit_b32",
    "ViT-B/16": "vit_b16",
}  # fmt: skip
OPEN_CLIP = {
    "ImageNet 1k": "imagenet", "ImageNet v2": "imagenetv2", "ImageNet Sketch": "imagenet_sketch",
    "ImageNet-A": "imagenet_a", "ImageNet-R": "imagenet_r", "Caltech-101": "caltech101",
    "Oxford-IIIT Pet": "oxford_pets", "Stanford Cars": "stanford_cars", "Oxford Flowers-102": "oxford_flowers",
    "Food-101": "food101", "FGVC Aircraft": "fgvc_aircraft", "SUN397": "sun397", "Describable Textures": "dtd",
    "EuroSAT": "eurosat",
}  # fmt: skip


class Fact(NamedTuple):
    """A number of the reference; an empty text or None is what its file does not say."""

    source: str
    paper: str
    table: str
    method: str
    backbone: str
    dataset: str
    shots: str
    target: str
    value: float


def reference_facts(folder: Path) -> Iterator[Fact]:
    """Yield every number of the reference's tables that a study may show."""
    for path in sorted(folder.glob("*.csv")):
        for row in rows_of(path):
            source = public_source(row.get("source", ""))
            about = (source, row.get("paper", ""), row.get("table", ""), row.get("method") or row.get("init", ""))
            backbone = BACKBONES.get(row.get("backbone", ""), "")
            if path.stem[0] == "a":
                dataset = COLUMNS[row["dataset"]]
                yield Fact(*about, backbone, dataset, row["shots"], dataset, float(row["accuracy"]))
            elif path.stem[0] == "c":
                for name in BACKBONES.keys() & row.keys():
                    if is_number(row[name]):
                        yield Fact(*about, BACKBONES[name], "imagenet", "", "imagenet", float(row[name]))
            elif path.stem[0] == "d":
                yield Fact(*about, backbone, "average", "16", "average", float(row["avg_11_datasets"]))
            elif path.stem[0] in "bf":
                dataset = COLUMNS[row.get("dataset", "ImageNet")]
                for name in COLUMNS.keys() & row.keys():
                    if is_number(row[name]):
                        yield Fact(*about, backbone, dataset, "", COLUMNS[name], float(row[name]))
            elif path.stem[0] == "n":
                dataset = COLUMNS[row["dataset"]]
                for name in ("accuracy", "base", "new", "H"):
                    if is_number(row[name]):
                        target = COLUMNS.get(name, dataset)
                        yield Fact(*about, backbone, dataset, row["shots"], target, float(row[name]))
            elif path.stem[0] == "h":
                yield from clip_facts(row)
            elif path.stem[0] == "i":
                name = open_clip_backbone(row["model"], row["pretrained"])
                for column, target in OPEN_CLIP.items():
                    yield Fact(source, "", "", "", name, "", "0", target, 100 * float(row[column]))


def clip_facts(row: dict[str, str]) -> Iterator[Fact]:
    """Yield the numbers of a row of the CLIP paper, which may name several backbones and, last, a dataset."""
    values = re.findall(r"-?\d+\.\d+", row["value"])
    target = next((DATASETS[word] for word in re.findall(r"\w+", row["item"])[::-1] if word in DATASETS), "")
    backbones = re.findall(r"RN\d+(?:x\d+)?|ViT-B/\d+", row["item"] if "/" in row["item"] else row["table"])
    for value, backbone in zip(values, backbones or [""], strict=False):
        source = public_source(row["source"])
        table = re.sub(r", RN50\)", ")", row["table"])
        yield Fact(source, row["paper"], table, "", BACKBONES.get(backbone, ""), "", "", target, float(value))


def open_clip_backbone(model: str, pretrained: str) -> str:
    """Return our name of an open_clip model, by what conf/backbone says of itself."""
    for path in (ROOT / "conf" / "backbone").glob("*.yaml"):
        text = path.read_text()
        if f"architecture: {model}\n" in text and f"pretrained: {pretrained}\n" in text:
            return path.stem
    return "none of ours"


def public_source(text: str) -> str:
    """Return a source without the numbers that only the reference's own store of texts knows."""
    text = re.sub(
        r",? \(?(?:stored|text-index)(?: full)?(?: text)? ids? \d+(?: and \d+)?(?: \(at about [\d,]+\))?,?\)?", "", text
    )
    text = text.replace(" (already in this file, verified)", "")
    return re.sub(r"\s+", " ", re.sub(r"^stored full text id \d+$", "'RVP' paper, 16-shot table", text)).strip(" ,")


def is_number(text: str) -> bool:
    return re.fullmatch(r"\d+\.\d+", text) is not None


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
