"""Nearest words by brute force in NumPy over the whole vocabulary."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from coop.clip.backbone import Backbone, load_backbone
from coop.clip.words import find_word_table, nearest_words
from coop.errors import CoopError
from coop.learned import Learned
from coop.methods.base import Classes
from coop.methods.coop import CoOp, CoOpOptions
from coop.report.words import render_words
from tests.small_place import CONFIG
from tests.small_towers import TOKENIZER


@pytest.fixture(scope="module")
def vectors(tiny_backbone: Backbone) -> torch.Tensor:
    """Return three vectors near words and one at random."""
    ids = [TOKENIZER.encode(word)[0] for word in ("photo", "forest", "dog")]
    table = tiny_backbone.token_embedding
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(4, table.shape[1], generator=random) * table.std()
    return torch.cat([table[ids], torch.zeros(1, table.shape[1])]) + noise * torch.tensor([0.1, 0.1, 0.1, 1])[:, None]


def brute_force(table: np.ndarray, vector: np.ndarray, metric: str) -> np.ndarray:
    if metric == "euclidean":
        return np.sqrt(((table - vector) ** 2).sum(axis=1))
    return 1 - table @ vector / (np.linalg.norm(table, axis=1) * np.linalg.norm(vector))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("whole_words", [False, True])
def test_nearest_words(tiny_backbone: Backbone, vectors: torch.Tensor, metric: str, whole_words: bool) -> None:
    table = tiny_backbone.token_embedding.double().numpy()
    allowed = [
        i for i, entry in TOKENIZER.decoder.items()
        if not whole_words or (entry.endswith("</w>") and TOKENIZER.decode([i]).strip().isalpha())
    ]  # fmt: skip
    found = nearest_words(vectors, tiny_backbone, 7, metric, whole_words)
    for vector, words in zip(vectors.double().numpy(), found, strict=True):
        distances = brute_force(table, vector, metric)
        best = sorted(allowed, key=lambda i: distances[i])[:7]
        assert [word.token for word in words] == best
        assert [word.distance for word in words] == pytest.approx(distances[best], rel=1e-4, abs=1e-6)
        for word in words:
            text = TOKENIZER.decode([word.token]).strip()
            assert word.text == text or ("\ufffd" in text and "\\x" in word.text)  # half a letter is shown as bytes
        assert [word.whole for word in words] == [TOKENIZER.decoder[i].endswith("</w>") for i in best]
    assert [words[0].text for words in found[:3]] == ["photo", "forest", "dog"]


def test_fragments_and_special_tokens(tiny_backbone: Backbone) -> None:
    """The beginning of a word is not the word, and SOT is none; whole words leave both out."""
    ids = {entry: i for i, entry in TOKENIZER.decoder.items()}
    tokens = [ids["sun</w>"], ids["sun"], ids["<start_of_text>"]]
    at = tiny_backbone.token_embedding[tokens]
    nearest = [words[0] for words in nearest_words(at, tiny_backbone, 1)]
    assert [(word.token, word.distance) for word in nearest] == [(token, 0) for token in tokens]
    assert [(word.text, word.whole) for word in nearest] == [("sun", True), ("sun", False), ("<start_of_text>", False)]
    whole = [words[0] for words in nearest_words(at, tiny_backbone, 1, whole_words=True)]
    assert [word.token == token for word, token in zip(whole, tokens, strict=True)] == [True, False, False]


def test_mistakes(tiny_backbone: Backbone, vectors: torch.Tensor) -> None:
    with pytest.raises(CoopError, match="context vectors are 33 wide, the token embeddings of tiny 32"):
        nearest_words(torch.zeros(2, 33), tiny_backbone)
    with pytest.raises(CoopError, match="unknown metric 'euclidian': did you mean 'euclidean'"):
        nearest_words(vectors, tiny_backbone, metric="euclidian")
    for k in (0, 50_000):
        with pytest.raises(CoopError, match=f"top={k}: give a number from 1 to 49408"):
            nearest_words(vectors, tiny_backbone, k)
    with pytest.raises(CoopError, match="not finite"):
        nearest_words(vectors * float("nan"), tiny_backbone)
    siglip = Backbone(tiny_backbone.model, tiny_backbone.preprocess, lambda t, **k: TOKENIZER(t, **k), "other")
    with pytest.raises(CoopError, match="words of a function cannot be listed"):
        nearest_words(vectors, siglip)


def test_embeddings_are_found_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a safetensors checkpoint was loaded; not when the file has changed since."""
    monkeypatch.setenv("COOP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**CONFIG).state_dict(), tmp_path / "tiny.safetensors")
    backbone = load_backbone(str(tmp_path / "tiny.json"), str(tmp_path / "tiny.safetensors"))
    assert find_word_table(backbone.identity) is not None
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    table = find_word_table(backbone.identity)
    assert table is not None and nearest_words(vectors.numpy(), table) == nearest_words(vectors, backbone)
    os.utime(tmp_path / "tiny.safetensors")
    assert find_word_table(backbone.identity) is None and find_word_table("other") is None


def test_class_specific_contexts_are_told_by_class(tiny_backbone: Backbone) -> None:
    """Text, JSON and CSV of the same words."""
    names = ("forest", "red pond")
    options = CoOpOptions(epochs=0, class_specific=True, ctx_init="photo of")
    ctx = Learned.of(CoOp(tiny_backbone, Classes(names), options)).state["ctx"]
    words = {name: nearest_words(table, tiny_backbone, 2) for name, table in zip(names, ctx, strict=True)}
    records: Any = json.loads(render_words(words, "json"))
    assert [record["class"] for record in records] == list(names)
    assert [[row[0]["text"] for row in record["context"]] for record in records] == [["photo", "of"]] * 2
    rows = list(csv.DictReader(io.StringIO(render_words(words, "csv"))))
    assert [(r["class"], r["vector"], r["rank"]) for r in rows] == [
        (name, vector, rank) for name in names for vector in "12" for rank in "12"
    ]
    assert [r["text"] for r in rows if r["rank"] == "1"] == ["photo", "of"] * 2
    text = render_words(words, "text").splitlines()
    assert text[0] == "class forest" and text[4] == "class red pond"
    assert text[2].split()[:3] == ["1", "photo", "0.0000"]
    narrow = render_words(words, "text", 30).splitlines()
    assert max(map(len, narrow)) <= 30 and narrow[0] == "class forest" and narrow[1].split()[:2] == ["1", "photo"]
    assert [line.split() for line in text if line.split()[0] in "12"] == [  # a row is two lines
        narrow[i].split() + narrow[i + 1].split() for i in (1, 3, 6, 8)
    ]
    assert render_words(words, "text", 200).splitlines() == text
    with pytest.raises(CoopError, match="unknown format 'jsno': did you mean 'json'"):
        render_words(words, "jsno")
