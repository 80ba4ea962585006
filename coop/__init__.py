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
    from coop.clip.backbone import Backbone, load_backbone
    from coop.clip.words import nearest_words
    from coop.data import few_shot_sample
    from coop.errors import CoopError
    from coop.learned import Classifier
    from coop.methods.coop import PromptLearner
    from coop.train import learning_rates

_HOMES = {
    "Backbone": "coop.clip.backbone",
    "Classifier": "coop.learned",
    "CoopError": "coop.errors",
    "PromptLearner": "coop.methods.coop",
    "few_shot_sample": "coop.data",
    "learning_rates": "coop.train",
    "load_backbone": "coop.clip.backbone",
    "nearest_words": "coop.clip.words",
}

__all__ = [
    "Backbone",
    "Classifier",
    "CoopError",
    "PromptLearner",
    "few_shot_sample",
    "learning_rates",
    "load_backbone",
    "nearest_words",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'coop' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
