"""Image features, computed once per (weights, preprocessing, image file, view) and kept on disk.

View 0 is the test transform; view v > 0 is the protocol's random-resized crop and flip, whose randomness comes from
the file's content and v alone. Neither shots nor seed nor method is part of the key, so all runs share the rows.

A folder of shards belongs to one (backbone, preprocessing, image folder). A shard is written under a lock, whole or
not at all, and carries a digest of its content: one that does not fit is thrown away and made again.
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float, Int, Shaped
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from coop.clip.backbone import Backbone
from coop.data.images import SHOWN, open_rgb
from coop.errors import CoopError
from coop.io import track

log = logging.getLogger(__name__)

SHARD_ROWS = 4096  # an interrupted computation loses at most this many


@dataclass(frozen=True)
class Samples:
    """The cached inputs of a labelled sample: the test view of each image, and random views for training.

    A row is what the method's tap holds: a feature, not normalised, or uint8 pixels (3, h, w).
    `views` is empty (0, n, ...) for training on the test view. With `fresh`, view t belongs to epoch t alone.
    """

    labels: Int[Tensor, " n"]
    test_view: Shaped[Tensor, "n *row"]
    views: Shaped[Tensor, "v n *row"]
    fresh: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, epoch: int, generator: torch.Generator) -> Int[Tensor, " n"] | None:
        """Return the view of each image that one epoch shows; None for the test view."""
        if not len(self.views):
            return None
        if self.fresh:
            return torch.full((len(self),), epoch)
        return torch.randint(len(self.views), (len(self),), generator=generator)

    def batch(self, rows: Int[Tensor, " b"], drawn: Int[Tensor, " n"] | None) -> Shaped[Tensor, "b *row"]:
        """Return the inputs of some images, in the views that `draw` gave."""
        if drawn is None:
            return self.test_view[rows.to(self.test_view.device)]
        device = self.views.device
        return self.views[drawn[rows.to(drawn.device)].to(device), rows.to(device)]


class FeatureCache:
    """The features of image files under one backbone, from `folder` where they are there already.

    `workers` processes decode images. Several processes may share the folder.
    """

    def __init__(self, backbone: Backbone, folder: Path, workers: int = 0) -> None:
        self.backbone, self.workers = backbone, workers
        self.batch_size = 256 if backbone.device.type == "cuda" else 16  # on a CPU more only costs memory
        recipe = f"{backbone.identity} {backbone.preprocess!r}"
        self.folder = folder / "features" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
        self._shards: dict[Path, Tensor] = {}
        self._rows: dict[bytes, tuple[Path, int]] = {}

    def __call__(self, root: Path, paths: Sequence[str], views: Sequence[int] = (0,)) -> Float[Tensor, "v n e"]:
        """Return the features, not normalised, of images under `root`, on the CPU.

        Raises one CoopError that lists all images that cannot be read.
        """
        root = root.resolve()
        folder = self.folder / hashlib.sha256(str(root).encode()).hexdigest()[:16]
        files = [_file_key(root / path) for path in paths]
        keys = [_row_key(file, view) for view in views for file in files]
        self._read(folder)
        if any(key not in self._rows for key in keys):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                self._read(folder)  # another process may have made them meanwhile
                wanted = _wanted(files, views, self._rows)
                if wanted:
                    self._compute(folder, [(root / paths[i], files[i], missing) for i, missing in wanted])
                    self._read(folder)
        return self._gather(keys).view(len(views), len(paths), -1)

    def _gather(self, keys: Sequence[bytes]) -> Tensor:
        by_shard: dict[Path, tuple[list[int], list[int]]] = {}
        for i, key in enumerate(keys):
            path, row = self._rows[key]
            to, source = by_shard.setdefault(path, ([], []))
            to.append(i)
            source.append(row)
        out = torch.empty(len(keys), next(iter(self._shards[p] for p in by_shard)).shape[1])
        for path, (to, source) in by_shard.items():
            out[to] = self._shards[path][source]
        return out

    def _read(self, folder: Path) -> None:
        """Take in the shards that are new; remove damaged ones."""
        for path in sorted(folder.glob("*.safetensors")):
            if path in self._shards:
                continue
            try:
                with safe_open(path, "pt") as file:
                    keys, features = file.get_tensor("keys"), file.get_tensor("features")
                    intact = (file.metadata() or {}).get("sha256") == _digest(keys, features)
            except (SafetensorError, OSError):
                intact = False
            if not intact:
                log.warning("the feature cache file %s is damaged: its features are computed again", path)
                path.unlink(missing_ok=True)
                continue
            self._shards[path] = features
            self._rows.update((bytes(key), (path, row)) for row, key in enumerate(keys.numpy()))

    def _compute(self, folder: Path, work: list[tuple[Path, bytes, list[int]]]) -> None:
        for leftover in folder.glob("*.tmp"):  # of a process that was killed; the lock is ours
            leftover.unlink(missing_ok=True)
        transform = ViewTransform(self.backbone.preprocess, any(view for *_, views in work for view in views))
        images = _Images([(path, views) for path, _, views in work], transform)
        per_batch = max(1, self.batch_size // max(len(views) for *_, views in work))
        workers = self.workers if len(images) > per_batch else 0
        own = torch.Generator()  # a loader without one takes its seed from the global state
        loader = DataLoader(images, per_batch, num_workers=workers, collate_fn=list, generator=own)
        broken: list[str] = []
        keys: list[bytes] = []
        features: list[Tensor] = []
        items = (item for batch in _encoded(loader, self.backbone) for item in batch)
        for (_, file, views), encoded in zip(work, track(items, "encoding images", len(work)), strict=True):
            if isinstance(encoded, str):
                broken.append(encoded)
                continue
            keys += [_row_key(file, view) for view in views]
            features.append(encoded)
            if len(keys) >= SHARD_ROWS:
                _write(folder, keys, torch.cat(features))
                keys, features = [], []
        if keys:
            _write(folder, keys, torch.cat(features))
        if broken:
            more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            raise CoopError(f"{len(broken)} images cannot be read: {'; '.join(broken[:SHOWN])}{more}")


class ViewTransform:
    """(RGB image, view, randomness) -> (3, h, w): the backbone's test transform, or the protocol's random one.

    RandomResizedCrop (scale 0.08 to 1, bicubic) and horizontal flip, with the backbone's size, mean and deviation.
    """

    def __init__(self, preprocess: Callable[[Any], Tensor], random_views: bool) -> None:
        self.preprocess = preprocess
        self.random: Callable[[Any], Tensor] | None = None
        if random_views:
            normalize = [t for t in getattr(preprocess, "transforms", []) if isinstance(t, transforms.Normalize)]
            if not normalize:
                raise CoopError(
                    "random views need a preprocessing that ends in torchvision's Normalize: use augment.views=0"
                )
            size = tuple(preprocess(Image.new("RGB", (8, 8))).shape[-2:])
            crop = transforms.RandomResizedCrop(size, (0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
            self.random = transforms.Compose(
                [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize[-1]]
            )

    def __call__(self, image: Image.Image, view: int, content: bytes) -> Tensor:
        """Return the view; `content` is the digest of the file's bytes."""
        if view == 0:
            return self.preprocess(image)
        assert self.random is not None
        seed = hashlib.sha256(content + view.to_bytes(4, "little")).digest()[:7]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(seed, "little"))
            return self.random(image)


class _Images(TorchDataset[Tensor | str]):
    """Each image's wanted views, stacked, or in words why it cannot be read."""

    def __init__(self, files: list[tuple[Path, list[int]]], transform: ViewTransform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        path, views = self.files[index]
        try:
            image = open_rgb(path)
            content = hashlib.sha256(path.read_bytes()).digest() if any(views) else b""
        except (CoopError, OSError) as error:
            return str(error)
        return torch.stack([self.transform(image, view, content) for view in views])


def _encoded(loader: DataLoader[Tensor | str], backbone: Backbone) -> Iterator[list[Tensor | str]]:
    for batch in loader:
        pixels = [item for item in batch if isinstance(item, Tensor)]
        rows = backbone.encode_images(torch.cat(pixels)).cpu().split([len(p) for p in pixels]) if pixels else ()
        remaining = iter(rows)
        yield [item if isinstance(item, str) else next(remaining) for item in batch]


def _file_key(path: Path) -> bytes:
    """Identify a file's content by its name, size and time of change: reading a million files would take minutes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise CoopError(f"the image {path} is missing") from error
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode()


def _row_key(file: bytes, view: int) -> bytes:
    return hashlib.blake2b(file + b"\0%d" % view, digest_size=16).digest()


def _wanted(files: list[bytes], views: Sequence[int], known: dict[bytes, Any]) -> list[tuple[int, list[int]]]:
    """Return (image, views) for what is not known; an image that is listed twice is computed once."""
    wanted, seen = [], set()
    for i, file in enumerate(files):
        missing = [view for view in views if _row_key(file, view) not in known]
        if missing and file not in seen:
            wanted.append((i, missing))
            seen.add(file)
    return wanted


def _digest(keys: Tensor, features: Tensor) -> str:
    digest = hashlib.sha256(keys.numpy().tobytes())
    digest.update(features.numpy().data)
    return digest.hexdigest()


def _write(folder: Path, keys: list[bytes], features: Tensor) -> None:
    table = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
    features = features.contiguous()
    name = uuid.uuid4().hex
    temporary = folder / f"{name}.tmp"
    save_file({"keys": table, "features": features}, temporary, metadata={"sha256": _digest(table, features)})
    os.replace(temporary, folder / f"{name}.safetensors")
