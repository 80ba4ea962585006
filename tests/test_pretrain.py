"""Contrastive pre-training: its loss by definition, exact resumption, a model that plain open_clip loads."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from coop.clip.backbone import load_backbone
from coop.errors import CoopError
from experiments.pretrain.__main__ import main
from experiments.pretrain.loop import CHECKPOINT, Schedule, fit
from experiments.pretrain.model import contrastive_loss, train
from experiments.pretrain.pairs import batch_keys, read_pairs

COLOURS = {
    "red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240),
    "yellow": (230, 220, 40), "black": (15, 15, 15), "pink": (240, 130, 180), "cyan": (40, 220, 220),
}  # fmt: skip
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SCHEDULE = Schedule(steps=6, lr=1e-3, warmup=2, save_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return captioned images: 24 of eight plain colours, and a configuration of a tiny model."""
    folder = tmp_path_factory.mktemp("pretrain")
    rng = np.random.default_rng(0)
    (folder / "pairs").mkdir()
    for i in range(24):
        name, colour = list(COLOURS.items())[i % 8]
        pixels = np.clip(np.array(colour) + rng.normal(0, 10, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pairs" / f"{i:02d}.png")
        (folder / "pairs" / f"{i:02d}.txt").write_text(f"a {name} square\nsomething {name}\n")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def run(*words: object) -> int:
    """Call the command as the command line does."""
    return main([*map(str, words)])


def trained(folder: Path, out: Path, schedule: Schedule) -> dict[str, Any]:
    """Return the tiny model's weights after training."""
    backbone = load_backbone(str(folder / "tiny.json"), "random")
    train(backbone, read_pairs(folder / "pairs"), schedule, 8, out)
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def test_loss_is_the_mean_cross_entropy_of_both_directions() -> None:
    """Against numpy, written out from CLIP's figure 3."""
    rng = np.random.default_rng(1)
    images, texts, scale = rng.normal(size=(5, 7)), rng.normal(size=(5, 7)), 12.5
    model = SimpleNamespace(
        logit_scale=torch.tensor(np.log(scale)),
        encode_image=lambda x: x,
        encode_text=lambda x: x,
    )
    value = contrastive_loss(model)((torch.tensor(images), torch.tensor(texts)))

    i_e = images / np.linalg.norm(images, axis=1, keepdims=True)
    t_e = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    logits = scale * i_e @ t_e.T
    by_image = -np.log(np.exp(logits).diagonal() / np.exp(logits).sum(axis=1)).mean()
    by_text = -np.log(np.exp(logits).diagonal() / np.exp(logits).sum(axis=0)).mean()
    assert value.item() == pytest.approx((by_image + by_text) / 2, rel=1e-5)


def test_logit_scale_is_kept_below_a_hundred() -> None:
    model = SimpleNamespace(logit_scale=torch.tensor(9.0), encode_image=lambda x: x, encode_text=lambda x: x)
    contrastive_loss(model)((torch.eye(3), torch.eye(3)))
    assert model.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.slow
def test_interrupted_run_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Augmentation, captions and batches go on as if nothing had happened."""
    whole = trained(folder, tmp_path / "whole", SCHEDULE)

    class Interrupted(Exception):
        pass

    backbone = load_backbone(str(folder / "tiny.json"), "random")
    calls = 0
    encode_text = backbone.model.encode_text

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # after the checkpoint at step 4
            raise Interrupted
        return encode_text(*args, **kwargs)

    backbone.model.encode_text = failing  # type: ignore[method-assign,assignment]
    with pytest.raises(Interrupted):
        train(backbone, read_pairs(folder / "pairs"), SCHEDULE, 8, tmp_path / "cut")
    resumed = trained(folder, tmp_path / "cut", SCHEDULE)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other_seed = trained(folder, tmp_path / "other", replace(SCHEDULE, seed=2))
    assert not torch.equal(whole["token_embedding.weight"], other_seed["token_embedding.weight"])


def test_resuming_with_another_schedule_or_model_is_refused(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path, SCHEDULE)
    with pytest.raises(CoopError, match=r"lr=0.001.*another folder"):
        trained(folder, tmp_path, replace(SCHEDULE, lr=0.1))
    with pytest.raises(CoopError, match="another architecture"):
        fit(nn.Linear(1, 1), lambda start: [0.0], lambda batch: torch.zeros(()), SCHEDULE, tmp_path)


def test_every_epoch_shows_every_pair_once_and_batches_depend_on_the_step_alone() -> None:
    keys = batch_keys(10, 3, seed=5, start=0)
    batches = [next(keys) for _ in range(9)]
    for epoch in range(3):
        seen = [index for batch in batches[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(seen)) == 9
        assert {e for batch in batches[3 * epoch : 3 * epoch + 3] for e, _ in batch} == {epoch}
    late = batch_keys(10, 3, seed=5, start=7)
    assert [next(late), next(late)] == batches[7:]


@pytest.mark.slow
def test_trains_a_model_that_plain_open_clip_loads_and_that_knows_the_colours(folder: Path, tmp_path: Path) -> None:
    """From a folder; the weights go through open_clip's own loading, and name each colour's image."""
    options = ["--architecture", folder / "tiny.json", "--epochs", 80, "--batch", 8, "--workers", 0]
    assert run(folder / "pairs", "--out", tmp_path, "--lr", 3e-3, "--warmup", 5, "--weight-decay", 0, *options) == 0
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=12)
    images = torch.stack([preprocess(Image.open(folder / "pairs" / f"{i:02d}.png")) for i in range(8)])
    with torch.no_grad():
        image_features = model.encode_image(images, normalize=True)
        text_features = model.encode_text(tokenizer([f"a {name} square" for name in COLOURS]), normalize=True)
    right = (image_features @ text_features.T).argmax(dim=1) == torch.arange(8)
    assert right.sum() >= 6  # chance is 1

    backbone = load_backbone(str(tmp_path / "open_clip_config.json"), str(tmp_path / "open_clip_model.safetensors"))
    assert torch.allclose(backbone.encode_images(images), model.encode_image(images), atol=1e-5)


def test_locked_image_tower_learns_from_cached_features(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image half stays as it was, and features from a file do what features computed here do."""
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        writer.writerows([f"pairs/{i:02d}.png", f"a {list(COLOURS)[i % 8]} square"] for i in range(24))
    options = ["--architecture", folder / "tiny.json", "--epochs", 2, "--batch", 8, "--warmup", 1]
    assert run(folder / "pairs.csv", "--out", tmp_path / "a", "--lock-image", *options) == 0
    before = load_backbone(str(folder / "tiny.json"), "random").model.state_dict()
    after = load_file(tmp_path / "a" / "open_clip_model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "text_projection" in changed
    assert not any(name.startswith("visual.") for name in changed)

    features = tmp_path / "a" / "image_features.safetensors"
    assert run(folder / "pairs.csv", "--out", tmp_path / "b", "--features", features, *options) == 0
    again = load_file(tmp_path / "b" / "open_clip_model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)

    short = tmp_path / "short.safetensors"
    save_file({name: rows[:-1].contiguous() for name, rows in load_file(features).items()}, short)
    assert run(folder / "pairs.csv", "--out", tmp_path / "c", "--features", short, *options) == 2
    assert "24 pairs" in capsys.readouterr().err


def test_sources_without_pairs_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CoopError, match="no file and no folder"):
        read_pairs(tmp_path / "nothing")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(CoopError, match=r"x\.png: write it into x\.txt"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.csv").write_text("file,words\nx.png,a dot\n")
    with pytest.raises(CoopError, match="columns file, words: one must be called image"):
        read_pairs(tmp_path / "pairs.csv")
    (tmp_path / "pairs.csv").write_text("image,text\ny.png,a dot\n")
    with pytest.raises(CoopError, match=r"not there: .*y\.png"):
        read_pairs(tmp_path / "pairs.csv")


@pytest.mark.parametrize(
    "words",
    [
        "--batch 25", "--batch 1", "--epochs 0", "--save-every 0", "--lr nan", "--lr inf", "--lr -1", "--lr 0",
        "--weight-decay -1", "--weight-decay nan", "--warmup -1", "--workers -1", "--seed -1", f"--seed {10**30}",
    ],
)  # fmt: skip
def test_values_that_no_training_can_use_are_refused_before_a_model_is_loaded(
    words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--architecture", "no-such-model", "--batch", 8, *words.split()]
    assert run(folder / "pairs", "--out", tmp_path, *options) == 2
    message = capsys.readouterr().err
    option, value = words.split()
    assert option.lstrip("-").replace("-", "_") in message.replace("-", "_") and value[:20] in message
    assert message.count("\n") == 1 and "Traceback" not in message


def test_sources_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(b"image,text\nx.png,caf\xe9\n")
    with pytest.raises(CoopError, match="UTF-8"):
        read_pairs(tmp_path / "pairs.csv")
    (tmp_path / "pairs.csv").write_bytes(b"image,text\n\0x.png,a dot\n")
    with pytest.raises(CoopError):
        read_pairs(tmp_path / "pairs.csv")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CoopError, match="UTF-8"):
        read_pairs(tmp_path)


class Malicious:
    """Unpickles to a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.slow
def test_damaged_and_malicious_checkpoints_are_named_and_never_executed(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path, SCHEDULE)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    short = {index: {**some, "exp_avg": torch.zeros(1)} for index, some in state["optimizer"]["state"].items()}
    others: list[Any] = [
        [], {}, {**state, "step": "5"}, {**state, "step": 10**9}, {**state, "optimizer": {"state": {0: 1}}},
        {**state, "optimizer": {**state["optimizer"], "state": short}}, {**state, "model": {"x": 1}},
        {**state, "model": {name: tensor * float("nan") for name, tensor in state["model"].items()}},
        {**state, "extra": Malicious(Path.touch, tmp_path / "executed")},
        Malicious(Path.touch, tmp_path / "executed"),
    ]  # fmt: skip
    for other in others:
        torch.save(other, tmp_path / CHECKPOINT)
        with pytest.raises(CoopError, match=CHECKPOINT) as caught:
            trained(folder, tmp_path, SCHEDULE)
        assert "weights_only" not in str(caught.value)  # torch's advice is to execute it
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-100]):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(CoopError, match=CHECKPOINT):
            trained(folder, tmp_path, SCHEDULE)
    assert not (tmp_path / "executed").exists()


def test_what_a_killed_run_left_behind_is_removed(folder: Path, tmp_path: Path) -> None:
    for name in (f"{CHECKPOINT}.partial", f".{CHECKPOINT}.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"half")
    trained(folder, tmp_path, SCHEDULE)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT}


def test_a_refusing_system_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    options = ["--architecture", folder / "tiny.json", "--batch", 8, "--epochs", 1]
    assert run(folder / "pairs", "--out", tmp_path / "file" / "out", *options) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_diverging_run_stops_with_advice(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(CoopError, match="loss is nan at step 0: lower lr"):
        fit(model, lambda start: [0.0], lambda batch: model.weight.sum() * float("nan"), SCHEDULE, tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_learning_rate_grows_linearly_then_falls_as_half_a_cosine() -> None:
    schedule = Schedule(steps=110, lr=0.1, warmup=10)
    assert schedule.lr_at(0) == pytest.approx(0.01)
    assert schedule.lr_at(9) == schedule.lr_at(10) == pytest.approx(0.1)
    assert schedule.lr_at(60) == pytest.approx(0.05)
    assert schedule.lr_at(109) < 1e-4
    cut = replace(schedule, steps=80, horizon=110, cooldown=40)
    assert cut.lr_at(40) == schedule.lr_at(40)
    assert cut.lr_at(60) == pytest.approx(schedule.lr_at(60) / 2)
