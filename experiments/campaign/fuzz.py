"""Files and words that no reader expects, drawn by hypothesis: an answer or one sentence, never a traceback.

Every reader has a strategy for what it reads, most by damaging a valid file, and a command that reads it. `examples`
draws the same examples for the same seed.
"""

import copy
import json
import math
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from PIL import Image

from experiments.campaign.child import Outcome
from experiments.campaign.place import COLOURS, TRAINED, World
from experiments.campaign.trial import Trial

EXAMPLES = 100  # for one seed
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "DDS")
HOSTILE = (
    "", " ", "..", "../../x", "/etc/passwd", "~nobody/x", "a\nb", "a\rb", "a\0b", "=1+1", "@x", "-x", "'", '"', "{}",
    "${x}", "${oc.env:HOME}", "???", "a,b", "[", "null", "None", "nan", "-inf", "1e999", "é", "\u202e", "💥",
    "<script>", "x" * 400, "x" * 70_000, "%s", "\\", "$(id)", "`id`", "train", "val", "test",
)  # fmt: skip
KEYS = (
    "dataset", "dataset.root", "dataset.name", "dataset.template", "dataset.split_seed", "dataset.class_names",
    "dataset.ignore", "dataset.clean_names", "dataset.split_file", "backbone", "backbone.name", "backbone.architecture",
    "backbone.pretrained", "method", "protocol", "protocol.name", "protocol.targets", "shots", "seed", "sample_file",
    "n_ctx", "ctx_position", "class_specific", "ctx_init", "template", "epochs", "lr", "batch_size", "momentum",
    "weight_decay", "warmup_epochs", "warmup_lr", "augment.views", "augment", "device", "precision", "workers",
    "data_root", "cache", "results", "jobs", "validation", "hydra.run.dir", "hydra/launcher", "experiment", "bakbone",
)  # fmt: skip
VALUES = (
    "0", "1", "-1", "2", "1.5", "1e400", "nan", "-inf", "true", "null", "[]", "{}", "[1,2]", "{a: 1}", "[{}]", "'x'",
    "x", "coop", "zero_shot", "folder", "custom", "cpu", "meta", "fp16", "bf16", "all", "end", "1|null", "..", "/", "~",
    "a/b", "9" * 30, "a photo of a", "{}", "${seed}", "${oc.env:HOME}", "???", "[", "'", '"a {}, a bird."',
)  # fmt: skip


class Malicious:
    """Unpickles to a call that leaves a mark."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return exec, ("open('executed', 'w').close()",)


texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes with some changed, cut, doubled or inserted."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("set", "set", "cut", "drop", "insert", "double")))
        if kind == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


@st.composite
def damaged_values(draw: st.DrawFn, document: Any) -> Any:
    """Return a JSON document in which some values are replaced, removed or doubled."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename")))
        if kind == "replace":
            holder[key] = draw(json_values)
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(texts)] = holder.pop(key)
        else:
            holder.append(holder[key])
    return changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of values, at most the first 20 of a list."""
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))[:20]
        if isinstance(value, list)
        else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> bytes:
    """Return a JSON file that is damaged in its values or in its bytes."""
    kind = draw(st.sampled_from(("values",) * 6 + ("any", "bytes", "deep", "encoding")))
    if kind == "values":
        return json.dumps(draw(damaged_values(document))).encode()
    if kind == "any":
        return json.dumps(draw(json_values)).encode()
    if kind == "deep":
        return draw(st.sampled_from((b"[" * 100_000, b'{"a":' * 50_000, b"[" * 5_000 + b"]" * 5_000)))
    content = json.dumps(document).encode()
    return draw(damaged(content)) if kind == "bytes" else content.decode().encode("utf-16")


@st.composite
def tables(draw: st.DrawFn, lines: tuple[str, ...]) -> bytes:
    """Return a CSV file with hostile cells, columns and encodings."""
    rows = [line.split(",") for line in lines]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from(rows))
        kind = draw(st.sampled_from(("cell", "cell", "cell", "more", "less", "row")))
        if kind == "cell" and row:
            row[draw(st.integers(0, len(row) - 1))] = draw(texts)
        elif kind == "more":
            row.append(draw(texts))
        elif kind == "less" and row:
            row.pop()
        else:
            rows.append([*row])
    text = "\n".join(",".join(row) for row in rows)
    content = text.encode(draw(st.sampled_from(("utf-8", "utf-8-sig", "latin-1", "utf-16"))), "replace")
    return draw(damaged(content)) if draw(st.integers(0, 4)) == 0 else content


def _file_name(text: str) -> str:
    name = text.replace("/", "_").replace("\0", "_").encode("utf-8", "ignore").decode()[:60]
    return "_" if name in ("", ".", "..") else name


names = texts.map(_file_name)
kinds = st.sampled_from(("image", "junk", "empty", "folder", "loop"))
folders = st.dictionaries(names, st.dictionaries(names, kinds, max_size=4), max_size=4)
override = st.one_of(
    st.builds(
        lambda sign, key, value: f"{sign}{key}={value}",
        st.sampled_from(("", "", "", "+", "++", "~")),
        st.sampled_from(KEYS) | texts,
        st.sampled_from(VALUES) | texts,
    ),
    st.sampled_from(("~results", "~dataset", "~method", "", "=", "a", "+experiment=few_shot", "-m")),
)
tensors = st.sampled_from((torch.zeros(2, 16), torch.full((4, 16), math.nan), torch.zeros(0)))
pickles = st.recursive(
    st.one_of(scalars, st.builds(Malicious), tensors),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)


def images() -> dict[str, bytes]:
    """Return a small picture in every format that can be written here."""
    found = {}
    for name in FORMATS:
        buffer = BytesIO()
        Image.effect_noise((24, 20), 80).convert("RGB").save(buffer, name)
        found[name.lower()] = buffer.getvalue()
    return found


@dataclass(frozen=True)
class Reader:
    """What is drawn, and the commands that read it: `read(world, case, example)` gives their outcomes."""

    strategy: st.SearchStrategy[Any]
    read: Callable[[World, Path, Any], Iterator[Outcome]]


class Fuzz:
    """All readers, on a world in which one run was made."""

    def __init__(self, world: World) -> None:
        self.world = world
        case = world.case()
        world.run(world.run_words(*TRAINED, "shots=2", "results=results"), case)
        self.results = case / "results"
        self.learned = next(self.results.rglob("learned.safetensors"), None)
        self.readers = dict(self._readers())
        self._drawn: dict[tuple[str, int], list[Any]] = {}

    def trial(self, reader: str, seed: int) -> Trial:
        """Try the example `seed % EXAMPLES` of the examples drawn from `seed // EXAMPLES`."""
        key = (reader, seed // EXAMPLES)
        if key not in self._drawn:
            self._drawn = {key: examples(self.readers[reader].strategy, seed // EXAMPLES)}
        drawn = self._drawn[key]
        example = drawn[seed % EXAMPLES % len(drawn)]
        trial = Trial("fuzz", seed, f"{reader}: {_short(example)}")
        case = self.world.case()
        for outcome in self.readers[reader].read(self.world, case, example):
            found = outcome.complaints()
            if (case / "executed").exists():
                found.append("executed what it read")
            trial.complaints += [f"{complaint} ({' '.join(outcome.words)[-150:]})" for complaint in found]
        if reader != "results":  # there the trial itself put one
            trial.complaints += impossible_results(case)
        return trial

    def _readers(self) -> Iterator[tuple[str, Reader]]:
        rows = {
            part: [[f"{part}/{name}/{i}.png", label, name] for label, name in enumerate(COLOURS) for i in range(count)]
            for part, count in (("train", 4), ("val", 2), ("test", 5))
        }
        yield "split", Reader(damaged_json(rows), _read_split)
        lines = (self.world.base / "images.csv").read_text().splitlines()
        yield "csv", Reader(tables(tuple(lines)), _read_csv)
        yield "folders", Reader(folders, _read_folders)
        pictures = images()
        one = st.sampled_from(sorted(pictures))
        yield "overrides", Reader(st.lists(override, min_size=1, max_size=3), _read_overrides)
        lines = (self.world.base / "pairs.csv").read_text().splitlines()
        yield "pairs", Reader(tables(tuple(lines)), _read_pairs)
        valid = BytesIO()
        torch.save({"state_dict": {"ctx": torch.zeros(4, 16)}, "epoch": 50}, valid)
        torch_files = st.one_of(damaged(valid.getvalue()), pickles.map(_pickled), pickles.map(_torch_saved))
        yield "checkpoints", Reader(torch_files, _read_checkpoint)
        if self.learned is None:
            return
        yield (
            "images",
            Reader(one.flatmap(lambda name: st.tuples(st.just(name), damaged(pictures[name]))), self._read_image),
        )
        content = self.learned.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        header["__metadata__"] = {key: _parsed(value) for key, value in header["__metadata__"].items()}
        files = damaged_values(header).map(lambda changed: _safetensors(changed, content[8 + size :]))
        yield "learned files", Reader(st.one_of(files, files, damaged(content)), self._read_learned)
        result = json.loads(next(self.results.rglob("result.json")).read_text())
        yield "results", Reader(damaged_json(result), self._read_results)

    def _read_image(self, world: World, case: Path, example: tuple[str, bytes]) -> Iterator[Outcome]:
        path = case / f"x.{example[0]}"
        path.write_bytes(example[1])
        yield world.run(["predict", str(self.learned), str(path)], case)

    def _read_learned(self, world: World, case: Path, example: bytes) -> Iterator[Outcome]:
        (case / "x.safetensors").write_bytes(example)
        image = next((world.base / "images" / "test").rglob("*.png"))
        yield world.run(["predict", "x.safetensors", str(image)], case)
        yield world.run(["words", "x.safetensors"], case)

    def _read_results(self, world: World, case: Path, example: bytes) -> Iterator[Outcome]:
        shutil.copytree(self.results, case / "results")
        next((case / "results").rglob("result.json")).write_bytes(example)
        yield world.run(["table", "results"], case)
        words = ["few_shot", "results=results", *world.own_words(), *TRAINED, "shots=2", "seed=1"]
        yield world.run(["study", *words, "--status"], case)
        yield world.run(["report", *words, "--output", "report"], case)


def _read_split(world: World, case: Path, example: bytes) -> Iterator[Outcome]:
    (case / "split.json").write_bytes(example)
    yield world.run(world.run_words("method=zero_shot", "dataset.split_file=split.json", "results=results"), case)
    yield world.run(["data", "sample", "folder", "--shots", "1", "--split-file", "split.json"], case)


def _read_csv(world: World, case: Path, example: bytes) -> Iterator[Outcome]:
    (case / "x.csv").write_bytes(example)
    words = [word for word in world.own_words() if not word.startswith("dataset")]
    own = ["dataset=csv", "dataset.file=x.csv", f"dataset.root={world.base / 'images'}"]
    yield world.run(["run", *words, *own, "method=zero_shot", "results=results"], case)


def _read_folders(world: World, case: Path, example: dict[str, dict[str, str]]) -> Iterator[Outcome]:
    image = next((world.base / "images" / "test").rglob("*.png")).read_bytes()
    for name, files in example.items():
        folder = case / "own" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, kind in files.items():
            path = folder / f"{file}.png"
            if kind == "loop":
                path.symlink_to(path)
            elif kind == "folder":
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes({"image": image, "junk": b"junk", "empty": b""}[kind])
    words = [word for word in world.own_words() if not word.startswith("dataset.")]
    yield world.run(["run", *words, "dataset.root=own", "method=zero_shot", "results=results"], case)


def _read_overrides(world: World, case: Path, example: list[str]) -> Iterator[Outcome]:
    words = [word for word in example if "\0" not in word]
    yield world.run(world.run_words("method=zero_shot", "results=results", *words, "--cfg"), case)
    yield world.run(world.run_words("method=zero_shot", "results=results", *words), case)


def _read_pairs(world: World, case: Path, example: bytes) -> Iterator[Outcome]:
    (case / "pairs.csv").write_bytes(example)
    (case / "images").symlink_to(world.base / "images")
    yield _pretrain(world, case)


def _read_checkpoint(world: World, case: Path, example: bytes) -> Iterator[Outcome]:
    (case / "model.pth.tar-50").write_bytes(example)
    backbone = ["--architecture", str(world.base / "tiny.json"), "--pretrained", str(world.base / "tiny.pt")]
    yield world.run(["import", "model.pth.tar-50", *backbone, "--output", "x.safetensors"], case)
    (case / "out").mkdir()
    (case / "out" / "checkpoint.pt").write_bytes(example)
    (case / "images").symlink_to(world.base / "images")
    (case / "pairs.csv").write_bytes((world.base / "pairs.csv").read_bytes())
    yield _pretrain(world, case)


def _pretrain(world: World, case: Path) -> Outcome:
    words = ["--out", "out", "--architecture", str(world.base / "tiny.json"), "--batch", "8", "--workers", "0"]
    return world.run(["pairs.csv", *words, "--epochs", "1", "--device", "cpu"], case, main="pretrain")


def examples(strategy: st.SearchStrategy[Any], seed: int) -> list[Any]:
    """Return EXAMPLES examples, the same for the same seed."""
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def impossible_results(case: Path) -> list[str]:
    """Return a complaint for each result that a command wrote whose accuracy is no number from 0 to 1."""
    found = []
    for path in case.glob("results/**/result.json"):
        accuracies = [value for key, value in _numbers(json.loads(path.read_text())) if key == "accuracy"]
        if not all(isinstance(value, float) and 0 <= value <= 1 for value in accuracies):
            found.append(f"a result with the accuracies {accuracies[:3]}")
    return found


def _numbers(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, (dict, list)):
                yield from _numbers(inner)
            else:
                yield key, inner
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _safetensors(header: dict[str, Any], tensors: bytes) -> bytes:
    """Return a safetensors file with this header; values of the metadata become JSON text again."""
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        header = {**header, "__metadata__": texts}
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + tensors


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value)


def _torch_saved(value: Any) -> bytes:
    buffer = BytesIO()
    torch.save({"state_dict": {"ctx": value}, "optimizer": value, "step": value}, buffer)
    return buffer.getvalue()


def _short(example: Any) -> str:
    text = repr(example)
    return text if len(text) < 120 else f"{text[:80]}... ({len(text)} letters)"
