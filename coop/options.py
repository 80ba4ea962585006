"""The options of every method: keys of the command line, with types, defaults and checks. The only place of defaults.

No torch here: studies, tables and reports read options without loading it. A method's class is in `coop.methods`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coop.errors import CoopError, unknown, wrong_value

Tap = Literal["final", "pre_projection", "pixels"]  # image features, features before the last projection, uint8 pixels
PLUGINS = "coop.methods"  # the entry-point group in which other packages offer methods
PRECISIONS = ("fp32", "bf16", "fp16")  # of the frozen towers
CTX_POSITIONS = ("end", "middle", "front")
ADAPTER_BRANCHES = {"visual": ("visual",), "text": ("text",), "both": ("visual", "text")}


AnyOptions = TypeVar("AnyOptions", bound="MethodOptions")
T = TypeVar("T", bound="Training")
K = TypeVar("K", bound="TrainedCacheOptions")
C = TypeVar("C", bound="TcpOptions")
S = TypeVar("S", bound="StepTraining")
TaskResT = TypeVar("TaskResT", bound="TaskResOptions")


def check_whole(minimum: int, **values: int | None) -> None:
    """Raise CoopError for a number below `minimum`; None passes."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise CoopError(f"{name}={value}: give {minimum} or more")


def check_not_negative(options: object, *names: str) -> None:
    """Raise CoopError unless these options are finite numbers from 0 on, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise CoopError(f"{name}={value}: give 0 or more")


@dataclass(frozen=True)
class MethodOptions:
    """What all options share. `trains`: whether shots and seed are part of what a run is. `reads`: the cache's tap."""

    trains: ClassVar[bool] = True
    reads: ClassVar[Tap] = "final"

    @property
    def uses_validation(self) -> bool:
        """Whether something is chosen on the validation sample; only then is `validation` part of what a run is."""
        return False

    @property
    def epoch_views(self) -> int:
        """The number of random views of each training image that `augment.views=epochs` stands for."""
        return 0

    def resolved(self: AnyOptions, shots: int | str, dataset: str) -> AnyOptions:
        """Return the options with what they leave to the shots or the dataset: the number of epochs."""
        return self

    def __post_init__(self) -> None:
        """Check the values; every class also calls its parent's. Raises CoopError."""


@dataclass(frozen=True)
class Augment:
    """Which views of a training image a method reads, and the recipe of the random ones.

    `views`: 0: the test view; V > 0: one of V random views, drawn per image and epoch; `epochs`: a new one in every
    epoch; `mirror`: the test view and its mirror image. A random view is a crop whose area is at least `scale` of the
    image's (0.08 in CoOp; 0.5 in Tip-Adapter, APE, GDA, LP++, ProLIP), mirrored half of the time if `flip`.
    """

    views: int | str = 10
    scale: float = 0.08
    flip: bool = True

    def __post_init__(self) -> None:
        named = self.views in ("epochs", "mirror")
        if not named and not (isinstance(self.views, int) and not isinstance(self.views, bool) and self.views >= 0):
            raise CoopError(f"augment.views={self.views}: give 0, a number of views, 'epochs' or 'mirror'")
        if not 0 < self.scale <= 1:
            raise CoopError(f"augment.scale={self.scale}: give a share of the image's area, above 0 and at most 1")


@dataclass(frozen=True)
class Training(MethodOptions):
    """How a method is trained: by SGD with `momentum` and `weight_decay` unless its own help says otherwise.

    `epochs=None` is the protocol's number for the shots (50 for 1, 100 for 2 and 4, else 200; 50 on ImageNet), 0 leaves
    it untrained. `lr` falls to 0 along a cosine, after `warmup_epochs` epochs at `warmup_lr`. `batch_size`: images.
    """

    epochs: int | None = None
    lr: float = 0.002
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        check_whole(0, epochs=self.epochs)
        check_whole(1, batch_size=self.batch_size)
        check_not_negative(self, "lr", "momentum", "weight_decay", "warmup_lr", "warmup_epochs")

    @property
    def epoch_views(self) -> int:
        """One for each epoch."""
        return self.epochs or 0

    def resolved(self: T, shots: int | str, dataset: str) -> T:
        """Return the options with the protocol's number of epochs where none is given."""
        return self if self.epochs is not None else replace(self, epochs=protocol_epochs(shots, dataset))


def protocol_epochs(shots: int | str, dataset: str) -> int:
    """Return CoOp's epochs: 50 for 1 shot, 100 for 2 and 4, 200 for more; 50 for ImageNet whatever the shots."""
    if dataset == "imagenet" or shots == 1:
        return 50
    return 100 if isinstance(shots, int) and shots <= 4 else 200


@dataclass(frozen=True)
class ZeroShotOptions(MethodOptions):
    """Zero-shot CLIP's.

    `template`: None (the dataset's), an ensemble (imagenet7, imagenet8, imagenet80), a text with {}, or a file's
    sentences for each class (`file:prompts.json`; `+file:prompts.json` after a template adds them to it).
    """

    trains: ClassVar[bool] = False
    template: str | None = None


@dataclass(frozen=True)
class CoOpOptions(Training):
    """`n_ctx` context vectors for all classes or, with `class_specific`, for each.

    `ctx_position` of the class name: end, middle or front. `ctx_init` words take the place of `n_ctx` random vectors;
    their number of tokens then is n_ctx.
    """

    n_ctx: int | None = 16
    ctx_position: str = "end"
    class_specific: bool = False
    ctx_init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ctx_position not in CTX_POSITIONS:
            raise unknown("ctx_position", self.ctx_position, CTX_POSITIONS)
        if self.ctx_init is not None:
            object.__setattr__(self, "n_ctx", None)  # so that a sweep over n_ctx makes one run of given words
        elif self.n_ctx is None or self.n_ctx < 1:
            raise CoopError(f"n_ctx={self.n_ctx}: give at least 1 context vector")


@dataclass(frozen=True)
class CoCoOpOptions(CoOpOptions):
    """The defaults are the paper's. `class_specific` must be false: a context cannot depend on both."""

    epochs: int | None = 10
    batch_size: int = 1
    ctx_init: str | None = "a photo of a"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_specific:
            raise CoopError("method=cocoop learns a context for each image, not for each class: class_specific=false")


@dataclass(frozen=True)
class KgCoOpOptions(CoOpOptions):
    """`kg_weight` is the paper's lambda; `template` (None: the dataset's) makes the features to stay near."""

    epochs: int | None = 100
    batch_size: int = 128
    ctx_init: str | None = "a photo of a"
    kg_weight: float = 8.0
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kg_weight >= 0:
            raise CoopError(f"kg_weight={self.kg_weight}: give 0 or more")


@dataclass(frozen=True)
class ProGradOptions(CoOpOptions):
    """`prograd_lambda` is how much of the conflict is taken out; `temperature` softens both predictions."""

    ctx_init: str | None = "a photo of a"
    prograd_lambda: float = 1.0
    temperature: float = 1.0
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prograd_lambda >= 0:
            raise CoopError(f"prograd_lambda={self.prograd_lambda}: give 0 or more")
        if not self.temperature > 0:
            raise CoopError(f"temperature={self.temperature}: give a number above 0")


@dataclass(frozen=True)
class PromptEnsembleOptions(MethodOptions):
    """`runs` are folders of runs of coop, kgcoop or prograd: of any seeds and lengths, on the same backbone."""

    trains: ClassVar[bool] = False
    runs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LinearProbeOptions(MethodOptions):
    """`C` is the inverse strength of the L2 penalty; None to search for it on validation.

    `warm_start` lets each fit of the search start from the nearest one with a smaller C: two to six times fewer steps.
    With a weak penalty both ways stop before they converge, at different points, so that another C may be chosen.
    """

    C: float | None = None
    max_iter: int = 1000
    warm_start: bool = False

    def __post_init__(self) -> None:
        if self.C is not None and not (self.C > 0 and math.isfinite(self.C)):
            raise CoopError(f"C={self.C}: give a number above 0")
        if self.max_iter < 1:
            raise CoopError(f"max_iter={self.max_iter}: give at least 1")

    @property
    def uses_validation(self) -> bool:
        """Whether something is left to search for."""
        return self.C is None


@dataclass(frozen=True)
class ClipAdapterOptions(Training):
    """`ratio`: a number in [0, 1], `search` (the best of `RATIOS` on validation) or `learned` (with the adapter).

    `reduction`: the bottleneck is the backbone's width e divided by it, rounded down, at least 1.
    """

    branch: str = "visual"
    ratio: float | int | str = 0.2
    reduction: int = 4
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branch not in ADAPTER_BRANCHES:
            raise unknown("branch", self.branch, ADAPTER_BRANCHES)
        if self.reduction < 1:
            raise CoopError(f"reduction={self.reduction}: give 1 or more; the bottleneck is the width divided by it")
        if isinstance(self.ratio, str):
            if self.ratio not in ("search", "learned"):
                raise CoopError(f"ratio={self.ratio}: give a number from 0 to 1, 'search' or 'learned'")
        elif not 0 <= self.ratio <= 1:
            raise CoopError(f"ratio={self.ratio}: give a number from 0 to 1, 'search' or 'learned'")
        else:
            object.__setattr__(self, "ratio", float(self.ratio))

    @property
    def uses_validation(self) -> bool:
        """Whether something is left to search for."""
        return self.ratio == "search"


@dataclass(frozen=True)
class CacheOptions(MethodOptions):
    """What the methods with a cache of shots share (Tip-Adapter, APE and their trained forms).

    `alpha`, `beta`: both None to search for them on validation, or both given.
    `search_scale`, `search_step`: the grid of the search in the released codes' form, evenly spaced from 0.1: the ends
    and the numbers of values of beta, alpha (APE: and gamma, from 0). None: the toolkit's grid, spaced by ratio.
    `augment.views`: the keys are the mean of so many random views; 0: the test view.
    `setting`: `common`, one setting for all datasets; `released`, the authors' for each of CoOp's eleven datasets,
    where no other value is given.
    """

    alpha: float | None = None
    beta: float | None = None
    search_scale: list[float] | None = None
    search_step: list[int] | None = None
    template: str | None = None
    augment: Augment = field(default_factory=Augment)
    setting: str = "common"

    n_searched: ClassVar[int] = 2  # numbers that the search is for
    released_values: ClassVar[dict[str, Any]]  # the released ones that are the same for all datasets

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.setting not in ("common", "released"):
            raise unknown("setting", self.setting, ("common", "released"))
        if self.setting == "released" and self.search_scale is None:
            raise CoopError("setting=released depends on the dataset: use method_options(kind, keys, dataset)")
        check_pair(self.alpha, self.beta)
        if (self.search_scale is None) != (self.search_step is None):
            raise CoopError("search_scale and search_step make one grid: give both, or neither")
        for name in ("search_scale", "search_step"):
            values = getattr(self, name)
            if values is not None and (len(values) != self.n_searched or not all(value > 0 for value in values)):
                raise CoopError(f"{name}={list(values)}: give {self.n_searched} numbers above 0")
        if self.augment.views == "epochs" and not isinstance(self, Training):
            raise CoopError("a method that is not trained has no epochs: give augment.views a number, not 'epochs'")

    @property
    def uses_validation(self) -> bool:
        """Whether something is left to search for."""
        return self.alpha is None

    @classmethod
    def released_for(cls, dataset: str) -> dict[str, Any]:
        """Return the released values that are chosen for a dataset; KeyError where there are none."""
        raise NotImplementedError

    @classmethod
    def with_released(cls, given: Mapping[str, Any], dataset: str) -> dict[str, Any]:
        """Return `given`, and the released values for the keys that are not given, or null.

        Raises CoopError for a dataset that the authors chose nothing for, unless all that they chose is given.
        """
        known = {key: value for key, value in given.items() if value is not None}
        missing = [key for key in cls.released_for("imagenet") if key not in known]
        if missing and dataset not in TIP_ADAPTER_RELEASED:
            raise CoopError(
                f"setting=released knows CoOp's eleven datasets, not {dataset}: give {', '.join(missing)}, "
                "or setting=common"
            )
        chosen = cls.released_for(dataset) if missing else {}
        augment = {**cls.released_values["augment"], **known.get("augment", {})}
        return {**cls.released_values, **chosen, **known, "augment": augment}


def check_pair(alpha: float | None, beta: float | None, prefix: str = "") -> None:
    """Raise CoopError unless both are numbers from 0 on, or both are left out."""
    if (alpha is None) != (beta is None):
        given = f"{prefix}alpha={alpha} and {prefix}beta={beta}"
        raise CoopError(f"{given}: give both, or neither to search for them on validation")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and not value >= 0:
            raise CoopError(f"{prefix}{name}={value}: give 0 or more")


@dataclass(frozen=True)
class TrainedCacheOptions(CacheOptions, Training):
    """What the trained forms of the caches share; `epochs=None` is the method's own number.

    `train_alpha` and `train_beta` hold while the method is trained; None takes those of the untrained cache: `alpha`
    and `beta`, or what its search on validation finds. `keep`: the result is the `last` epoch, or the `best` on
    validation, there with the better of both pairs alpha, beta. With `augment.views=epochs` the first `key_views`
    random views make the keys, and each epoch has a view of its own after them. AdamW has no `momentum`, and there is
    no warm-up unless `warmup_epochs` asks for one.
    """

    lr: float = 0.001
    batch_size: int = 256
    weight_decay: float = 0.01
    eps: float = 1e-4
    warmup_epochs: int = 0
    train_alpha: float | None = None
    train_beta: float | None = None
    keep: str = "last"
    key_views: int = 10

    default_epochs: ClassVar[int] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair(self.train_alpha, self.train_beta, "train_")
        if self.keep not in ("last", "best"):
            raise unknown("value of keep", self.keep, ("last", "best"))
        check_whole(1, key_views=self.key_views)
        if not self.eps > 0:
            raise CoopError(f"eps={self.eps}: give a number above 0")

    @property
    def uses_validation(self) -> bool:
        """Whether something is left to search for, or an epoch to choose."""
        return self.alpha is None or self.keep == "best"

    @property
    def epoch_views(self) -> int:
        """Those of the keys, and one for each epoch after them."""
        return self.key_views + (self.epochs or 0)

    def resolved(self: K, shots: int | str, dataset: str) -> K:
        """Return the options with the method's number of epochs where none is given."""
        return self if self.epochs is not None else replace(self, epochs=self.default_epochs)


# gaopengcuhk/Tip-Adapter, configs/*.yaml: alpha while training, ends of the grid for beta and alpha. The grid's ends of
# caltech101, cars, flowers, food101, sun397 and ucf101 were read in copies of that repository: check before you cite.
TIP_ADAPTER_RELEASED = {
    "imagenet": (1.17, 7.0, 3.0),
    "caltech101": (3.0, 12.0, 5.0),
    "oxford_pets": (1.17, 7.0, 3.0),
    "stanford_cars": (3.0, 20.0, 10.0),
    "oxford_flowers": (10.0, 50.0, 50.0),
    "food101": (1.17, 10.0, 10.0),
    "fgvc_aircraft": (5.0, 30.0, 30.0),
    "sun397": (1.17, 12.0, 10.0),
    "dtd": (2.0, 13.0, 13.0),
    "eurosat": (2.0, 12.0, 10.0),
    "ucf101": (3.0, 7.0, 3.0),
}

# yangyangyang127/APE, configs/*.yaml: ends of the grid for beta, alpha and gamma; channels that APE keeps; w_0 (w_1 is
# the rest to 1); channels that APE-T trains; its alpha, lr, eps and epochs. The files differ between the first and the
# last commit: this is the last, but for imagenet, stanford_cars and dtd, of which only the first was at hand.
APE_RELEASED = {
    "imagenet": ((7.0, 7.0, 0.5), 500, 0.7, 500, 2.0, 1e-4, 1e-3, 20),
    "caltech101": ((7.0, 7.0, 1.0), 800, 0.5, 900, 1.0, 1e-3, 1e-3, 30),
    "oxford_pets": ((7.0, 7.0, 1.0), 800, 0.7, 800, 2.0, 1e-4, 2e-3, 30),
    "stanford_cars": ((7.0, 7.0, 1.0), 500, 0.7, 500, 1.0, 1e-3, 1e-3, 30),
    "oxford_flowers": ((7.0, 7.0, 1.0), 700, 0.4, 800, 3.0, 1e-3, 1e-3, 60),
    "food101": ((7.0, 7.0, 1.0), 700, 0.3, 900, 0.8, 1e-4, 1e-3, 30),
    "fgvc_aircraft": ((20.0, 10.0, 1.0), 800, 0.1, 900, 5.0, 1e-3, 1e-3, 30),
    "sun397": ((10.0, 7.0, 1.0), 800, 0.7, 800, 1.0, 1e-4, 1e-3, 30),
    "dtd": ((7.0, 7.0, 1.0), 800, 0.7, 800, 3.0, 1e-3, 1e-3, 20),
    "eurosat": ((30.0, 5.0, 1.5), 700, 0.9, 900, 1.0, 1e-3, 1e-3, 200),
    "ucf101": ((10.0, 7.0, 1.5), 700, 0.3, 800, 2.0, 1e-3, 2e-3, 30),
}
RN50_WIDTH = 1024  # of the features that those channels are counted in
RELEASED_TRAINED = {"augment": {"views": "epochs", "scale": 0.5}, "key_views": 10, "keep": "best"}


@dataclass(frozen=True)
class TipAdapterOptions(CacheOptions):
    """`setting=released`: the authors' grid for the dataset, and keys from 10 crops of half of the image and more."""

    released_values: ClassVar[dict[str, Any]] = {"augment": {"views": 10, "scale": 0.5}}

    @classmethod
    def released_for(cls, dataset: str) -> dict[str, Any]:
        """Return the grid."""
        _, beta, alpha = TIP_ADAPTER_RELEASED[dataset]
        return {"search_scale": [beta, alpha], "search_step": [200, 20]}


@dataclass(frozen=True)
class TipAdapterFOptions(TipAdapterOptions, TrainedCacheOptions):
    """Tip-Adapter-F's. `epochs=None` is 20.

    `setting=released`: each epoch has views of its own, alpha while training is by dataset and beta 1, EuroSAT has 100
    epochs, and the best epoch on validation is kept (with `validation=test` this is the released protocol).
    """

    released_values: ClassVar[dict[str, Any]] = RELEASED_TRAINED

    @classmethod
    def released_for(cls, dataset: str) -> dict[str, Any]:
        """Return the grid, the epochs and alpha while training."""
        epochs = 100 if dataset == "eurosat" else 20
        trained = {"epochs": epochs, "train_alpha": TIP_ADAPTER_RELEASED[dataset][0], "train_beta": 1.0}
        return super().released_for(dataset) | trained


@dataclass(frozen=True)
class ApeOptions(CacheOptions):
    """`gamma`, given or searched for with `alpha` and `beta`; `channels`: the share of the feature channels kept.

    `similarity_weight` and `variance_weight` are the criterion's w_0 and w_1. `setting=released` has the authors'
    `channels`, weights and grid for the dataset, and keys from 10 crops of half of the image and more.
    """

    gamma: float | None = None
    channels: float = 0.75
    similarity_weight: float = 0.5
    variance_weight: float = 0.5

    n_searched: ClassVar[int] = 3
    released_values: ClassVar[dict[str, Any]] = TipAdapterOptions.released_values

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.alpha is None) != (self.gamma is None):
            raise CoopError(
                f"alpha={self.alpha} and gamma={self.gamma}: give alpha, beta and gamma, or none of them to search"
            )
        check_channels(self.channels)

    @classmethod
    def released_for(cls, dataset: str) -> dict[str, Any]:
        """Return the grid, the share of channels, and the criterion's weights."""
        scale, kept, similarity = APE_RELEASED[dataset][:3]
        return {
            "search_scale": list(scale),
            "search_step": [200, 20, 5 if dataset == "imagenet" else 20],
            "channels": kept / RN50_WIDTH,
            "similarity_weight": similarity,
            "variance_weight": round(1 - similarity, 1),
        }


@dataclass(frozen=True)
class ApeTOptions(TrainedCacheOptions):
    """APE-T's: `channels`, `similarity_weight` and `variance_weight` as APE's; `epochs=None` is 30.

    `setting=released`: each epoch has views of its own, the grid, `channels`, `lr`, `eps`, `epochs` and alpha while
    training are by dataset, beta is 1, and the best epoch on validation is kept.
    """

    weight_decay: float = 0.1
    eps: float = 1e-3
    channels: float = 0.75
    similarity_weight: float = 0.2
    variance_weight: float = 0.8

    default_epochs: ClassVar[int] = 30
    released_values: ClassVar[dict[str, Any]] = RELEASED_TRAINED

    def __post_init__(self) -> None:
        super().__post_init__()
        check_channels(self.channels)

    @classmethod
    def released_for(cls, dataset: str) -> dict[str, Any]:
        """Return the grid and how it is trained."""
        scale, _, _, kept, alpha, lr, eps, epochs = APE_RELEASED[dataset]
        searched = {"search_scale": list(scale[:2]), "search_step": [200, 20], "channels": kept / RN50_WIDTH}
        return searched | {"lr": lr, "eps": eps, "epochs": epochs, "train_alpha": alpha, "train_beta": 1.0}


def check_channels(share: float) -> None:
    """Raise CoopError unless `share` is one of the feature channels."""
    if not 0 < share <= 1:
        raise CoopError(f"channels={share}: give the share of the channels that is kept, above 0 and at most 1")


@dataclass(frozen=True)
class WaffleOptions(MethodOptions):
    """`repetitions`: pairs of descriptors, one of random words and one of random characters.

    `descriptor_seed` draws them; the run's own seed plays no part, for nothing is trained. `template` must end in a
    full stop, before which the descriptor goes.
    """

    trains: ClassVar[bool] = False
    repetitions: int = 15
    descriptor_seed: int = 1
    template: str = "A photo of a {}."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, repetitions=self.repetitions)
        if self.template.count("{}") != 1:
            raise CoopError(f"template={self.template!r}: give a text with {{}} where the class name goes")


# Linear classifiers and projections on image features: task_residual, linear, gaussian, projection

GDA_COVARIANCES = ("pooled", "per_class")


@dataclass(frozen=True)
class TextOptions(MethodOptions):
    """`template`: None is the dataset's own; on ImageNet and its variants the released code's, `imagenet_template`."""

    imagenet_template: ClassVar[str] = "imagenet7"
    template: str | None = None


@dataclass(frozen=True)
class ClassWeightsOptions(TextOptions):
    """`wise_ft`: the share of the zero-shot weights in the final ones (WiSE-FT; 0.5 as released); None: no mixing."""

    wise_ft: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wise_ft is not None and not 0 <= self.wise_ft <= 1:
            raise CoopError(f"wise_ft={self.wise_ft}: give a share of the zero-shot weights, from 0 to 1")


@dataclass(frozen=True)
class TaskResOptions(ClassWeightsOptions, Training):
    """`alpha` scales the residual. As released: alpha=1 on Flowers102 alone, and lr=2e-4 on ImageNet.

    `epochs=None`: 100 up to 4 shots, 200 for more. `momentum` is Adam's beta_1; `weight_decay` is Adam's L2 term.
    """

    imagenet_template: ClassVar[str] = "imagenet8"
    epochs: int | None = None
    batch_size: int = 256
    alpha: float = 0.5
    augment: Augment = field(default_factory=lambda: Augment(views="epochs"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise CoopError(f"alpha={self.alpha}: give a number")

    def resolved(self: TaskResT, shots: int | str, dataset: str) -> TaskResT:
        """Return the options with the released number of epochs where none is given."""
        epochs = (100 if isinstance(shots, int) and shots <= 4 else 200) if self.epochs is None else self.epochs
        return replace(super().resolved(shots, dataset), epochs=epochs)


@dataclass(frozen=True)
class ClapOptions(ClassWeightsOptions, Training):
    """`constraint=false` leaves the zero-shot start alone (the paper's ZS-LP); the defaults are the released ones."""

    imagenet_template: ClassVar[str] = "imagenet8"
    epochs: int | None = 300
    lr: float = 0.1
    batch_size: int = 256
    weight_decay: float = 0.0
    constraint: bool = True
    augment: Augment = field(default_factory=lambda: Augment(views=20))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment.views == "epochs":
            raise CoopError("method=clap draws from all views of all images: give augment.views a number")


@dataclass(frozen=True)
class LpPlusPlusOptions(ClassWeightsOptions):
    """`steps` full-batch steps; alpha moves at every `alpha_every`-th. The learning rates follow from the data."""

    steps: int = 300
    momentum: float = 0.9
    alpha_every: int = 10
    augment: Augment = field(default_factory=lambda: Augment(views=1, scale=0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, steps=self.steps, alpha_every=self.alpha_every)
        if not 0 <= self.momentum < 1:
            raise CoopError(f"momentum={self.momentum}: give a number from 0 to below 1")
        if self.augment.views not in (0, 1):
            raise CoopError(f"augment.views={self.augment.views}: method=lp_plus_plus reads one view, give 0 or 1")

    @property
    def uses_validation(self) -> bool:
        """The step is chosen."""
        return True


@dataclass(frozen=True)
class CrossModalOptions(ClassWeightsOptions):
    """`lr`, `weight_decay`, `batch_size`: None to choose on validation from the released grid.

    `texts=false` trains on images alone (the paper's uni-modal linear probe).
    """

    lr: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    steps: int = 12800
    warmup_steps: int = 50
    warmup_lr: float = 1e-5
    eval_every: int = 100
    texts: bool = True
    augment: Augment = field(default_factory=lambda: Augment(views="mirror"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, steps=self.steps, eval_every=self.eval_every, batch_size=self.batch_size)
        check_whole(0, warmup_steps=self.warmup_steps)
        check_not_negative(self, "lr", "weight_decay", "warmup_lr")
        if self.texts and self.batch_size is not None and self.batch_size % 2:
            raise CoopError(f"batch_size={self.batch_size}: half of a batch is texts, give an even number")
        if self.augment.views == "epochs":
            raise CoopError("method=cross_modal has no epochs: give augment.views a number, or 'mirror'")

    @property
    def uses_validation(self) -> bool:
        """The step is chosen, and what is None."""
        return True


@dataclass(frozen=True)
class GdaOptions(TextOptions):
    """`alpha`: the weight of the Gaussian logits; None to choose it on validation.

    `covariance`: `pooled`, with shrinkage (the released few-shot code), or `per_class`, the mean of the classes' own,
    without (the released base-to-new code). As released, ImageNet's crops have augment.scale=0.08.
    """

    covariance: str = "pooled"
    alpha: float | None = None
    augment: Augment = field(default_factory=lambda: Augment(views=10, scale=0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "alpha")
        if self.covariance not in GDA_COVARIANCES:
            raise unknown("covariance", self.covariance, GDA_COVARIANCES)
        if self.augment.views == "epochs":
            raise CoopError("method=gda has no epochs: give augment.views a number")

    @property
    def uses_validation(self) -> bool:
        """Whether alpha is left to choose."""
        return self.alpha is None


@dataclass(frozen=True)
class LinearAdapterOptions(TextOptions):
    """`lr`, `penalty` (the paper's lambda): None to search for it on validation.

    Without validation images None is lr=1e-5 and penalty=1/shots.
    """

    lr: float | None = None
    penalty: float | None = None
    steps: int = 300
    augment: Augment = field(default_factory=lambda: Augment(views=300, scale=0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, steps=self.steps)
        check_not_negative(self, "lr", "penalty")
        if self.augment.views == "epochs":
            raise CoopError("each step of this method reads one view of all images: give augment.views a number")

    @property
    def uses_validation(self) -> bool:
        """Whether something is left to search for."""
        return self.lr is None or self.penalty is None


@dataclass(frozen=True)
class ProLipOptions(LinearAdapterOptions):
    """As `LinearAdapterOptions`, for the projection itself."""

    reads: ClassVar[Tap] = "pre_projection"


# Methods that train inside the towers (coop/methods: deep_prompts, tcp, lora, layer_norm, multimodal). A block is
# counted from 0, as in open_clip, except where a docstring says otherwise; a depth counts the input as 1.


@dataclass(frozen=True)
class DeepTextOptions(Training):
    """`n_ctx` tokens at the input of each of the first `depth` text blocks; `ctx_init` words start the first ones.

    The first n_ctx tokens of `ctx_init` are learned, its other words stay; where it has fewer, or is null, the start
    is random (as released).
    """

    epochs: int | None = 5
    lr: float = 0.0025
    batch_size: int = 4
    n_ctx: int = 4
    depth: int = 12
    ctx_init: str | None = "a photo of a"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, n_ctx=self.n_ctx, depth=self.depth)


@dataclass(frozen=True)
class VptOptions(Training):
    """`n_ctx` visual tokens at the input of each of the first `depth` image blocks; `depth=1` is shallow."""

    reads: ClassVar[Tap] = "pixels"
    epochs: int | None = 5
    lr: float = 0.0025
    batch_size: int = 4
    n_ctx: int = 8
    depth: int = 12
    template: str | None = "a photo of a {}."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, n_ctx=self.n_ctx, depth=self.depth)


@dataclass(frozen=True)
class IvlpOptions(Training):
    """Independent prompts: lengths and depths of each tower; `ctx_init` as for deep_text."""

    reads: ClassVar[Tap] = "pixels"
    epochs: int | None = 5
    lr: float = 0.0035
    batch_size: int = 4
    n_ctx_text: int = 2
    n_ctx_image: int = 2
    depth_text: int = 12
    depth_image: int = 12
    ctx_init: str | None = "a photo of a"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, n_ctx_text=self.n_ctx_text, n_ctx_image=self.n_ctx_image)
        check_whole(1, depth_text=self.depth_text, depth_image=self.depth_image)


@dataclass(frozen=True)
class MapleOptions(Training):
    """`n_ctx` text tokens at the input of the first `depth` blocks, and their images under linear maps in the other."""

    reads: ClassVar[Tap] = "pixels"
    epochs: int | None = 5
    lr: float = 0.0035
    batch_size: int = 4
    n_ctx: int = 2
    depth: int = 9
    ctx_init: str | None = "a photo of a"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, n_ctx=self.n_ctx, depth=self.depth)


AVERAGES = ("gaussian", "released_per_dataset", "none")


@dataclass(frozen=True)
class PromptSRCOptions(IvlpOptions):
    """The few-shot configuration as released; base-to-new is epochs=20 average_mean=15 average_deviation=1.

    `average`: `gaussian` weighs epoch i by N(i; average_mean, average_deviation); `released_per_dataset` takes the
    Gaussian that the authors chose for each dataset (N(30, 30) or N(45, 5), for 50 epochs); `none` keeps the last.
    """

    epochs: int | None = 50
    lr: float = 0.0025
    n_ctx_text: int = 4
    n_ctx_image: int = 4
    depth_text: int = 9
    depth_image: int = 9
    text_weight: float = 25.0
    image_weight: float = 10.0
    logits_weight: float = 1.0
    average: str = "gaussian"
    average_mean: float = 30.0
    average_deviation: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average not in AVERAGES:
            raise unknown("average", self.average, AVERAGES)
        if not self.average_deviation > 0:
            raise CoopError(f"average_deviation={self.average_deviation}: give a number above 0")
        for name in ("text_weight", "image_weight", "logits_weight"):
            if not getattr(self, name) >= 0:
                raise CoopError(f"{name}={getattr(self, name)}: give 0 or more")


@dataclass(frozen=True)
class TcpOptions(Training):
    """`n_ctx` shared tokens at the input, `class_tokens` of each class at the input of text block `layer`.

    `epochs=None`: 25 on ImageNet and SUN397, else 50. `template` (None: the released one of the dataset, or the
    dataset's own) makes the features to stay near; `prompt_template` (None: the released one, or "X X X X {}.") is the
    learned prompt, whose first n_ctx tokens, whatever they are, are learned; "X X X X" has as many X as n_ctx says.
    Adam has no `momentum`.
    """

    n_ctx: int = 4
    class_tokens: int = 4
    layer: int = 8
    ctx_init: str | None = None
    eps: float = 1e-3
    text_weight: float = 8.0
    template: str | None = None
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, n_ctx=self.n_ctx, class_tokens=self.class_tokens)
        check_whole(0, layer=self.layer)
        if not self.eps > 0 or not self.text_weight >= 0:
            raise CoopError(f"eps={self.eps} text_weight={self.text_weight}: give an eps above 0, a weight from 0 on")

    def resolved(self: C, shots: int | str, dataset: str) -> C:
        """Return the options with the released number of epochs where none is given."""
        if self.epochs is not None:
            return self
        return replace(self, epochs=25 if dataset in ("imagenet", "sun397") else 50)


TOWERS = ("both", "text", "image")


@dataclass(frozen=True)
class StepTraining(MethodOptions):
    """Training by steps with AdamW: `steps_per_shot` times the shots, or `steps` in all (0 leaves it untrained)."""

    reads: ClassVar[Tap] = "pixels"
    steps_per_shot: int = 500
    steps: int | None = None
    lr: float = 2e-4
    batch_size: int = 32
    weight_decay: float = 0.01
    towers: str = "both"
    template: str | None = "a photo of a {}."
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        check_whole(0, steps_per_shot=self.steps_per_shot, steps=self.steps)
        check_whole(1, batch_size=self.batch_size)
        check_not_negative(self, "lr", "weight_decay")
        if self.towers not in TOWERS:
            raise unknown("towers", self.towers, TOWERS)
        if self.augment.views == "epochs":
            raise CoopError("augment.views=epochs: a method that is trained by steps has no epochs; give a number")

    def resolved(self: S, shots: int | str, dataset: str) -> S:
        """Return the options with `steps_per_shot` times the shots where no number of steps is given.

        "all" shots are counted in the sample, when training begins.
        """
        if self.steps is not None or not isinstance(shots, int):
            return self
        return replace(self, steps=self.steps_per_shot * shots)


LORA_PLACES = {  # blocks of a tower of 12, from 0, as released; "all" and the halves of a deeper one too
    "all": (0, 11), "bottom": (0, 3), "mid": (4, 7), "up": (8, 11), "half-bottom": (0, 5), "half-up": (6, 11),
    "top3": (9, 11),
}  # fmt: skip


@dataclass(frozen=True)
class ClipLoraOptions(StepTraining):
    """`place`: one of `LORA_PLACES`, or blocks from 0 as "2-3"; `weights`: some of q, k, v, o; `rank`, `alpha`.

    `share_prefix=false` draws dropout masks of its own for every class's prefix, and computes it for every class.
    """

    rank: int = 2
    alpha: float = 1.0
    dropout: float = 0.25
    weights: str = "qkv"
    place: str = "all"
    share_prefix: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, rank=self.rank)
        if not 0 <= self.dropout < 1:
            raise CoopError(f"dropout={self.dropout}: give a number from 0 to less than 1")
        if not self.weights or set(self.weights) - set("qkvo") or len(set(self.weights)) < len(self.weights):
            raise CoopError(f"weights={self.weights}: give some of the letters q, k, v, o")
        if self.place not in LORA_PLACES:
            first, _, last = self.place.partition("-")
            if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
                raise unknown("place", self.place, [*LORA_PLACES, "FIRST-LAST"])


@dataclass(frozen=True)
class TwoStageOptions(StepTraining):
    """`fraction` of the steps trains LayerNorms, from `first_..._block` on; the rest trains the head."""

    steps_per_shot: int = 300
    fraction: float = 0.6
    first_text_block: int = 0
    first_image_block: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(0, first_text_block=self.first_text_block, first_image_block=self.first_image_block)
        if not 0 <= self.fraction <= 1:
            raise CoopError(f"fraction={self.fraction}: give a number from 0 to 1")


@dataclass(frozen=True)
class MmaOptions(Training):
    """Adapters in blocks `first_layer` to `last_layer`, counted from 1; 0 is the embedding, None the last of both."""

    reads: ClassVar[Tap] = "pixels"
    epochs: int | None = 5
    lr: float = 0.0015
    batch_size: int = 16
    warmup_epochs: int = 0
    first_layer: int = 5
    last_layer: int | None = None
    width: int = 32
    scale: float = 0.001
    template: str | None = "a photo of a {}."

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, width=self.width)
        check_whole(0, first_layer=self.first_layer, last_layer=self.last_layer)
        if not self.scale > 0:
            raise CoopError(f"scale={self.scale}: give a number above 0")


@dataclass(frozen=True)
class MmrlOptions(Training):
    """The few-shot configuration as released; base-to-new is epochs=10 batch_size=4.

    `n_tokens` representation tokens of width `token_width` in blocks `first_layer` to `last_layer`, counted from 1
    (None: the last of both towers). `setting=released_per_dataset` takes the weight (and on EuroSAT the width) that
    the authors chose for each dataset in place of `reg_weight`. AdamW has no `momentum`.
    """

    reads: ClassVar[Tap] = "pixels"
    epochs: int | None = 50
    lr: float = 0.001
    augment: Augment = field(default_factory=lambda: Augment(scale=0.5))
    n_tokens: int = 5
    token_width: int = 512
    first_layer: int = 6
    last_layer: int | None = None
    alpha: float = 0.7
    reg_weight: float = 0.5
    setting: str = "fixed"
    template: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, n_tokens=self.n_tokens, token_width=self.token_width)
        check_whole(1, first_layer=self.first_layer, last_layer=self.last_layer)
        if not 0 <= self.alpha <= 1 or not self.reg_weight >= 0:
            raise CoopError(
                f"alpha={self.alpha} reg_weight={self.reg_weight}: give alpha in 0 to 1, a weight from 0 on"
            )
        if self.setting not in ("fixed", "released_per_dataset"):
            raise unknown("setting", self.setting, ("fixed", "released_per_dataset"))


BUILT_IN: dict[str, type[MethodOptions]] = {
    "zero_shot": ZeroShotOptions,
    "waffle": WaffleOptions,
    "linear_probe": LinearProbeOptions,
    "clap": ClapOptions,
    "taskres": TaskResOptions,
    "lp_plus_plus": LpPlusPlusOptions,
    "cross_modal": CrossModalOptions,
    "gda": GdaOptions,
    "prolip": ProLipOptions,
    "linear_adapter": LinearAdapterOptions,
    "coop": CoOpOptions,
    "cocoop": CoCoOpOptions,
    "kgcoop": KgCoOpOptions,
    "prograd": ProGradOptions,
    "prompt_ensemble": PromptEnsembleOptions,
    "clip_adapter": ClipAdapterOptions,
    "tip_adapter": TipAdapterOptions,
    "tip_adapter_f": TipAdapterFOptions,
    "deep_text": DeepTextOptions,
    "vpt": VptOptions,
    "ivlp": IvlpOptions,
    "maple": MapleOptions,
    "promptsrc": PromptSRCOptions,
    "tcp": TcpOptions,
    "clip_lora": ClipLoraOptions,
    "two_stage": TwoStageOptions,
    "mma": MmaOptions,
    "mmrl": MmrlOptions,
    "ape": ApeOptions,
    "ape_t": ApeTOptions,
}


class _Options(Mapping[str, type[MethodOptions]]):
    """The options of every method by name; another package's class is imported when it is looked up."""

    def __getitem__(self, name: str) -> type[MethodOptions]:
        return BUILT_IN[name] if name in BUILT_IN else plugin(name).Options

    def __iter__(self) -> Iterator[str]:
        yield from BUILT_IN
        yield from plugins()

    def __len__(self) -> int:
        return len(BUILT_IN) + len(plugins())

    def __contains__(self, name: object) -> bool:
        return name in BUILT_IN or name in plugins()


OPTIONS: Mapping[str, type[MethodOptions]] = _Options()
METHOD_NAMES = {  # what papers call them; the others are called what `method=` has
    "zero_shot": "zero-shot", "waffle": "WaffleCLIP", "linear_probe": "linear probe", "clap": "CLAP",
    "taskres": "TaskRes", "lp_plus_plus": "LP++", "cross_modal": "Cross-Modal", "gda": "GDA", "prolip": "ProLIP",
    "linear_adapter": "linear adapter", "coop": "CoOp", "cocoop": "CoCoOp", "kgcoop": "KgCoOp", "prograd": "ProGrad",
    "prompt_ensemble": "prompt ensemble", "clip_adapter": "CLIP-Adapter", "tip_adapter": "Tip-Adapter",
    "tip_adapter_f": "Tip-Adapter-F", "ape": "APE", "ape_t": "APE-T", "deep_text": "deep text prompts", "vpt": "VPT",
    "ivlp": "IVLP", "maple": "MaPLe", "promptsrc": "PromptSRC", "tcp": "TCP", "clip_lora": "CLIP-LoRA",
    "two_stage": "2SFS", "mma": "MMA", "mmrl": "MMRL",
}  # fmt: skip


@cache
def plugins() -> dict[str, EntryPoint]:
    """Return the entry points of other packages' methods, by name; a built-in method's name stays its own."""
    return {entry.name: entry for entry in entry_points(group=PLUGINS) if entry.name not in BUILT_IN}


def plugin(name: str) -> Any:
    """Import another package's method class.

    Raises KeyError for a name that no package offers, and CoopError for a class that cannot be imported or used.
    """
    entry = plugins()[name]
    try:
        method = entry.load()
    except Exception as error:
        raise CoopError(
            f"method={name} cannot be imported from {entry.value} ({error}): mend or remove its package"
        ) from error
    options = getattr(method, "Options", None)
    if getattr(method, "name", None) != name or not (isinstance(options, type) and issubclass(options, MethodOptions)):
        raise CoopError(
            f"method={name}: {entry.value} must be a coop.methods.base.Method with name = '{name}' and with Options "
            "that extend coop.options.MethodOptions"
        )
    return method


AnyType = TypeVar("AnyType")
_parsed: dict[tuple[type, str], Any] = {}  # the runs of a sweep share few different options


def from_mapping(kind: type[AnyType], values: Mapping[str, Any], where: str = "") -> AnyType:
    """Return a (frozen) dataclass of `kind` from plain values, converted and checked by its annotations.

    Raises CoopError with the key, after `where`, for an unknown key and for a value of a wrong type.
    """
    known = (kind, repr(sorted(values.items(), key=lambda item: str(item[0]))))
    if known not in _parsed:
        try:
            schema = OmegaConf.structured(kind)
            for key in schema:  # a frozen node takes one changed key and refuses a second (OmegaConf 2.3)
                if not OmegaConf.is_missing(schema, key) and OmegaConf.is_config(schema[key]):
                    OmegaConf.set_readonly(schema[key], False)
            _parsed[known] = OmegaConf.to_object(OmegaConf.merge(schema, dict(values)))
        except OmegaConfBaseException as error:
            raise CoopError(wrong_value(error, where)) from error
    found: AnyType = _parsed[known]
    return found


def flat(mapping: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested keys, of mappings and dataclasses, joined by dots, as they are written on the command line."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) or is_dataclass(value):
            out |= flat(value if isinstance(value, Mapping) else vars(value), f"{before}{key}.")
        else:
            out[before + key] = value
    return out


def method_options(kind: type[AnyOptions], values: Mapping[str, Any], dataset: str | None = None) -> AnyOptions:
    """Return a method's options from those of `values` that it has; keys may be nested or dotted (augment.views).

    With `dataset`, `setting=released` gives the keys that are not among `values` the authors' values for it.
    Raises CoopError for a value of a wrong type or out of range.
    """
    names = {f.name for f in fields(kind)}
    nested: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if head in names and rest:
            nested[head] = {**nested.get(head, {}), rest: value}
        elif head in names:
            nested[head] = value
    if dataset is not None and issubclass(kind, CacheOptions) and nested.get("setting") == "released":
        nested = kind.with_released(nested, dataset)
    return from_mapping(kind, nested)
