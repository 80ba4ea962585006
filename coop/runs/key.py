"""What makes a run the run that it is: two equal keys give the same result. Makes its hash and its folder."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from coop.config import RunConfig
from coop.errors import CoopError, short, unknown
from coop.io import ASSETS
from coop.options import OPTIONS, MethodOptions, flat, method_options

DEFAULT_VALIDATION = "min4"  # CoOp's rule, and that of results which do not name theirs
LONGEST_NAME = 100  # characters of one folder's name

Targets = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class RunKey:
    """What a run is. A planned run has no digests of data yet.

    `data` is the dataset's digest, `targets` the other datasets that the run is tested on, by name, with theirs.
    `pretrained` is a tag, or the digest of a weights file. `shots` and `seed` are 0 for a method that does not train;
    `validation` is None for one that chooses nothing on a validation sample. `sample` is a sample file's digest,
    `prompts` that of the file that the option `template=file:PATH` names.
    """

    dataset: str
    dataset_template: str
    data: str | None
    backbone: str
    architecture: str | None
    pretrained: str | None
    precision: str
    method: str
    options: MethodOptions
    protocol: str
    targets: Targets
    shots: int | str
    seed: int
    validation: str | None
    sample: str | None
    prompts: str | None = None

    def __hash__(self) -> int:  # options may hold lists
        return hash((self.dataset, self.backbone, self.method, self.shots, self.seed, self.targets, repr(self.options)))

    @classmethod
    def of(cls, config: RunConfig) -> "RunKey":
        """Return the key of a configured run, as far as it is known without reading its data."""
        backbone, options = config.backbone, config.options
        return cls(
            dataset=config.dataset.name,
            dataset_template=config.dataset.template,
            data=None,
            backbone=backbone.name,
            architecture=file_digest(backbone.architecture),
            pretrained=file_digest(backbone.pretrained or _embedded(backbone.architecture)),
            precision=config.precision,
            method=config.method,
            options=options,
            protocol=config.protocol.name,
            targets=tuple(sorted((target.name, None) for target in config.protocol.targets)),
            shots=config.shots,
            seed=config.seed,
            validation=config.validation if options.uses_validation else None,
            sample=None,
            prompts=_prompt_file_digest(getattr(options, "template", None)),
        )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "RunKey":
        """Return the key that `as_dict` wrote, of this version or of an older one.

        What an older version did not write had its default. Raises CoopError for what is not a key.
        """
        if not isinstance(mapping, Mapping):
            raise CoopError("the key of the run is not a mapping")
        method = mapping.get("method")
        if not isinstance(method, str) or method not in OPTIONS:
            raise unknown("method", str(method), OPTIONS)
        options = method_options(OPTIONS[method], mapping)
        for name in ("dataset", "dataset_template", "backbone", "precision", "protocol"):
            if not isinstance(mapping.get(name), str):
                raise CoopError(f"the key of the run has {name}={short(mapping.get(name), 60)}: it must be a text")
        for name in ("data", "architecture", "pretrained", "validation", "sample", "prompts"):
            if not isinstance(mapping.get(name), str | None):
                raise CoopError(
                    f"the key of the run has {name}={short(mapping.get(name), 60)}: it must be a text or null"
                )
        shots, seed = mapping.get("shots"), mapping.get("seed")
        if not (_whole(shots) or shots == "all") or not _whole(seed):
            raise CoopError(
                f"the key of the run has shots={short(shots, 60)}, seed={short(seed, 60)}: give whole numbers"
            )
        targets = mapping.get("targets") or {}
        if not isinstance(targets, Mapping):  # a planned run's, of older versions: names alone
            targets = dict.fromkeys(map(str, targets))
        if not all(isinstance(name, str) and isinstance(digest, str | None) for name, digest in targets.items()):
            raise CoopError(f"the key of the run has targets={short(targets, 60)}: give a name and a digest for each")
        validation = mapping.get("validation", DEFAULT_VALIDATION)
        known: dict[str, Any] = {name: mapping.get(name) for name in (*_TEXTS, "shots", "seed")}
        return cls(
            **known,
            method=method,
            options=options,
            targets=tuple(sorted(targets.items())),
            validation=(validation or DEFAULT_VALIDATION) if options.uses_validation else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the key as result.json has it: flat, options by their command-line keys (`augment.views`)."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("options", "targets")}
        if self.prompts is None:  # so that the hashes of all other runs are what they were
            del out["prompts"]
        return {**out, **flat(vars(self.options)), "targets": dict(self.targets)}

    def columns(self) -> dict[str, Any]:
        """Return what tables know of a run: the key without digests of data; `sample` where it has one of its own."""
        left_out = {"data", "targets", *(() if self.sample else ("sample",))}
        return {name: value for name, value in self.as_dict().items() if name not in left_out}

    def planned(self) -> "RunKey":
        """Return the key without what only the data tells; two runs are the same cell where these are equal.

        A run of a sample file of its own stays apart from those that draw their sample.
        """
        return replace(self, data=None, targets=tuple((name, None) for name, _ in self.targets))

    @cached_property
    def digest(self) -> str:
        """Return the sha256 of all that the run is."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def folder(self, results: Path) -> Path:
        """Return the run's folder: results/dataset/backbone/method/shots16-seed1-...-<8 digits of `digest`>.

        Its name says what differs from the method's defaults, and the epochs where they are not the protocol's.
        """
        kind = type(self.options)
        words = [f"shots{self.shots}", f"seed{self.seed}"] if kind.trains else []
        default = flat(vars(kind().resolved(self.shots, self.dataset)))
        for name, value in flat(vars(self.options)).items():
            if value != default[name] and value is not None:
                words.append(f"{name}-{_value_word(value)}")
        if self.validation not in (None, DEFAULT_VALIDATION):
            words.append(f"validation-{self.validation}")
        if self.precision != "fp32":
            words.append(self.precision)
        if self.protocol != "all_classes":
            words.append(self.protocol)
        if self.sample:
            words.append("own-sample")
        name = safe_name("-".join(words or ["default"]), LONGEST_NAME - 9)
        places = (safe_name(text) for text in (self.dataset, self.backbone, self.method))
        return results.joinpath(*places, f"{name}-{self.digest[:8]}")


_TEXTS = (
    "dataset", "dataset_template", "data", "backbone", "architecture", "pretrained", "precision", "protocol", "sample",
    "prompts",
)  # fmt: skip


def safe_name(text: str, longest: int = 60) -> str:
    """Return `text` as the name of one folder: no separators, no leading dot, not longer than `longest`.

    A name that is cut ends in digits of its hash, so that two long names stay two folders.
    """
    name = re.sub(r"[^\w.=+-]+", "_", text).lstrip(".") or "_"
    if len(name.encode()) <= longest:
        return name
    return f"{name.encode()[: longest - 9].decode(errors='ignore')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


_digests: dict[tuple[str, int, int], str] = {}


def file_digest(name: str | None) -> str | None:
    """Return a name as it is, and a file as the digest of its content, so that a changed file is another run."""
    path = Path(name) if name else None
    if path is None or not path.is_file():
        return name
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return _digests[key]


def _prompt_file_digest(template: str | None) -> str | None:
    """Return the digest of the file of `file:PATH`, `+file:PATH` or `TEMPLATE+file:PATH`; None for other templates."""
    _, mark, path = (template or "").partition("file:")
    return file_digest(str(Path(path).expanduser())) if mark else None


def _embedded(architecture: str) -> str | None:
    """Return the file whose content decides what the embedded model is."""
    return str(ASSETS / "lit_lite" / "text.safetensors") if architecture == "lit_lite" else None


def _value_word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)}-of-{hashlib.sha256(json.dumps(list(value)).encode()).hexdigest()[:6]}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
