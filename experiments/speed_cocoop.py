"""What one training step of CoCoOp costs: the shared-prefix computation against 77 positions x classes per image.

    python -m experiments.speed_cocoop                     # 100 and 1000 ImageNet classes, batch 1, 2 CPU threads

The plain way runs the tower's own blocks over whole sequences for every class, as the original code does. Both ways run
the same method on the text tower of ViT-B/32 with random weights - cost does not depend on them - each in a process of
its own, and their losses are compared. Where the plain way would not fit into memory it is not run: what its backward
pass keeps grows exactly with the number of classes, so that it is counted at fewer and multiplied.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from coop.clip.backbone import Backbone, load_backbone
from coop.clip.encode_full import FullEncoder
from coop.machine import keep_freed_memory
from coop.methods.base import Classes
from coop.methods.cocoop import CoCoOp, CoCoOpOptions

ARCHITECTURE = "ViT-B-32"
PLAIN_CLASSES = 100  # more are extrapolated: 1000 would keep about 20 GB
WAYS = ("plain", "shared")


@dataclass(frozen=True)
class Row:
    """One way's step: median seconds, and bytes at the peak above what is held before it (None: not measured)."""

    way: str
    classes: int
    threads: int
    seconds: float | None
    peak_bytes: int | None
    kept_bytes: int  # what the backward pass finds kept from the forward pass
    loss: float | None
    extrapolated: bool = False


def plain_encoder(backbone: Backbone, rows: Sequence[tuple[int, ...]]) -> FullEncoder:
    """Return the encoder of every class's whole padded sequence, for every context."""
    return FullEncoder(backbone.tower, rows, backbone.vocabulary.pad, budget=2**60)


def measure(classes: Sequence[int] = (100, 1000), threads: int = 2, repeats: int = 5) -> list[Row]:
    """Return a row per way and number of classes."""
    spawn = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    for count in classes:
        for way in WAYS:
            run = min(count, PLAIN_CLASSES) if way == "plain" else count
            known = [row for row in rows if (row.way, row.classes) == (way, run)]
            if known:
                row = known[0]
            else:
                with spawn.Pool(1) as pool:
                    row = pool.apply(_measure_one, (way, run, threads, repeats))
            rows.append(row if run == count else _extrapolated(row, count))
    return rows


def _measure_one(way: str, classes: int, threads: int, repeats: int) -> Row:
    torch.set_num_threads(threads)
    keep_freed_memory()
    backbone = load_backbone(ARCHITECTURE, "random")
    names = Classes(tuple(open_clip.IMAGENET_CLASSNAMES[:classes]))
    method = CoCoOp(backbone, names, CoCoOpOptions())
    if way == "plain":
        method.learner.encoder = plain_encoder(backbone, backbone.learned_rows(names.names, 4, "end", False))
    image = torch.randn(1, backbone.joint_width, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(1, dtype=torch.long)
    kept = _Kept(backbone)
    before = _reset_peak()
    with kept:
        loss = method.loss(image, label)
    loss.backward()
    peak = _peak() - before if before is not None else None
    seconds = []
    for _ in range(repeats if way == "shared" else 1):
        start = time.perf_counter()
        method.loss(image, label).backward()
        seconds.append(time.perf_counter() - start)
    return Row(way, classes, threads, statistics.median(seconds), peak, kept.bytes, float(loss.detach()))


def _extrapolated(row: Row, classes: int) -> Row:
    """Return what the plain way would need for more classes."""
    factor = classes / row.classes
    peak = None if row.peak_bytes is None else round(row.peak_bytes * factor)
    seconds = None if row.seconds is None else row.seconds * factor
    return Row(row.way, classes, row.threads, seconds, peak, round(row.kept_bytes * factor), None, extrapolated=True)


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of distinct tensors that are kept for the backward pass, frozen weights left out."""

    def __init__(self, backbone: Backbone) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
        self._held: list[Any] = []  # so that no storage is freed, and its place used again
        self.bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self._held.append(storage)
                self.bytes += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def _reset_peak() -> int | None:
    """Forget the process's highest memory use so far (Linux) and return what it uses now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def report(rows: Sequence[Row]) -> str:
    """Return the rows as text, with the ratios that matter."""
    lines = ["classes  way     step          kept for backward  peak"]
    for row in rows:
        mark = " (extrapolated)" if row.extrapolated else ""
        seconds = "-" if row.seconds is None else f"{row.seconds:.3f} s"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"
        lines.append(
            f"{row.classes:7d}  {row.way:6s}  {seconds:12s}  {row.kept_bytes / 1e6:8.0f} MB        {peak}{mark}"
        )
    for plain, shared in zip(rows[::2], rows[1::2], strict=True):
        parts = [f"{plain.classes} classes:"]
        if plain.seconds and shared.seconds:
            parts.append(f"{plain.seconds / shared.seconds:.1f}x faster,")
        if plain.peak_bytes and shared.peak_bytes:
            parts.append(f"peak memory 1/{plain.peak_bytes / shared.peak_bytes:.1f},")
        parts.append(f"kept for backward 1/{plain.kept_bytes / shared.kept_bytes:.1f}")
        lines.append(" ".join(parts))
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(report(measure(given.classes, given.threads, given.repeats)))


if __name__ == "__main__":
    main()
