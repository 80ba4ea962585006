"""What encoding images costs on a CPU: towers, views of every epoch, and large photographs.

    python -m experiments.speed --encoding                      # all of it, a few minutes
    python -m experiments.speed --encoding --architecture RN50  # one tower

The plain way is open_clip's: `encode_image` on batches of 16 preprocessed images. Ours folds batch norms, runs
channels last, in the cache's batch shape, from 8-bit pixels. Both run in turn in one process; the median of each is
reported as processor time, which other processes on the machine disturb less than the clock.
"""

import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coop.clip.backbone import Backbone, load_backbone
from coop.features import CPU_BATCH, FeatureCache
from coop.machine import keep_freed_memory
from coop.options import Augment

PLAIN_BATCH = 16
TOWERS = ("lit_lite", "RN50", "ViT-B-32")
LARGE = (2000, 1500)


def main(architecture: str | None, repeats: int) -> None:
    """Measure and print."""
    for name in (architecture,) if architecture else TOWERS:
        print(tower_speed(load_backbone(name, None if name == "lit_lite" else "random"), repeats))
    if architecture in (None, "lit_lite"):
        print(photograph_speed(load_backbone("lit_lite"), repeats))
        for views in ("10", "epochs"):
            command = [sys.executable, "-m", "experiments.speed_encoding", views]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


@torch.no_grad()
def tower_speed(backbone: Backbone, repeats: int) -> str:
    """Return a line on both ways through the image tower."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (PLAIN_BATCH, 3, *backbone.image_size), generator=generator, dtype=torch.uint8)
    images = backbone.normalise_pixels(pixels)

    def plain() -> Tensor:
        features: Tensor = backbone.model.encode_image(images)
        return features

    def ours() -> Tensor:
        return torch.cat([backbone.encode_images(backbone.normalise_pixels(part)) for part in pixels.split(CPU_BATCH)])

    expected, found = plain(), ours()  # folds, and does not count
    error = (expected - found).abs().max() / expected.abs().max()
    times = alternate({"plain": plain, "ours": ours}, repeats)
    rates = {way: PLAIN_BATCH / seconds for way, seconds in times.items()}
    return (
        f"{backbone.architecture}: plain {rates['plain']:.1f}, ours {rates['ours']:.1f} images per CPU second "
        f"({times['plain'] / times['ours']:.2f}x), largest difference {error:.1e} of the largest feature"
    )


def photograph_speed(backbone: Backbone, repeats: int) -> str:
    """Return lines on reading a large JPEG: in full, and scaled while it is decoded (not done: features change)."""
    data = photograph()
    mode: tuple[int, int] = backbone.image_size

    def full() -> Tensor:
        return backbone.pixel_transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def draft() -> Tensor:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", mode)
        return backbone.pixel_transform(image.convert("RGB"))

    a, b = full(), draft()
    features = backbone.encode_images(backbone.normalise_pixels(torch.stack([a, b])))
    difference = (features[0] - features[1]).abs().max() / features[0].abs().max()
    levels = (a.int() - b.int()).abs().max()
    times = alternate({"full": full, "draft": draft}, repeats)
    return (
        f"JPEG of {LARGE[0]} x {LARGE[1]}: {1000 * times['full']:.0f} ms decoded in full, "
        f"{1000 * times['draft']:.0f} ms scaled while decoding; pixels then differ by up to {levels} of 255, "
        f"features by {difference:.1e} of the largest"
    )


def photograph() -> bytes:
    """Return a large JPEG with structure of every size, as a photograph has: noise whose power falls with frequency."""
    noise = np.random.default_rng(0)
    width, height = LARGE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(noise.standard_normal((height, width))) / frequency
        plane = np.fft.ifft2(spectrum).real
        planes.append((plane - plane.mean()) / plane.std() * 50 + 128)
    buffer = io.BytesIO()
    Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def alternate(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median processor seconds of each way, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def view_speed(views: int | str, images: int = 4, epochs: int = 200) -> str:
    """Encode the views of a few images into an empty cache; return the rate and this process's peak memory."""
    from experiments.speed import peak_resident_memory

    backbone = load_backbone("lit_lite")
    paths = [f"{i}.jpg" for i in range(images)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in paths:
            Image.effect_noise((320, 240), 60).convert("RGB").save(folder / path)
        cache = FeatureCache(backbone, folder / "cache")
        start = time.process_time()
        samples = cache.samples(folder, paths, [0] * len(paths), Augment(views), epochs)
        seconds = time.process_time() - start
    count = len(paths) * (1 + len(samples.views))
    return (
        f"lit_lite, augment.views={views}: {count} views of {len(paths)} images, {count / seconds:.1f} views per CPU "
        f"second, peak resident memory {peak_resident_memory():.2f} GiB"
    )


if __name__ == "__main__":
    keep_freed_memory()
    asked = sys.argv[1]
    print(view_speed(int(asked) if asked.isdigit() else asked, images=40 if asked.isdigit() else 4))
