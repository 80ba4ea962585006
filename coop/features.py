"""What methods read of images: computed once per (weights, image file, view), kept on disk, mapped when read.

A tap says where in the image tower a row is taken: `final` features, `pre_projection` features, or `pixels` (resized
and cropped, uint8; they do not depend on the weights). View 0 is the test transform, view -1 its mirror image, view
v > 0 a random-resized crop and flip, whose randomness comes from the file's content and v alone. Neither shots nor
seed nor method is part of the key, so all runs share the rows.

A folder of shards belongs to one (tap, backbone, preprocessing, image folder). A shard is written under a lock, whole
or not at all, and carries a digest of its content, which is checked once: one that does not fit is thrown away and its
rows are computed again.
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int, Shaped, UInt8
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
from coop.io import atomic_write, track
from coop.options import Augment, Tap

log = logging.getLogger(__name__)

SHARD_ROWS = 4096  # an interrupted computation loses at most this many rows
SHARD_BYTES = 64 * 2**20  # and at most this much
VIEWS_AT_ONCE = 8  # of one image: it is decoded again for the next ones
CPU_BATCH = 16  # below it PyTorch on one thread takes a slower way through 1 x 1 convolutions
ENCODING = 2  # of rows, in the folders' names: a change of how they are computed makes new ones
MIRROR = -1  # the view that is the test view's mirror image


class Rows:
    """Rows of the cache, shape (n, *row) or (v, n, *row), in memory-mapped files: read when they are indexed.

    Indexed by integers, slices and integer tensors like a tensor, over the leading dimensions only; gives CPU tensors.
    """

    def __init__(self, tables: dict[int, Tensor], places: np.ndarray) -> None:
        self._tables = tables  # shard number -> (rows, *row), mapped
        self._places = places  # (n, 2) or (v, n, 2): shard number, row in it
        example = next(iter(tables.values()))
        self.shape: tuple[int, ...] = (*places.shape[:-1], *example.shape[1:])
        self.dtype, self.device = example.dtype, torch.device("cpu")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        places = self._places[tuple(i.cpu().numpy() if isinstance(i, Tensor) else i for i in index)]
        flat = places.reshape(-1, 2)
        out = torch.empty(len(flat), *self.shape[self._places.ndim - 1 :], dtype=self.dtype)
        for shard in np.unique(flat[:, 0]):
            (wanted,) = np.nonzero(flat[:, 0] == shard)
            out[torch.from_numpy(wanted)] = self._tables[shard][torch.from_numpy(flat[wanted, 1])]
        return out.view(*places.shape[:-1], *out.shape[1:])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def to(self, device: torch.device) -> Tensor:
        """Read all rows."""
        return self[:].to(device)

    def cpu(self) -> Tensor:
        """Read all rows."""
        return self[:]

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield the rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def mean(self, dim: int) -> Tensor:
        """Return the mean over the leading dimension (`dim` must be 0), reading one slice at a time."""
        assert dim == 0
        total = self[0].double()
        for i in range(1, len(self)):
            total += self[i]
        return (total / len(self)).float()


@dataclass(frozen=True)
class Samples:
    """The cached inputs of a labelled sample: the test view of each image, and other views for training.

    A row is what the method's tap holds: a feature, not normalised, or uint8 pixels (3, h, w). Features are tensors on
    the backbone's device; pixels, and the views of all epochs, are `Rows` on disk.
    `views` is empty (0, n, ...) for training on the test view. With `fresh`, view t belongs to epoch t alone.
    """

    labels: Int[Tensor, " n"]
    test_view: Shaped[Tensor, "n *row"] | Rows
    views: Shaped[Tensor, "v n *row"] | Rows
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
        """Return the inputs of some images, in the views that `draw` gave, on the labels' device."""
        if drawn is None:
            found = self.test_view[rows.to(self.test_view.device)]
        else:
            device = self.views.device
            found = self.views[drawn[rows.to(drawn.device)].to(device), rows.to(device)]
        return found.to(self.labels.device, non_blocking=True)


class FeatureCache:
    """The rows of image files under one backbone, from `folder` where they are there already.

    `workers` processes decode images. Several processes may share the folder.
    """

    def __init__(self, backbone: Backbone, folder: Path, workers: int = 0) -> None:
        self.backbone, self.folder, self.workers = backbone, folder, workers
        self.batch_size = 256 if backbone.device.type == "cuda" else CPU_BATCH
        self._shards: dict[Path, _Shards] = {}

    def __call__(self, root: Path, paths: Sequence[str], views: Sequence[int] = (0,)) -> Float[Tensor, "v n e"]:
        """Return the final features, not normalised, of images under `root`, on the CPU.

        Raises one CoopError that lists all images that cannot be read.
        """
        return self._rows(root, paths, views, Augment(), "final")[:]

    def test(self, root: Path, paths: Sequence[str], tap: Tap = "final") -> Shaped[Tensor, "n *row"] | Rows:
        """Return the test views of images under `root`: features on the backbone's device, pixels as `Rows`."""
        if not paths:
            return self._nothing(tap)
        rows = self._rows(root, paths, (0,), Augment(), tap, flat=True)
        return rows if tap == "pixels" else rows[:].to(self.backbone.device)

    def samples(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        augment: Augment | None = None,
        epochs: int | None = None,
        tap: Tap = "final",
    ) -> Samples:
        """Return a labelled sample: its test views, and the training views that `augment` asks for.

        `epochs` is needed for `views="epochs"` only. Without `augment` there are none: a validation sample.
        """
        device = self.backbone.device
        truth = torch.tensor(labels, dtype=torch.long, device=device)
        test_view = self.test(root, paths, tap)
        numbers = training_views(augment, epochs)
        if not numbers or not paths:
            empty = self._nothing(tap)
            return Samples(truth, test_view, empty.new_empty(0, len(paths), *empty.shape[1:]))
        assert augment is not None
        fresh = augment.views == "epochs"
        views = self._rows(root, paths, numbers, augment, tap)
        mapped = fresh or tap == "pixels"
        return Samples(truth, test_view, views if mapped else views[:].to(device), fresh)

    def _nothing(self, tap: Tap) -> Tensor:
        """Return (0, *row) of a tap."""
        if tap == "pixels":
            return torch.empty(0, 3, *self.backbone.image_size, dtype=torch.uint8)
        width = self.backbone.joint_width if tap == "final" else len(self.backbone.projection.weight)
        return torch.empty(0, width, device=self.backbone.device)

    def _rows(
        self, root: Path, paths: Sequence[str], views: Sequence[int], augment: Augment, tap: Tap, flat: bool = False
    ) -> Rows:
        """Return the rows (v, n, *row), or (n, *row) if `flat`, computing what is missing."""
        if tap == "pre_projection":
            self.backbone.projection  # noqa: B018 - raises where there is none, before images are read
        root = root.resolve()
        folder = self._folder(tap) / hashlib.sha256(str(root).encode()).hexdigest()[:16]
        shards = self._shards.setdefault(folder, _Shards(folder))
        files = [_file_key(root / path) for path in paths]
        keys = [_row_key(file, view, augment) for view in views for file in files]
        while True:
            shards.read()
            places = shards.find(keys)
            if (places[:, 0] < 0).any():
                folder.mkdir(parents=True, exist_ok=True)
                with FileLock(folder / "lock"):
                    shards.read()  # another process may have made them meanwhile
                    work = _missing(root, paths, files, views, keys, shards.find(keys))
                    if work:
                        self._compute(folder, work, augment, tap)
                        shards.read()
                places = shards.find(keys)
            if shards.intact(np.unique(places[:, 0]).tolist()):
                break
        tables = {int(shard): shards.tables[shard] for shard in np.unique(places[:, 0])}
        return Rows(tables, places if flat else places.reshape(len(views), len(paths), 2))

    def _folder(self, tap: Tap) -> Path:
        backbone = self.backbone
        recipe = f"{backbone.preprocess!r}"
        if tap != "pixels":
            recipe += f" {backbone.identity} {backbone.device.type} {self.batch_size} {ENCODING}"
        name = {"final": "features", "pre_projection": "pre_projection", "pixels": "pixels"}[tap]
        return self.folder / name / hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def _compute(self, folder: Path, work: "list[_Job]", augment: Augment, tap: Tap) -> None:
        for leftover in folder.glob("*.tmp"):  # of a process that was killed; the lock is ours
            leftover.unlink(missing_ok=True)
        random = any(view > 0 for job in work for view, _ in job.views)
        transform = ViewTransform(self.backbone, augment if random else None, pixels=tap == "pixels")
        images = _Images(work, transform)
        per_batch = max(1, self.batch_size // max(len(job.views) for job in work))
        workers = self.workers if len(images) > per_batch else 0
        own = torch.Generator()  # a loader without one takes its seed from the global state
        loader = DataLoader(images, per_batch, num_workers=workers, collate_fn=list, generator=own)
        broken: list[str] = []
        items = track((item for batch in loader for item in batch), "encoding images", len(work))
        decoded = _decoded(items, work, broken)
        rows = decoded if tap == "pixels" else self._encoded(decoded, tap)
        keys: list[bytes] = []
        values: list[Tensor] = []
        for key, _, row in rows:
            keys.append(key)
            values.append(row)
            if len(keys) >= SHARD_ROWS or len(keys) * row.numel() * row.element_size() >= SHARD_BYTES:
                _write(folder, keys, torch.stack(values))
                keys, values = [], []
        if keys:
            _write(folder, keys, torch.stack(values))
        if broken:
            more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            raise CoopError(f"{len(broken)} images cannot be read: {'; '.join(broken[:SHOWN])}{more}")

    def _encoded(self, decoded: "Iterator[_Row]", tap: Tap) -> "Iterator[_Row]":
        """Encode rows of pixels in batches of one fixed shape, the last one padded: company does not change a row."""
        encode = self.backbone.encode_images if tap == "final" else self.backbone.encode_pre_projection
        while batch := list(islice(decoded, self.batch_size)):
            images = torch.stack([pixels for *_, pixels in batch])
            if len(images) < self.batch_size:
                images = torch.cat([images, images[-1:].expand(self.batch_size - len(images), *images.shape[1:])])
            inputs = self.backbone.normalise_pixels(images) if images.dtype == torch.uint8 else images
            features = encode(inputs, [path for _, path, _ in batch]).cpu()
            for (key, path, _), feature in zip(batch, features, strict=False):
                yield key, path, feature


_Row = tuple[bytes, Path, Tensor]  # key, image file, pixels or feature


@dataclass(frozen=True)
class _Job:
    """Some views of one image file that are to be computed, with the keys of their rows."""

    path: Path
    views: list[tuple[int, bytes]]


def training_views(augment: Augment | None, epochs: int | None) -> Sequence[int]:
    """Return the numbers of the views that training reads beside the test view."""
    if augment is None:
        return ()
    if augment.views == "mirror":
        return (0, MIRROR)
    return range(1, (epochs or 0) + 1 if augment.views == "epochs" else int(augment.views) + 1)


class ViewTransform:
    """(RGB image, view, content) -> (3, h, w) pixels: the backbone's test transform, its mirror, or a random view.

    A random view is torchvision's RandomResizedCrop (area from `augment.scale` to 1, bicubic) to the backbone's size
    and horizontal flip. Without `augment` there are no random views. Without `pixels`, a preprocessing that cannot be
    split gives floats.
    """

    def __init__(self, backbone: Backbone, augment: Augment | None, pixels: bool = True) -> None:
        split = augment is not None or pixels or backbone.splits_preprocessing
        self.test: Callable[[Any], Tensor] = backbone.pixel_transform if split else backbone.preprocess
        self.random: Callable[[Any], Any] | None = None
        if augment is not None:
            crop = transforms.RandomResizedCrop(
                backbone.image_size, (augment.scale, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            )
            flip = [transforms.RandomHorizontalFlip()] if augment.flip else []
            self.random = transforms.Compose([crop, *flip, transforms.PILToTensor()])

    def __call__(self, image: Image.Image, view: int, content: bytes) -> UInt8[Tensor, "3 h w"]:
        """Return the view; `content` is the digest of the file's bytes."""
        if view <= 0:
            shown = self.test(image)
            return shown if view == 0 else shown.flip(-1)
        assert self.random is not None
        seed = hashlib.sha256(content + view.to_bytes(4, "little")).digest()[:7]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(seed, "little"))
            return self.random(image)


class _Images(TorchDataset[Tensor | str]):
    """Each job's views, stacked, or in words why the image cannot be read."""

    def __init__(self, jobs: list[_Job], transform: ViewTransform) -> None:
        self.jobs, self.transform = jobs, transform

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Tensor | str:
        job = self.jobs[index]
        try:
            image = open_rgb(job.path)
            random = any(view > 0 for view, _ in job.views)
            content = hashlib.sha256(job.path.read_bytes()).digest() if random else b""
        except (CoopError, OSError) as error:
            return str(error)
        return torch.stack([self.transform(image, view, content) for view, _ in job.views])


def _decoded(items: Iterator[Tensor | str], work: list[_Job], broken: list[str]) -> Iterator[_Row]:
    """Yield the rows of pixels that come for the jobs; what is wrong with an image goes to `broken`, once."""
    for job, item in zip(work, items, strict=True):
        if isinstance(item, str):
            if item not in broken:
                broken.append(item)
            continue
        for (_, key), pixels in zip(job.views, item, strict=True):
            yield key, job.path, pixels


def _file_key(path: Path) -> bytes:
    """Identify a file's content by its name, size and time of change: reading a million files would take minutes."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise CoopError(f"the image {path} is missing") from error
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode()


def _row_key(file: bytes, view: int, augment: Augment) -> bytes:
    """Return the key of a row. The recipe is part of it for random views, where it is not CoOp's."""
    recipe = b""
    if view > 0 and (augment.scale, augment.flip) != (0.08, True):
        recipe = f"\0scale={augment.scale:g} flip={augment.flip:d}".encode()
    return hashlib.blake2b(file + b"\0%d" % view + recipe, digest_size=16).digest()


def _missing(
    root: Path, paths: Sequence[str], files: list[bytes], views: Sequence[int], keys: list[bytes], places: np.ndarray
) -> list[_Job]:
    """Return the jobs for rows that have no place; an image that is listed twice is computed once."""
    jobs: list[_Job] = []
    seen: set[bytes] = set()
    n = len(paths)
    for i, file in enumerate(files):
        if file in seen:
            continue
        seen.add(file)
        missing = [(view, keys[v * n + i]) for v, view in enumerate(views) if places[v * n + i, 0] < 0]
        for start in range(0, len(missing), VIEWS_AT_ONCE):
            jobs.append(_Job(root / paths[i], missing[start : start + VIEWS_AT_ONCE]))
    return jobs


class _Shards:
    """The shard files of one folder: where each row is, and the mapped tables.

    A shard whose digest was checked is written down in `checked` with its size and time of change, and not read again
    to be checked until these change.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []
        self.tables: list[Tensor] = []
        self._known: set[Path] = set()
        self._intact: set[int] = set()
        self._keys: np.ndarray = np.empty(0, "S16")  # sorted
        self._places: np.ndarray = np.empty((0, 2), np.int64)

    def read(self) -> None:
        """Open the shards that are new: their keys are read, their rows are mapped."""
        keys, places = [self._keys], [self._places]
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._known:
                continue
            try:
                with safe_open(path, "pt") as file:
                    own, table = file.get_tensor("keys"), file.get_tensor("features")
            except (SafetensorError, OSError):
                self._discard(path)
                continue
            rows = np.arange(len(own))
            keys.append(own.numpy().copy().view("S16")[:, 0])
            places.append(np.stack([np.full_like(rows, len(self.paths)), rows], axis=1))
            self._known.add(path)
            self.paths.append(path)
            self.tables.append(table)
        if len(keys) > 1:
            every, where = np.concatenate(keys), np.concatenate(places)
            order = np.argsort(every, kind="stable")
            self._keys, self._places = every[order], where[order]

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return (shard number, row) of each key, (-1, -1) where there is none."""
        wanted = np.array(keys, "S16")
        if not len(self._keys):
            return np.full((len(wanted), 2), -1)
        at = np.minimum(self._keys.searchsorted(wanted), len(self._keys) - 1)
        return np.where((self._keys[at] == wanted)[:, None], self._places[at], -1)

    def intact(self, numbers: Iterable[int]) -> bool:
        """Check the digests of these shards where that was not done; remove damaged ones and return whether none is."""
        unsure = [int(number) for number in numbers if number not in self._intact]
        noted = self._noted() if unsure else set()
        good = True
        for number in unsure:
            path = self.paths[number]
            note = _note(path)
            if note in noted or _digest_fits(path):
                self._intact.add(number)
                if note not in noted:
                    _remember(path)
                continue
            self._discard(path)
            kept = self._places[:, 0] != number
            self._keys, self._places = self._keys[kept], self._places[kept]
            good = False
        return good

    def _noted(self) -> set[str]:
        try:
            return set((self.folder / "checked").read_text().splitlines())
        except (OSError, UnicodeDecodeError):
            return set()

    def _discard(self, path: Path) -> None:
        log.warning("the feature cache file %s is damaged: its features are computed again", path)
        path.unlink(missing_ok=True)


def _digest_fits(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            keys, features = file.get_tensor("keys"), file.get_tensor("features")
            return (file.metadata() or {}).get("sha256") == _digest(keys, features)
    except (SafetensorError, OSError):
        return False


def _digest(keys: Tensor, features: Tensor) -> str:
    digest = hashlib.sha256(keys.numpy().tobytes())
    digest.update(features.numpy().data)
    return digest.hexdigest()


def _note(path: Path) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _remember(path: Path) -> None:
    """Write down that a shard's digest fits; short appended lines do not mix. A folder may be read-only."""
    with suppress(OSError), (path.parent / "checked").open("a") as file:
        file.write(f"{_note(path)}\n")


def _write(folder: Path, keys: list[bytes], features: Tensor) -> None:
    table = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), -1)
    features = features.contiguous()
    path = folder / f"{uuid.uuid4().hex}.safetensors"
    with atomic_write(path) as temporary:
        save_file({"keys": table, "features": features}, temporary, metadata={"sha256": _digest(table, features)})
    _remember(path)
