from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from coop.data import dataset_descriptions


def sentence(error: BaseException) -> str:
    """Return what Hydra means in one line: its message, or that of the cause where it has none."""
    while not str(error).strip() and error.__cause__:
        error = error.__cause__
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Config search path", "See https", "full_key"))]
    told = " ".join(line for line in kept if not line.startswith("object_type") and "provider=" not in line)
    return told or type(error).__name__


def register_datasets() -> None:
    """Make each description in datasets/ a choice of Hydra's group `dataset`."""
    for name, path in dataset_descriptions().items():
        ConfigStore.instance().store(group="dataset", name=name, node=OmegaConf.load(path))
