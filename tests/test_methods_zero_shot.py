"""Zero-shot CLIP and WaffleCLIP against whole prompts through open_clip's text tower."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from coop.clip.backbone import Backbone
from coop.errors import CoopError
from coop.methods.base import Classes, scaled_cosine, text_features
from coop.methods.zero_shot import Waffle, ZeroShot, descriptors
from coop.options import WaffleOptions, ZeroShotOptions
from tests.methods_plain import CLASSES, NAMES, encode, hand_written, sample


def test_zero_shot(tiny_backbone: Backbone) -> None:
    f = sample(tiny_backbone, shots=2).test_view
    expected = tiny_backbone.logit_scale * F.normalize(f, dim=1) @ hand_written(tiny_backbone, "my {}!").T
    method = ZeroShot(tiny_backbone, CLASSES, ZeroShotOptions("my {}!"))
    torch.testing.assert_close(method.logits(f), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_class_features_without_a_direction_are_an_error(factor: float, tiny_backbone: Backbone) -> None:
    """Normalised they are 0: every class would have the same logit, and the first would win."""
    features = F.normalize(factor * torch.randn(3, 32), dim=-1)
    assert not features.any()
    with torch.no_grad(), pytest.raises(CoopError, match="3 of 3 classes"):
        scaled_cosine(tiny_backbone, torch.randn(2, 32), features)


def test_waffle_is_the_mean_of_its_prompts_cosines(tiny_backbone: Backbone) -> None:
    method = Waffle(tiny_backbone, CLASSES, WaffleOptions(repetitions=3))
    assert len(set(method.descriptors)) == 6
    f = F.normalize(sample(tiny_backbone, shots=2).test_view, dim=1)
    names = [name.replace("_", " ") for name in NAMES]
    cosines = [
        f @ F.normalize(encode(tiny_backbone, [f"A photo of a {name}, which has {text}." for name in names]), dim=1).T
        for text in method.descriptors
    ]
    expected = tiny_backbone.logit_scale * torch.stack(cosines).mean(dim=0)
    torch.testing.assert_close(method.logits(f), expected, rtol=1e-4, atol=1e-4)
    moved = method.for_classes(Classes(("river", "abbey"))).logits(f)
    torch.testing.assert_close(moved[:, 1], expected[:, NAMES.index("abbey")], rtol=1e-4, atol=1e-4)


def test_descriptors_are_random_words_and_characters_of_the_names_size() -> None:
    names = ("forest", "annual crop land", "great white shark", "yin_yang")
    found = descriptors(names, 20, seed=3)
    assert found == descriptors(names, 20, seed=3) != descriptors(names, 20, seed=4)
    assert len(found) == 40 and len(set(found)) == 40
    words, characters = found[::2], found[1::2]
    assert all(re.fullmatch(r"[a-z]{4,5} [a-z]{4,5}", text) for text in words)  # 2.25 words, 4.8 letters in a word
    assert all(re.fullmatch(r"[a-z0-9]{4}, [a-z0-9]{4}", text) for text in characters)  # 5.25 in the longest word


def mean_of(backbone: Backbone, prompts: list[list[str]], unit: bool) -> torch.Tensor:
    """Return each class's mean over its prompts, of unit features (made unit again) or of features as they are."""
    rows = []
    for texts in prompts:
        encoded = encode(backbone, texts)
        mean = (F.normalize(encoded, dim=1) if unit else encoded).mean(dim=0)
        rows.append(F.normalize(mean, dim=0) if unit else mean)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("before", ["", "my {}!+", "+"])
def test_prompts_of_a_file_alone_or_with_templates(
    tiny_backbone: Backbone, tmp_path: Path, before: str, unit: bool
) -> None:
    """Every prompt counts as one, also where the classes have different numbers of sentences."""
    sentences = {name.replace("_", " "): [f"{i} {name} seen." for i in range(1 + c)] for c, name in enumerate(NAMES)}
    (tmp_path / "prompts.json").write_text(json.dumps(sentences))
    template = {"": None, "my {}!+": "my {}!", "+": CLASSES.template}[before]
    names = [name.replace("_", " ") for name in NAMES]
    prompts = [sentences[name] + ([template.format(name)] if template else []) for name in names]
    found = text_features(
        tiny_backbone, CLASSES, f"{before}file:{tmp_path / 'prompts.json'}", "unit" if unit else "raw"
    )
    torch.testing.assert_close(found, mean_of(tiny_backbone, prompts, unit), rtol=1e-4, atol=1e-5)


def test_raw_means_and_underscores(tiny_backbone: Backbone) -> None:
    for keep in (True, False):
        prompts = [[f"my {name if keep else name.replace('_', ' ')}!"] for name in NAMES]
        found = text_features(tiny_backbone, CLASSES, "my {}!", "raw", underscores=keep)
        torch.testing.assert_close(found, mean_of(tiny_backbone, prompts, False), rtol=1e-4, atol=1e-5)


def test_refusals(tiny_backbone: Backbone) -> None:
    with pytest.raises(CoopError, match="repetitions=0"):
        WaffleOptions(repetitions=0)
    with pytest.raises(CoopError, match="template"):
        WaffleOptions(template="a photo.")
