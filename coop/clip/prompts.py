"""Prompt layout: which slot of a class's prompt holds which token. Integers only; no model is needed.

A prompt is a row of integers without padding: a token id (>= 0), or a context vector (< 0): `context_slot(k)`
stands for row k of the context table. The layout is that of the original (CoOp, trainers/coop.py):

    end     [SOT] ctx_1 .. ctx_M NAME . [EOT]
    middle  [SOT] ctx_1 .. ctx_(M//2) NAME ctx_(M//2+1) .. ctx_M . [EOT]
    front   [SOT] NAME ctx_1 .. ctx_M . [EOT]

NAME is as many tokens as the name has when tokenised alone. Where its last character merges with the full stop
(names ending in ")"), the name block carries the merged token and no full stop follows, as in the original.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from coop.errors import CoopError, first_line, unknown
from coop.io import read_file

Row = tuple[int, ...]
Tokenizer = Callable[..., Tensor]

CTX_POSITIONS = ("end", "middle", "front")
_LONG = 512  # tokenise without truncation; no tower reads this far


def context_slot(k: int) -> int:
    """Return the integer that stands for row `k` of the context table."""
    return -1 - k


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer puts around a text: `head` (SOT or nothing), `tail` (EOT or nothing), and its padding id."""

    tokenizer: Tokenizer
    head: Row
    tail: Row
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Find out by tokenising nothing and a word."""
        nothing, word = tokenizer(["", "a"], context_length=_LONG).tolist()
        pad = nothing[-1]
        nothing, word = _strip(nothing, pad), _strip(word, pad)
        shared = 0
        while shared < min(len(nothing), len(word)) and nothing[shared] == word[shared]:
            shared += 1
        return cls(tokenizer, tuple(nothing[:shared]), tuple(nothing[shared:]), pad)

    def body(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's token ids without head, tail and padding."""
        if not texts:
            return []
        rows = (_strip(row, self.pad) for row in self.tokenizer(list(texts), context_length=_LONG).tolist())
        return [row[len(self.head) : len(row) - len(self.tail)] for row in rows]

    def close(self, body: Sequence[int]) -> Row:
        """Return a whole row around `body`."""
        return self.head + tuple(body) + self.tail


def readable_name(class_name: str) -> str:
    """Return a class name as it is put into a prompt: underscores are spaces (as the original)."""
    return class_name.replace("_", " ")


def learned_rows(
    vocabulary: Vocabulary,
    class_names: Sequence[str],
    n_ctx: int,
    ctx_position: str,
    class_specific: bool,
    context_length: int,
) -> list[Row]:
    """Return one row per class, with the context's slots in place.

    Class i of a class-specific context owns the slots i * n_ctx to (i + 1) * n_ctx - 1; a unified one, 0 to n_ctx - 1.
    Raises CoopError for an unknown position, or a prompt longer than `context_length`.
    """
    if ctx_position not in CTX_POSITIONS:
        raise unknown("ctx_position", ctx_position, CTX_POSITIONS)
    names = [readable_name(name) for name in class_names]
    alone = [len(body) for body in vocabulary.body(names)]
    before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[ctx_position]
    bodies = vocabulary.body([name + "." for name in names])
    lengths = [len(vocabulary.close(body)) + n_ctx for body in bodies]
    check_lengths(lengths, class_names, context_length, n_ctx)  # before rows of any length are made
    rows = []
    for i, body in enumerate(bodies):
        first = i * n_ctx if class_specific else 0
        ctx = [context_slot(first + k) for k in range(n_ctx)]
        name, rest = body[: alone[i]], body[alone[i] :]
        rows.append(vocabulary.close([*ctx[:before], *name, *ctx[before:], *rest]))
    return rows


def template_rows(
    vocabulary: Vocabulary,
    template: str,
    class_names: Sequence[str],
    context_length: int,
    underscores: bool = False,
) -> list[Row]:
    """Return one row per class of a hand-written template with `{}` for the name.

    Raises CoopError for a template without exactly one `{}`, or a prompt longer than `context_length`.
    """
    if template.count("{}") != 1 or template.replace("{}", "").count("{") + template.replace("{}", "").count("}"):
        raise CoopError(f"the template {template!r} must hold exactly one {{}}, where the class name goes")
    names = class_names if underscores else [readable_name(name) for name in class_names]
    rows = [vocabulary.close(body) for body in vocabulary.body([template.format(name) for name in names])]
    check_lengths([*map(len, rows)], class_names, context_length)
    return rows


def text_rows(vocabulary: Vocabulary, texts: Sequence[str], context_length: int) -> list[Row]:
    """Return one row per complete sentence. Raises CoopError for one longer than `context_length`."""
    rows = [vocabulary.close(body) for body in vocabulary.body(texts)]
    if rows:
        check_lengths([*map(len, rows)], texts, context_length)
    return rows


def check_lengths(lengths: Sequence[int], class_names: Sequence[str], context_length: int, n_ctx: int = 0) -> None:
    """Raise CoopError, naming the class, if a row of so many tokens does not fit the tower."""
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    if lengths[longest] > context_length:
        with_ctx = f" with n_ctx={n_ctx}" if n_ctx else ""
        fit = n_ctx - (lengths[longest] - context_length)
        advice = f"use n_ctx={fit} or less" if n_ctx and fit > 0 else "shorten the name"
        raise CoopError(
            f"the prompt of class '{class_names[longest]}' is {lengths[longest]} tokens long{with_ctx}, "
            f"but the text tower reads {context_length}: {advice}"
        )


def shared_length(rows: Sequence[Row]) -> int:
    """Return how many leading slots all rows have in common, leaving every row at least its last slot."""
    limit = min(len(row) for row in rows) - 1
    first = rows[0]
    for i in range(limit):
        if any(row[i] != first[i] for row in rows):
            return i
    return limit


def _strip(row: list[int], pad: int) -> list[int]:
    end = len(row)
    while end and row[end - 1] == pad:
        end -= 1
    return row[:end]


# The seven that OpenAI chose by forward selection over the eighty (CLIP, notebooks/Prompt_Engineering_for_ImageNet).
IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
IMAGENET_8 = (*IMAGENET_7, "a photo of a {}.")  # TaskRes, CLAP
IMAGENET_80 = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
ENSEMBLES = {"imagenet7": IMAGENET_7, "imagenet8": IMAGENET_8, "imagenet80": IMAGENET_80}
PROMPT_FILE = "file:"


def expand_template(template: str | None, dataset_template: str, dataset: str = "") -> tuple[str, ...]:
    """Return the templates that `template` stands for.

    `None` is the dataset's own; `imagenet7`, `imagenet8` and `imagenet80` are ensembles, to which the dataset's own is
    added for every dataset but ImageNet (as ZeroshotCLIP2 does); anything else is a template with `{}` for the
    class name. A prompt file (`file:...`) holds no templates: see `read_prompt_file`.
    """
    if template is None:
        return (dataset_template,)
    if template in ENSEMBLES:
        own = () if dataset == "imagenet" else (dataset_template,)
        return ENSEMBLES[template] + own
    if "{}" not in template:
        raise CoopError(
            f"template={template!r}: give a text with {{}} where the class name goes, one of {', '.join(ENSEMBLES)}, "
            f"or {PROMPT_FILE}PATH with sentences for each class"
        )
    return (template,)


def read_prompt_file(template: str, class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each class's complete sentences from the JSON file that `file:PATH` names: {class: [sentence, ...]}.

    CuPL's form. A class is looked up by its name, with underscores and spaces taken for each other. Raises CoopError
    for a file that is not of this form, and for classes that it lacks.
    """
    path = Path(template.removeprefix(PROMPT_FILE)).expanduser()
    try:
        content = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CoopError(f"template={template}: the file cannot be read ({first_line(error)})") from error
    whole = isinstance(content, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in content.values()
    )
    if not whole:
        raise CoopError(f'template={template}: the file must hold {{"class name": ["sentence", ...], ...}}')
    sentences = {readable_name(name): tuple(texts) for name, texts in content.items()}
    missing = [name for name in class_names if readable_name(name) not in sentences]
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:5])
        raise CoopError(
            f"template={template}: the file has no sentences for {len(missing)} of {len(class_names)} classes: {shown}"
        )
    return [sentences[readable_name(name)] for name in class_names]
