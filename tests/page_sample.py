"""A report as hand-made content, of any size: what the tests of the page draw."""

import base64
import functools
import io
import random

from PIL import Image

from coop.report.build import Report
from coop.report.detail import Bin, ClassGain, Confusion, Detail, Example
from coop.report.figures import Bars, Curves, Line, Panel
from coop.report.frame import Published, Value
from coop.report.summary import Missing
from coop.report.tables import Grid
from coop.report.words import Words

ALL = (
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
    "dtd", "eurosat", "ucf101",
)  # fmt: skip
ZERO = {name: 30.0 + 4.1 * place for place, name in enumerate(ALL)}
SERIES = (
    "zero-shot", "linear probe", "CoOp, M=16, end", "CoOp, M=16, middle", "CoOp, M=16, end, class-specific",
    "CoOp, M=16, middle, class-specific",
)  # fmt: skip
SHOTS = (1, 2, 4, 8, 16)
NASTY = "<img src=x onerror=alert(1)> & \"quotes\" 'n' </script>"
SOURCE = "CoOp (2109.01134), Figure 3, as relisted by GDA-CLIP"
MISSING = Value("missing", planned=3)


def report(there: tuple[str, ...] = ("caltech101", "oxford_flowers", "dtd", "eurosat"), classes: int = 40) -> Report:
    """Return a few-shot report in which only the datasets `there` have results."""
    random_ = random.Random(0)
    values = {name: _dataset(name, name in there, random_) for name in ALL}
    values["average"] = {
        (series, shots): _mean([values[name][series, shots] for name in ALL]) for series, shots in values["dtd"]
    }
    average = "average"
    panels = tuple(Panel(name, _lines(values[name], name)) for name in (average, *ALL))
    rows = tuple(
        ((name, series), tuple(values[name].get((series, shots)) for shots in (0, *SHOTS)))
        for name in (average, *ALL)
        for series in SERIES
    )
    done = sum(value.n for name in ALL for value in values[name].values())
    return Report(
        name="few_shot",
        title="Few-shot learning on eleven datasets",
        reproduces="CoOp (arXiv 2109.01134), Figure 3",
        about="Accuracy against the number of training images per class, for learned contexts of 16 vectors.",
        facts=(("datasets", "4 of 11"), ("backbone", "RN50"), ("seeds", "1, 2, 3"), ("command", "coop report few_shot")),
        summary=(
            "CoOp with 16 shots beats zero-shot on 3 of 4 datasets, by 12.4 points on average.",
            "Class-specific contexts need more shots: at one shot they lose 2.6 points against a unified one.",
            f"Seven of eleven datasets have no run yet; a run failed: {NASTY}",
        ),
        planned=836,
        done=done,
        failed=1,
        made="2026-11-23 11:30",
        versions=(("coop-clip", "0.1.0"), ("torch", "2.14.0"), ("open_clip", "3.3.0")),
        parts=(
            Curves(
                "curves", "Accuracy against shots", "shots (training images per class)", "accuracy (%)", panels
            ),
            _bars(values),
            Grid(
                "accuracy", "Accuracy of every run", ("dataset", "series"), ("0", *map(str, SHOTS)), rows,
                ("Averages are over the datasets that are there.",),
            ),
            *(_words(name, random_) for name in there),
            *(_detail(name, classes, random_) for name in there),
        ),
        reproductions=(
            {
                "what": "CoOp RN50 M=16 end 16-shot ImageNet", "published": "62.95", "reproduced": "60.90 ± 0.08",
                "source": "github KaiyangZhou/CoOp#88", "note": "evaluating the released weights gives the published value",
            },
        ),
        missing=(
            Missing("imagenet, 6 series", 76, 0, "", "coop run -m +experiment=few_shot dataset=imagenet"),
            Missing("dtd, linear probe", 1, 1, f"CoopError: {NASTY}", "coop run +experiment=few_shot dataset=dtd"),
        ),
        notes=("Images are reduced: at most 400 of each dataset's test split.",),
    )  # fmt: skip


def _dataset(name: str, there: bool, random_: random.Random) -> dict[tuple[str, int], Value]:
    values = {
        ("zero-shot", 0): _value(name, "zero-shot", 0, ZERO[name], random_) if there else Value("missing", planned=1)
    }
    for place, series in enumerate(SERIES[1:]):
        for step, shots in enumerate(SHOTS):
            gain = (step - 0.8) * (5.5 - place) + random_.uniform(-1, 1)
            values[series, shots] = _value(name, series, shots, ZERO[name] + gain, random_) if there else MISSING
    if name == "dtd":
        values["linear probe", 16] = Value("failed", planned=3, error=f"CoopError: {NASTY}")
        values["CoOp, M=16, end", 8] = MISSING
    return values


def _value(name: str, series: str, shots: int, mean: float, random_: random.Random) -> Value:
    seeds = (1,) if shots == 0 else (1, 2, 3)[: 2 if name == "eurosat" and shots == 16 else 3]
    published: tuple[Published, ...] = ()
    if series in ("zero-shot", "CoOp, M=16, end"):
        published = (Published(round(mean + random_.uniform(-1.5, 1), 2), SOURCE, name != "eurosat"),)
    slug = series.replace(" ", "_").replace(",", "").replace("=", "")
    return Value(
        "partial" if len(seeds) == 2 else "done",
        mean,
        random_.uniform(0.2, 1.6) if shots else None,
        len(seeds),
        3 if shots else 1,
        mean - ZERO[name] if shots else None,
        tuple(f"{name}/rn50/{slug}/shots{shots}-seed{seed}-6f11e216" for seed in seeds),
        seeds,
        published=published,
    )


def _mean(values: list[Value]) -> Value:
    known = [value for value in values if value.mean is not None]
    if not known:
        return MISSING
    mean = sum(value.mean or 0.0 for value in known) / len(known)
    note = f"over {len(known)} of {len(values)} datasets"
    return Value(
        "partial" if len(known) < len(values) else "done", mean, 0.4, 3, 3, mean - 44.0, (), (1, 2, 3), note=note
    )


def _lines(values: dict[tuple[str, int], Value], name: str) -> tuple[Line, ...]:
    lines = []
    for series in SERIES:
        points = tuple((float(shots), value) for (label, shots), value in values.items() if label == series)
        published = tuple((x, value.published[0]) for x, value in points if value.published)
        lines.append(Line(series, points, published, star=series == "zero-shot"))
    return tuple(lines)


def _bars(values: dict[str, dict[tuple[str, int], Value]]) -> Bars:
    bars = []
    for place, name in enumerate(ALL):
        value = values[name]["CoOp, M=16, end", 16]
        gain = None if value.difference is None else value.difference - 2.2 * place
        bars.append((name, Value(value.state, gain, value.std, value.n, value.planned, None, value.runs, value.seeds)))
    bars.sort(key=lambda bar: -1e9 if bar[1].mean is None else bar[1].mean, reverse=True)
    published = tuple(
        (name, Published(round(9.0 - 1.5 * place, 2), SOURCE, place != 3)) for place, name in enumerate(ALL)
    )
    return Bars("gains", "Gain over zero-shot at 16 shots", "points", tuple(bars), published)


def _words(name: str, random_: random.Random) -> Words:
    texts = ("potd", "that", "filmed", "fruit", "enjoyed", "photo", "of", "a", "<|endoftext|>", "ish", "blurry", "kat")
    vectors = []
    for _ in range(16):
        distances = sorted(random_.uniform(0.6, 1.9) for _ in range(5))
        vectors.append(tuple((random_.choice(texts), random_.random() > 0.3, one) for one in distances))
    published = tuple((random_.choice(texts), round(random_.uniform(0.6, 2), 4), False) for _ in range(16))
    return Words(f"{name}, 16 shots, seed 1", f"{name}/rn50/coop/shots16-seed1-6f11e216", tuple(vectors), published)


def _detail(name: str, count: int, random_: random.Random) -> Detail:
    gains = sorted((random_.gauss(6, 14) for _ in range(count)), reverse=True)
    classes = []
    for place, gain in enumerate(gains):
        label = NASTY if place == 0 else f"{name} class {place}"
        base = random_.uniform(max(0, -gain), min(100, 100 - gain))
        examples = tuple(
            Example(
                _image(random_.randrange(16)), label, *((f"{name} class 7", label) if gain > 0 else (label, "other"))
            )
            for _ in range(3)
        )
        classes.append(ClassGain(label, base, base + gain, 40, examples if place < 3 or place >= count - 3 else ()))
    reliability = tuple(
        (series, 3.0 + 4 * n, _bins(n, random_)) for n, series in enumerate(("zero-shot", "CoOp, M=16, end"))
    )
    confusions = tuple(
        Confusion(f"{name} class {n}", f"{name} class {n + 3}", 34.5 - 3 * n, 20.0 + n, 40) for n in range(8)
    )
    runs = tuple(f"{name}/rn50/coop/shots16-seed{seed}-6f11e216" for seed in (1, 2, 3))
    return Detail(name, "CoOp, M=16, end", "zero-shot", runs, tuple(classes), reliability, confusions)


def _bins(n: int, random_: random.Random) -> tuple[Bin, ...]:
    bins = []
    for low in range(0, 100, 10):
        count = 0 if low < 10 else random_.randrange(5, 90)
        confidence = low + 5.2 if count else None
        accuracy = None if confidence is None else min(100.0, confidence * (0.85 + 0.1 * n))
        bins.append(Bin(float(low), low + 10.0, count, confidence, accuracy))
    return tuple(bins)


@functools.cache
def _image(number: int) -> str:
    noise = random.Random(number)
    small = Image.frombytes("RGB", (12, 12), noise.randbytes(12 * 12 * 3))
    out = io.BytesIO()
    small.resize((96, 96), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
