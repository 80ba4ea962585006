"""Which slot of a prompt holds which token: against the original's construction, restated from trainers/coop.py."""

import json
import os
from pathlib import Path

import pytest
import torch

from coop.clip.prompts import Vocabulary, expand_template, learned_rows, read_prompt_file, shared_length, template_rows
from coop.errors import CoopError
from tests.small_towers import TOKENIZER

NAMES = (
    "forest",
    "annual crop land",
    "yin_yang",
    "kite (bird of prey)",  # ")." is one token: the name alone and in its prompt end differently
    "707-320",
    "2012_BMW (M3)",
    "café au lait",
    "ice cream!",
    "X",
)
SOT, EOT, PLACEHOLDER = 49406, 49407, 343


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(TOKENIZER)


def original_row(name: str, m: int, position: str, ctx: list[int]) -> list[int]:
    """Return the 77 slots that the original builds from the tokens of "X X .. X name." and the name's own length."""
    name = name.replace("_", " ")
    ids = TOKENIZER([" ".join(["X"] * m) + " " + name + "."])[0].tolist()
    assert ids[0] == SOT and ids[1 : 1 + m] == [PLACEHOLDER] * m
    prefix, suffix = ids[:1], ids[1 + m :]
    length, half = len(TOKENIZER.encode(name)), m // 2
    if position == "end":
        return prefix + ctx + suffix
    if position == "middle":
        return prefix + ctx[:half] + suffix[:length] + ctx[half:] + suffix[length:]
    return prefix + suffix[:length] + ctx + suffix[length:]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True], ids=["unified", "csc"])
def test_slots_are_the_originals(vocabulary: Vocabulary, m: int, position: str, class_specific: bool) -> None:
    rows = learned_rows(vocabulary, NAMES, m, position, class_specific, 77)
    for i, (name, row) in enumerate(zip(NAMES, rows, strict=True)):
        first = i * m if class_specific else 0
        vectors = [-1 - (first + k) for k in range(m)]
        expected = original_row(name, m, position, vectors)
        assert list(row) + [0] * (77 - len(row)) == expected
        assert expected.index(EOT) == len(row) - 1  # the original pools where the placeholder prompt has its EOT


def test_a_bracket_at_the_end_takes_the_full_stop_along(vocabulary: Vocabulary) -> None:
    """In "kite (bird of prey)." the merged token belongs to the name, and nothing stands between context and EOT."""
    (bracket, plain) = learned_rows(vocabulary, ("kite (bird of prey)", "kite"), 2, "front", False, 77)
    (merged,) = TOKENIZER.encode(").")
    assert bracket[-4:] == (merged, -1, -2, EOT)
    assert plain[-4:] == (-1, -2, TOKENIZER.encode(".")[0], EOT)


def test_hand_written_rows_are_the_tokenizers(vocabulary: Vocabulary) -> None:
    template = "a bad photo of the {}, a type of thing."
    rows = template_rows(vocabulary, template, NAMES, 77)
    whole = TOKENIZER([template.replace("{}", name.replace("_", " ")) for name in NAMES])
    assert [list(row) + [0] * (77 - len(row)) for row in rows] == whole.tolist()


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_too_long_a_prompt_names_class_limit_and_what_fits(vocabulary: Vocabulary, position: str) -> None:
    names = ("forest", "a rather long name of a class")  # 7 tokens, with SOT, full stop and EOT 10
    assert max(map(len, learned_rows(vocabulary, names, 22, position, False, 32))) == 32
    with pytest.raises(CoopError) as caught:
        learned_rows(vocabulary, names, 25, position, False, 32)
    assert "\n" not in str(caught.value)
    for part in ("'a rather long name of a class'", "35 tokens", "n_ctx=25", "reads 32", "n_ctx=22 or less"):
        assert part in str(caught.value)


def test_a_name_too_long_for_any_context(vocabulary: Vocabulary) -> None:
    with pytest.raises(CoopError, match=r"'word word.*' is 85 tokens long.* reads 77: shorten the name"):
        learned_rows(vocabulary, ["word " * 80], 2, "end", False, 77)
    with pytest.raises(CoopError, match="'word word .*but the text tower reads 77: shorten the name"):
        template_rows(vocabulary, "a photo of a {}.", ["forest", "word " * 80], 77)


@pytest.mark.parametrize("template", ["a photo.", "a {} of {}.", "a {0}.", "a {} {name}.", "a {} {", "}{} {"])
def test_a_template_needs_one_place_for_the_name(vocabulary: Vocabulary, template: str) -> None:
    with pytest.raises(CoopError, match="must hold exactly one {}"):
        template_rows(vocabulary, template, ["forest"], 77)


def test_an_unknown_position_gets_the_closest(vocabulary: Vocabulary) -> None:
    with pytest.raises(CoopError, match="unknown ctx_position 'midle': did you mean 'middle'"):
        learned_rows(vocabulary, ["forest"], 4, "midle", False, 77)


def test_shared_slots_are_the_longest_common_prefix(vocabulary: Vocabulary) -> None:
    """A unified context at the end is shared whole, class-specific ones only up to SOT; the last slot never is."""
    for position in ("end", "middle", "front"):
        for class_specific in (False, True):
            rows = learned_rows(vocabulary, NAMES, 4, position, class_specific, 77)
            assert shared_length(rows) == len(os.path.commonprefix(rows))
    unified = learned_rows(vocabulary, NAMES, 4, "end", False, 77)
    assert shared_length(unified) == 5
    assert shared_length(unified[:1]) == len(unified[0]) - 1


def words_to_ids(texts: list[str], context_length: int, head: list[int], tail: list[int], pad: int) -> torch.Tensor:
    rows = [head + [10 + len(word) for word in text.split()] + tail for text in texts]
    return torch.tensor([row + [pad] * (context_length - len(row)) for row in rows])


@pytest.mark.parametrize(
    "head, tail, pad", [([], [], 1), ([], [1], 0), ([101], [], 0), ([2], [3], 0), ([5, 6], [7, 8], 9)]
)
def test_finds_out_what_a_tokenizer_puts_around_a_text(head: list[int], tail: list[int], pad: int) -> None:
    """SigLIP's has no start and pads with its end, SigLIP 2's only an end, CLIPA's only a start."""
    vocabulary = Vocabulary.of(lambda texts, context_length: words_to_ids(texts, context_length, head, tail, pad))
    assert (vocabulary.head, vocabulary.tail, vocabulary.pad) == (tuple(head), tuple(tail), pad)
    assert vocabulary.body(["one", "three word text"]) == [[13], [15, 14, 14]]
    assert vocabulary.close([13]) == (*head, 13, *tail)


def test_ensembles_add_the_datasets_own_template() -> None:
    assert len(expand_template("imagenet7", "a {}.", "imagenet")) == 7
    assert expand_template("imagenet8", "a {}.", "imagenet")[-1] == "a photo of a {}."
    assert expand_template("imagenet8", "a {}.", "dtd")[-2:] == ("a photo of a {}.", "a {}.")


def test_a_prompt_file_gives_each_class_its_sentences(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"yin yang": ["One.", "Two."], "forest": ["Trees."], "unused": ["x"]}))
    assert read_prompt_file(f"file:{path}", ["forest", "yin_yang"]) == [("Trees.",), ("One.", "Two.")]
    with pytest.raises(CoopError, match="no sentences for 1 of 2 classes: 'abbey'"):
        read_prompt_file(f"file:{path}", ["forest", "abbey"])


@pytest.mark.parametrize("text", ["[1]", '{"forest": "Trees."}', '{"forest": []}', '{"forest": [" "]}', "{", "\xff"])
def test_a_prompt_file_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CoopError, match="template=file:.*prompts.json") as caught:
        read_prompt_file(f"file:{path}", ["forest"])
    assert "\n" not in str(caught.value)
    with pytest.raises(CoopError, match="cannot be read"):
        read_prompt_file(f"file:{tmp_path}", ["forest"])
