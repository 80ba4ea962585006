"""Whether the toolkit works and is fast on this machine's GPU: tests, a table of speeds, and a verdict.

    python -m experiments.gpu_check        # under ten minutes; without a GPU it says so and ends

NOT RUN YET: no CUDA path of this toolkit has been run. Whoever has a GPU finds out with this command; its output
belongs into docs/performance.md.
"""

import subprocess
import sys
import time

import torch
from tabulate import tabulate

from coop.clip.backbone import Backbone, load_backbone
from experiments.speed import StepSpeed, measure_step, step_arguments

SECONDS = 570  # of ten minutes
TEST_SECONDS = 240
ARCHITECTURES, CLASSES, PRECISIONS = ("RN50", "ViT-B-16"), (10, 100, 1000), ("bf16", "fp32")
WANTED_SHARE = 0.6  # of the matrix-product rate, bf16, 1000 classes
WANTED_SMALL = 0.5  # the same at 100 classes: within twice the arithmetic


def main() -> int:
    """Check and print; 0 if all is well or there is no GPU, 1 otherwise."""
    if not torch.cuda.is_available():
        print("no GPU: torch finds no CUDA device here, so that nothing was checked")
        return 0
    started = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    faults = [] if _tests_pass() else ["the tests marked gpu fail, or took too long"]
    rows, steps = [], {}
    for precision in PRECISIONS:
        for architecture in ARCHITECTURES:
            backbone = load_backbone(architecture, "random", "cuda", precision)
            print(f"{architecture} {precision}: {encoding_rate(backbone):.0f} images/s through the image tower")
            del backbone
            for classes in CLASSES:
                if time.monotonic() - started > SECONDS:
                    faults.append(f"no time was left for {architecture}, {precision}, {classes} classes")
                    continue
                step = measure_step(
                    step_arguments(architecture=architecture, device="cuda", precision=precision, classes=classes)
                )
                steps[architecture, precision, classes] = step
                rows.append(_row(architecture, precision, classes, step))
    headers = ["model", "precision", "classes", "ours, ms", "plain, ms", "ratio", "share of rate", "gradient error"]
    print(tabulate(rows, headers, floatfmt=".3g"))
    faults += _slow(steps)
    print("verdict: " + ("all is well" if not faults else "; ".join(faults)))
    return int(bool(faults))


def _tests_pass() -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    try:
        return subprocess.run(command, timeout=TEST_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _row(architecture: str, precision: str, classes: int, step: StepSpeed) -> list[object]:
    ours, plain = step.seconds["ours"], step.seconds["plain"]
    return [architecture, precision, classes, 1000 * ours, 1000 * plain, plain / ours, step.share, step.gradient_error]


def _slow(steps: dict[tuple[str, str, int], StepSpeed]) -> list[str]:
    """Return, in words, what is slower than wanted."""
    wanted = {1000: WANTED_SHARE, 100: WANTED_SMALL}
    return [
        f"{architecture} bf16 at {classes} classes reaches {step.share:.0%} of the matrix-product rate, not "
        f"{wanted[classes]:.0%}"
        for (architecture, precision, classes), step in steps.items()
        if precision == "bf16" and classes in wanted and step.share < wanted[classes]
    ]


def encoding_rate(backbone: Backbone, batch: int = 256, repeats: int = 5) -> float:
    """Return the images per second of the image tower, from 8-bit pixels in pinned memory."""
    pixels = torch.randint(256, (batch, 3, *backbone.image_size), dtype=torch.uint8).pin_memory()
    backbone.encode_images(backbone.normalise_pixels(pixels))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        backbone.encode_images(backbone.normalise_pixels(pixels))
    torch.cuda.synchronize()
    return batch * repeats / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
