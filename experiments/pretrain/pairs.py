"""(Image, text) pairs: from a CSV, or a folder of captioned images; and batches of them, drawn by step number."""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from coop.data.images import SUFFIXES, open_rgb
from coop.errors import CoopError

IMAGE_COLUMNS = ("image", "path", "filepath", "filename")
TEXT_COLUMNS = ("text", "caption", "title")
SHOWN = 5  # missing files named in one error


@dataclass(frozen=True)
class Pair:
    """An image file and its texts, of which each epoch shows one."""

    image: Path
    texts: tuple[str, ...]


def read_pairs(source: Path) -> list[Pair]:
    """Return the pairs of a CSV file, or of a folder whose images lie beside text files of the same name.

    Raises CoopError for a source without pairs, and names images or captions that are missing.
    """
    if source.is_dir():
        pairs = _read_folder(source)
    elif source.is_file():
        pairs = _read_csv(source)
    else:
        raise CoopError(f"'{source}' is no file and no folder: give a CSV with the columns image and text, or a folder")
    if not pairs:
        raise CoopError(f"'{source}' holds no pairs of image and text")
    missing = [str(pair.image) for pair in pairs if not os.path.isfile(pair.image)]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        shown = ", ".join(name[:200] for name in missing[:SHOWN])
        raise CoopError(f"'{source}' names images that are not there: {shown}{more}")
    return pairs


def _read_folder(folder: Path) -> list[Pair]:
    """Pair x.jpg with x.txt; every line of the text file is a caption."""
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise CoopError(f"'{folder}' holds no images: expected x.jpg beside x.txt")
    bare = [image for image in images if not image.with_suffix(".txt").is_file()]
    if bare:
        raise CoopError(f"{len(bare)} of {len(images)} images in '{folder}' have no caption, such as {bare[0]}: "
                        f"write it into {bare[0].with_suffix('.txt').name} beside it")  # fmt: skip
    pairs = []
    for image in images:
        captions = image.with_suffix(".txt")
        try:
            lines = captions.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise CoopError(f"the caption file {captions} is not UTF-8 text: convert it") from error
        texts = tuple(line.strip() for line in lines if line.strip())
        if not texts:
            raise CoopError(f"the caption file {captions} is empty")
        pairs.append(Pair(image, texts))
    return pairs


def _read_csv(path: Path) -> list[Pair]:
    """Read a line per pair; image paths are relative to the CSV file. Lines of one image become one pair."""
    texts: dict[Path, list[str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            image_column = _column(path, reader.fieldnames or (), IMAGE_COLUMNS)
            text_column = _column(path, reader.fieldnames or (), TEXT_COLUMNS)
            for row in reader:
                image, text = (row[image_column] or "").strip(), (row[text_column] or "").strip()
                if not image or not text:
                    raise CoopError(f"'{path}', line {reader.line_num}: image or text is empty")
                texts.setdefault(path.parent / image, []).append(text)
    except UnicodeDecodeError as error:
        raise CoopError(f"'{path}' is not UTF-8 text (byte {error.start}): convert it") from error
    except csv.Error as error:
        raise CoopError(f"'{path}' is no CSV file ({error}): expected the columns image and text") from error
    return [Pair(image, tuple(captions)) for image, captions in texts.items()]


def _column(path: Path, found: Sequence[str], accepted: Sequence[str]) -> str:
    """Return the first accepted name that is among the columns found."""
    for name in accepted:
        if name in found:
            return name
    columns = ", ".join(name[:40] for name in found[:10]) or "(none)"
    raise CoopError(f"'{path}' has the columns {columns}: one must be called {' or '.join(accepted)}")


class PairDataset(Dataset[tuple[Tensor, Tensor]]):
    """What a batch holds of pair i in epoch e, asked for as (e, i): a transformed image, or a feature, and token ids.

    The choice of caption and the augmentation come from (seed, e, i) alone, in whatever worker process they happen.
    """

    def __init__(
        self,
        pairs: list[Pair],
        transform: Callable[[Image], Tensor],
        tokenize: Callable[[list[str]], Int[Tensor, "b l"]],
        seed: int,
        features: Tensor | None = None,
    ) -> None:
        self.pairs, self.transform, self.tokenize = pairs, transform, tokenize
        self.seed, self.features = seed, features

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        pair = self.pairs[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, index)) % 2**63)  # hashes of int tuples do not vary
            text = pair.texts[int(torch.randint(len(pair.texts), ()))]
            image = self.transform(open_rgb(pair.image)) if self.features is None else self.features[index]
        return image, self.tokenize([text])[0]


def batch_keys(n_pairs: int, batch: int, seed: int, start: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the (epoch, index) keys of the batches from step `start` on, for ever.

    Every epoch shuffles anew and drops the incomplete last batch.
    """
    per_epoch = n_pairs // batch
    epoch, skip = divmod(start, per_epoch)
    while True:
        order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(hash((seed, epoch)) % 2**63)).tolist()
        for first in range(skip * batch, per_epoch * batch, batch):
            yield [(epoch, index) for index in order[first : first + batch]]
        epoch, skip = epoch + 1, 0
