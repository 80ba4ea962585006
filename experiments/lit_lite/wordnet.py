"""WordNet's nouns and adjectives, read from the files of Debian's `wordnet-base`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coop.errors import CoopError

FILES = Path("/usr/share/wordnet")

LEXICOGRAPHERS = {
    0: "adj", 1: "adj", 44: "adj", 3: "top", 4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body",
    9: "cognition", 10: "communication", 11: "event", 12: "feeling", 13: "food", 14: "group", 15: "location",
    16: "motive", 17: "object", 18: "person", 19: "phenomenon", 20: "plant", 21: "possession", 22: "process",
    23: "quantity", 24: "relation", 25: "shape", 26: "state", 27: "substance", 28: "time",
}  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, what it is (`gloss`), its field (`topic`: animal, food, ...) and what it is a kind of.

    `ranks[i]` is how common this meaning is among those of `words[i]`, 0 the commonest. `parents` are the synsets of
    which a noun is a kind or an instance, or that an adjective resembles.
    """

    key: str
    topic: str
    words: tuple[str, ...]
    ranks: tuple[int, ...]
    gloss: str
    parents: tuple[str, ...]
    instance: bool


def read_synsets(folder: Path = FILES) -> dict[str, Synset]:
    """Return all noun and adjective synsets by key (`n02885233`, as ImageNet writes it)."""
    if not (folder / "data.noun").is_file():
        raise CoopError(f"WordNet was looked for in '{folder}' and is not there: apt-get install wordnet-base")
    synsets = {}
    for pos, name in (("n", "noun"), ("a", "adj")):
        senses = _read_senses(folder / f"index.{name}")
        for line in _lines(folder / f"data.{name}"):
            synset = _parse_synset(line, pos, senses)
            synsets[synset.key] = synset
    return synsets


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a WordNet file after the licence, which is indented."""
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if not line.startswith("  "))


def _read_senses(path: Path) -> dict[str, list[str]]:
    """Return the offsets of each lemma's synsets, the commonest meaning first."""
    senses = {}
    for line in _lines(path):
        fields = line.split()
        count = int(fields[2])
        senses[fields[0]] = fields[-count:]
    return senses


def _parse_synset(line: str, pos: str, senses: dict[str, list[str]]) -> Synset:
    """Read one line of a data file (wndb(5WN)): offset, topic, type, words, pointers, gloss."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    offset, topic, count = fields[0], LEXICOGRAPHERS[int(fields[1])], int(fields[3], 16)
    lemmas = [word.partition("(")[0] for word in fields[4 : 4 + 2 * count : 2]]
    ranks = tuple(senses[lemma.lower()].index(offset) for lemma in lemmas)
    start = 4 + 2 * count
    pointers = [fields[start + 1 + 4 * i : start + 5 + 4 * i] for i in range(int(fields[start]))]
    kinds = [p for p in pointers if p[0] in ("@", "@i", "&")]
    return Synset(
        key=pos + offset,
        topic=topic,
        words=tuple(lemma.replace("_", " ") for lemma in lemmas),
        ranks=ranks,
        gloss=_definition(gloss),
        parents=tuple(pos + target for _, target, *_ in kinds),
        instance=any(symbol == "@i" for symbol, *_ in kinds),
    )


def _definition(gloss: str) -> str:
    """Return the gloss without its examples, which stand in quotes after the definition."""
    return gloss.partition('; "')[0].partition(': "')[0].strip()


def ancestors(key: str, synsets: dict[str, Synset]) -> set[str]:
    """Return `key` and everything it is a kind of."""
    found: set[str] = set()
    waiting = [key]
    while waiting:
        current = waiting.pop()
        if current not in found and current in synsets:
            found.add(current)
            waiting.extend(synsets[current].parents)
    return found
