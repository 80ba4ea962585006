"""What the text tower reads: names in templates, behind random contexts, with what they are a kind of, and glosses."""

import random
from dataclasses import dataclass
from functools import lru_cache

import open_clip

TEMPLATES = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
ADJECTIVE_TEMPLATES = (
    "{} texture.", "a {} texture.", "{} pattern.", "a {} pattern.", "{} surface.", "a {} surface.", "{} material.",
    "a photo of a {} texture.", "a photo of a {} surface.", "a photo of a {} pattern.", "something {}.",
    "a {} thing.", "a photo of something {}.", "a {} object.", "a photo of a {} object.",
)  # fmt: skip
KIND_TEMPLATES = ("a photo of a {}, a type of {}.", "{}, a type of {}.", "a {}, a kind of {}.")
LONGEST_CONTEXT = 16


@dataclass(frozen=True)
class Concept:
    """Something that has an image feature to aim at, and the words for it, the likelier drawn more often."""

    words: tuple[str, ...]
    weights: tuple[float, ...]
    kinds: tuple[str, ...]  # words for what it is a kind of
    gloss: str
    adjective: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids without SOT and EOT; the first `n_random` slots hold random vectors instead of their tokens."""

    ids: tuple[int, ...]
    n_random: int = 0


@lru_cache(maxsize=1)
def tokenizer() -> open_clip.SimpleTokenizer:
    """Return CLIP's own tokenizer, once."""
    return open_clip.SimpleTokenizer()


@lru_cache(maxsize=400_000)
def token_ids(text: str) -> tuple[int, ...]:
    """Return the token ids of a text, without SOT and EOT."""
    return tuple(tokenizer().encode(text))


def draw_prompt(concept: Concept, rng: random.Random, longest: int = 40) -> Prompt:
    """Draw one prompt for a concept.

    Half of the prompts are what prompt learning begins with: a context that means nothing, then the bare name and a
    full stop. The others are what people write: templates, "a type of", glosses.
    """
    name = rng.choices(concept.words, concept.weights)[0]
    kind = rng.choice(concept.kinds) if concept.kinds else ""
    chance = rng.random()
    if chance < 0.5:
        return _behind_random_context(name, rng, longest)
    if chance < 0.75 or not (kind or concept.gloss):
        text = rng.choice(ADJECTIVE_TEMPLATES if concept.adjective else TEMPLATES).format(name)
    elif chance < 0.9 and kind:
        text = rng.choice(KIND_TEMPLATES).format(name, kind)
    else:
        text = rng.choice((f"{name}: {concept.gloss}", concept.gloss, f"a photo of a {name}, {concept.gloss}"))
    return Prompt(token_ids(text)[:longest])


def _behind_random_context(name: str, rng: random.Random, longest: int) -> Prompt:
    """Return the bare name behind 0-16 random vectors, or behind as many random tokens."""
    ids = token_ids(f"{name}.")[: longest - LONGEST_CONTEXT]
    length = rng.choice((0, 1, 2, 4, 4, 8, 16, 16, rng.randint(1, LONGEST_CONTEXT)))
    tokens = tuple(rng.randrange(len(tokenizer().encoder) - 2) for _ in range(length))
    return Prompt(tokens + ids, n_random=length if rng.random() < 0.6 else 0)
