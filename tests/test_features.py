"""The feature cache: the encoder's features, computed once, whatever happens to its files."""

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torchvision import transforms

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.features import MIRROR, FeatureCache, Rows, ViewTransform
from coop.options import Augment
from tests.small_towers import FAMILIES, small_backbone

PATHS = tuple(f"{kind}/{i}.png" for kind in ("a", "b") for i in range(4))


def image_backbone() -> Backbone:
    """Return a small model with open_clip's preprocessing for it."""
    small = small_backbone(FAMILIES["CLIP with GELU"])
    return Backbone(small.model, open_clip.image_transform(16, is_train=False), small.tokenizer)


class CannotEncode(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("this backbone cannot encode")


def broken_backbone() -> Backbone:
    """Return the same model, as its identity says, which cannot encode anything."""
    backbone = image_backbone()
    assert backbone.identity
    backbone.model.visual = CannotEncode()
    return backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return image_backbone()


def make_images(root: Path) -> Path:
    random = np.random.default_rng(0)
    for path in PATHS:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(root / path)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@torch.no_grad()
def expected(backbone: Backbone, root: Path, paths: tuple[str, ...] = PATHS) -> Tensor:
    model: Any = backbone.model
    pixels = [backbone.preprocess(Image.open(root / path).convert("RGB")) for path in paths]
    return torch.cat([model.encode_image(one[None]) for one in pixels])


def shards(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def rows(cache: Path) -> int:
    total = 0
    for path in shards(cache):
        with safe_open(path, "pt") as file:
            total += len(file.get_tensor("features"))
    return total


def test_features_are_the_encoders(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    features = FeatureCache(backbone, tmp_path / "cache")(root, PATHS)
    torch.testing.assert_close(features[0], expected(backbone, root), rtol=1e-4, atol=1e-5)
    assert features.shape == (1, len(PATHS), backbone.joint_width) and features.dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_computed_twice(backbone: Backbone, root: Path, tmp_path: Path, workers: int) -> None:
    """Neither in this process nor by another object: one that cannot encode gives the same rows, in any order."""
    cache = FeatureCache(backbone, tmp_path, workers)
    cache.batch_size = 2  # so that there is work for the processes
    first = cache(root, PATHS + PATHS[:2], (0, 1))
    assert rows(tmp_path) == 2 * len(PATHS)
    files = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert torch.equal(cache(root, PATHS + PATHS[:2], (0, 1)), first)
    again = FeatureCache(broken_backbone(), tmp_path)
    again.batch_size = 2
    assert torch.equal(again(root, PATHS[::-1], (1,)), first[1:, : len(PATHS)].flip(1))
    assert files == {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(RuntimeError, match="cannot encode"):  # what it does not know, it would have to encode
        again(root, PATHS[:1], (2,))


def test_other_weights_or_preprocessing_are_other_features(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    first = FeatureCache(backbone, tmp_path)(root, PATHS)
    squashed = open_clip.image_transform(16, is_train=False, resize_mode="squash")
    for other in (
        Backbone(backbone.model, squashed, backbone.tokenizer),
        Backbone(small_backbone(FAMILIES["CLIP with QuickGELU"]).model, backbone.preprocess, backbone.tokenizer),
    ):
        features = FeatureCache(other, tmp_path)(root, PATHS)
        torch.testing.assert_close(features[0], expected(other, root), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(features, first)


def flip(data: bytes) -> bytes:
    return data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-9], lambda data: data[:5], lambda data: b""])
def test_damage_is_noticed_and_made_good(
    damage: Callable[[bytes], bytes], backbone: Backbone, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = FeatureCache(backbone, tmp_path)(root, PATHS)
    (shard,) = shards(tmp_path)
    shard.write_bytes(damage(shard.read_bytes()))
    assert torch.equal(FeatureCache(backbone, tmp_path)(root, PATHS), first)
    assert f"{shard} is damaged" in caplog.text
    assert not shard.exists() and rows(tmp_path) == len(PATHS)
    assert torch.equal(FeatureCache(broken_backbone(), tmp_path)(root, PATHS), first)


def test_a_digest_is_checked_once(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    """Where size and time of change are those of a shard that was checked, it is not read to be checked again."""
    first = FeatureCache(backbone, tmp_path)(root, PATHS)
    (shard,) = shards(tmp_path)
    status = shard.stat()
    data = bytearray(shard.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 3] ^= 1  # of the first feature
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = FeatureCache(broken_backbone(), tmp_path)(root, PATHS)
    assert torch.equal(again[:, 1:], first[:, 1:]) and not torch.equal(again, first)  # not noticed
    (shard.parent / "checked").unlink()
    assert torch.equal(FeatureCache(backbone, tmp_path)(root, PATHS), first)  # noticed


def test_a_read_only_cache_is_read(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    first = FeatureCache(backbone, tmp_path)(root, PATHS)
    (shard,) = shards(tmp_path)
    (shard.parent / "checked").unlink()
    (shard.parent / "checked").mkdir()  # nothing can be written there, whoever asks
    assert torch.equal(FeatureCache(broken_backbone(), tmp_path)(root, PATHS), first)


def test_a_full_disk_is_the_system_s_refusal(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    """Files may not become larger than 100 bytes here; afterwards the same call does it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError) as caught:
            FeatureCache(backbone, tmp_path)(root, PATHS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG and not rows(tmp_path) and not list(tmp_path.rglob("*.tmp"))
    FeatureCache(backbone, tmp_path)(root, PATHS)
    assert rows(tmp_path) == len(PATHS)


def test_leftovers_of_a_killed_process_are_removed(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    FeatureCache(backbone, tmp_path)(root, PATHS[:2])
    leftover = shards(tmp_path)[0].with_suffix(".tmp")
    leftover.write_bytes(b"half")
    FeatureCache(backbone, tmp_path)(root, PATHS)
    assert not leftover.exists() and rows(tmp_path) == len(PATHS)


def encode_together(root: Path, cache: Path, start: Any) -> None:
    torch.set_num_threads(1)
    backbone = image_backbone()
    assert backbone.identity  # takes its time before the start, not after
    start.wait(120)
    FeatureCache(backbone, cache)(root, PATHS, (0, 1, 2))


@pytest.mark.slow
def test_processes_at_once_compute_once(root: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    other = spawn.Process(target=encode_together, args=(root, tmp_path / "cache", start))
    other.start()
    encode_together(root, tmp_path / "cache", start)
    other.join(120)
    assert other.exitcode == 0
    assert rows(tmp_path / "cache") == 3 * len(PATHS)


@pytest.mark.parametrize("augment", [Augment(), Augment(scale=0.5), Augment(flip=False)])
def test_random_views_are_the_protocols(backbone: Backbone, root: Path, augment: Augment) -> None:
    """Torchvision's crop (bicubic) and flip, then the backbone's normalisation, from a seed; bit by bit."""
    crop = transforms.RandomResizedCrop(16, (augment.scale, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    image = Image.open(root / PATHS[0]).convert("RGB")
    own = ViewTransform(backbone, augment)
    flip = [transforms.RandomHorizontalFlip()] if augment.flip else []
    steps = [crop, *flip, transforms.ToTensor(), transforms.Normalize(mean, std)]
    assert own.random is not None
    with torch.random.fork_rng(devices=[]):
        for seed in range(20):
            torch.manual_seed(seed)
            pixels = own.random(image)
            torch.manual_seed(seed)
            assert torch.equal(backbone.normalise_pixels(pixels), transforms.Compose(steps)(image))
    assert torch.equal(backbone.normalise_pixels(own(image, 0, b"")), backbone.preprocess(image))
    assert torch.equal(own(image, MIRROR, b""), own(image, 0, b"").flip(-1))
    views = [own(image, view, b"content") for view in range(1, 9)]
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    assert not torch.equal(own(image, 1, b"other content"), views[0])


def test_a_view_depends_on_content_and_number_alone(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    """Not on place, order, company, workers or global randomness, which stays as it is."""
    state = torch.get_rng_state()
    first = FeatureCache(backbone, tmp_path / "one")(root, PATHS, (0, 1, 2, 3))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    elsewhere = make_images(tmp_path / "elsewhere" / "images")
    order = [5, 2, 7]
    second = FeatureCache(backbone, tmp_path / "two")(elsewhere, [PATHS[i] for i in order], (3, 1))
    torch.testing.assert_close(second, first[[3, 1]][:, order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first[1], first[2])


@pytest.mark.parametrize("family", ["CLIP with GELU", "ResNet"])
def test_rows_are_bit_equal_whoever_computes_them(family: str, root: Path, tmp_path: Path) -> None:
    """One by one, in another order, with other views beside them: one thread, one batch shape."""
    backbone = image_backbone()
    if family == "ResNet":
        vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = open_clip.CLIP(32, vision, {"width": 32, "heads": 2, "layers": 1})
        backbone = Backbone(model, open_clip.image_transform(32, is_train=False), backbone.tokenizer)
    together = FeatureCache(backbone, tmp_path / "together")(root, PATHS, (0, 1, 2))
    alone = FeatureCache(backbone, tmp_path / "alone")
    for i in (6, 0, 3):
        assert torch.equal(alone(root, [PATHS[i]], (2, 0))[:, 0], together[[2, 0], i])
    assert torch.equal(alone(root, PATHS[::-1], (0, 1)), together[:2].flip(1))


def test_unreadable_images_are_one_error(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    """The others are kept."""
    (root / PATHS[1]).write_bytes(b"no image")
    (root / PATHS[4]).write_bytes((root / PATHS[4]).read_bytes()[:200])
    with pytest.raises(CoopError, match="2 images cannot be read") as caught:
        FeatureCache(backbone, tmp_path / "cache")(root, PATHS)
    assert PATHS[1] in str(caught.value) and PATHS[4] in str(caught.value) and "\n" not in str(caught.value)
    assert rows(tmp_path / "cache") == len(PATHS) - 2
    with pytest.raises(CoopError, match=r"missing/x\.png is missing"):
        FeatureCache(backbone, tmp_path / "cache")(root, ["missing/x.png"])


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_changed_file_is_encoded_again(change: str, backbone: Backbone, root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    FeatureCache(backbone, cache)(root, PATHS)
    path = root / PATHS[0]
    Image.new("RGB", (20, 30), (250, 10, 10)).save(path)
    if change == "time":  # as large as before, but later
        status = path.stat()
        FeatureCache(backbone, cache)(root, PATHS)
        Image.new("RGB", (20, 30), (10, 10, 250)).save(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert path.stat().st_size == status.st_size
    features = FeatureCache(backbone, cache)(root, PATHS)
    torch.testing.assert_close(features[0], expected(backbone, root), rtol=1e-4, atol=1e-5)


def test_random_views_need_a_normalisation(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    odd = Backbone(backbone.model, lambda image: backbone.preprocess(image), backbone.tokenizer)
    with pytest.raises(CoopError, match="random views and pixels need .*: use augment.views=0"):
        FeatureCache(odd, tmp_path)(root, PATHS, (1,))


def test_samples_hold_what_was_asked_for(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    """Views by number, of every epoch, mirrored, of another recipe and none, over the same rows."""
    cache = FeatureCache(backbone, tmp_path)
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    plain = cache(root, PATHS, range(4))
    few = cache.samples(root, PATHS, labels, Augment(views=3))
    assert few.labels.tolist() == labels and not few.fresh
    assert torch.equal(few.test_view, plain[0]) and torch.equal(few.views[:], plain[1:])
    fresh = cache.samples(root, PATHS, labels, Augment(views="epochs"), epochs=3)
    assert fresh.fresh and isinstance(fresh.views, Rows) and torch.equal(fresh.views[:], plain[1:])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([5, 0])
    assert torch.equal(fresh.batch(chosen, fresh.draw(2, generator)), plain[3, chosen])
    torch.testing.assert_close(fresh.views.mean(dim=0), plain[1:].mean(dim=0))
    known = rows(tmp_path)
    other = cache.samples(root, PATHS, labels, Augment(views=3, scale=0.5))
    assert rows(tmp_path) == known + 3 * len(PATHS) and not torch.allclose(other.views[:], plain[1:])
    mirror = cache.samples(root, PATHS, labels, Augment(views="mirror", scale=0.5))
    assert rows(tmp_path) == known + 4 * len(PATHS)  # the recipe of random crops does not matter here
    assert torch.equal(mirror.views[0], plain[0])
    pixels = torch.stack([backbone.preprocess(Image.open(root / path).convert("RGB")).flip(-1) for path in PATHS])
    torch.testing.assert_close(mirror.views[1], backbone.encode_images(pixels), rtol=1e-4, atol=1e-5)
    for nothing in (cache.samples(root, PATHS, labels), cache.samples(root, PATHS, labels, Augment(views=0))):
        assert nothing.views.shape == (0, *plain.shape[1:]) and nothing.draw(0, generator) is None
    assert cache.samples(root, (), ()).test_view.shape == (0, backbone.joint_width)


def test_features_of_cached_pixels_are_those_of_images(root: Path, tmp_path: Path) -> None:
    """Bit by bit, test view and random views; pixels are shared by backbones with the same preprocessing."""
    backbone = image_backbone()
    cache = FeatureCache(backbone, tmp_path)
    labels = [0] * len(PATHS)
    pixels = cache.samples(root, PATHS, labels, Augment(views=2), tap="pixels")
    features = cache.samples(root, PATHS, labels, Augment(views=2))
    assert isinstance(pixels.views, Rows) and pixels.views.shape == (2, len(PATHS), 3, 16, 16)
    assert pixels.views.dtype == torch.uint8
    for shown, encoded in ((pixels.test_view, features.test_view), (pixels.views[1], features.views[1])):
        images = backbone.normalise_pixels(shown[:])
        torch.testing.assert_close(backbone.encode_images(images), encoded, rtol=1e-5, atol=1e-6)
    image = Image.open(root / PATHS[2]).convert("RGB")
    assert torch.equal(backbone.normalise_pixels(pixels.test_view[2]), backbone.preprocess(image))
    drawn = torch.tensor([0, 1] * 4)
    some = torch.tensor([3, 6])
    expected = torch.stack([pixels.views[1][3], pixels.views[0][6]])
    assert torch.equal(pixels.batch(some, drawn), expected)
    assert [len(part) for part in pixels.test_view.split(3)] == [3, 3, 2]
    other = Backbone(small_backbone(FAMILIES["CLIP with QuickGELU"]).model, backbone.preprocess, backbone.tokenizer)
    known = rows(tmp_path)
    assert torch.equal(FeatureCache(other, tmp_path).test(root, PATHS, "pixels")[:], pixels.test_view[:])
    assert rows(tmp_path) == known


def test_pre_projection_features(backbone: Backbone, root: Path, tmp_path: Path) -> None:
    """Their projection is the final feature."""
    cache = FeatureCache(backbone, tmp_path)
    pre = cache.test(root, PATHS, "pre_projection")
    assert pre.shape == (len(PATHS), len(backbone.projection.weight))
    torch.testing.assert_close(backbone.project(pre[:]), cache.test(root, PATHS), rtol=1e-5, atol=1e-5)
