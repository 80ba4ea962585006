"""Few-shot prompt learning on frozen CLIP: CoOp and the systems that it is compared with.

The names below are loaded when they are first used: importing torch takes seconds that `coop --help` need not wait.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("coop-clip")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from coop.clip.backbone import Backbone as Backbone
    from coop.clip.backbone import load_backbone as load_backbone
    from coop.clip.words import nearest_words as nearest_words
    from coop.data import few_shot_sample as few_shot_sample
    from coop.data import read_dataset as read_dataset
    from coop.errors import CoopError as CoopError
    from coop.features import FeatureCache as FeatureCache
    from coop.features import Samples as Samples
    from coop.learned import Classifier as Classifier
    from coop.methods import METHODS as METHODS
    from coop.methods.coop import PromptLearner as PromptLearner
    from coop.runs.run import run as run
    from coop.train import learning_rates as learning_rates

_MODULES = {
    "METHODS": "coop.methods",
    "Backbone": "coop.clip.backbone",
    "Classifier": "coop.learned",
    "CoopError": "coop.errors",
    "FeatureCache": "coop.features",
    "PromptLearner": "coop.methods.coop",
    "Samples": "coop.features",
    "few_shot_sample": "coop.data",
    "learning_rates": "coop.train",
    "load_backbone": "coop.clip.backbone",
    "nearest_words": "coop.clip.words",
    "read_dataset": "coop.data",
    "run": "coop.runs.run",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'coop' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
