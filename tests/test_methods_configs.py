"""Every method has a config that says what its options' defaults are, and nothing else."""

from pathlib import Path

import pytest
import yaml

from coop.config import method_options
from coop.methods import METHODS

CONF = Path(__file__).parent.parent / "conf"


def test_methods_and_configs_are_the_same() -> None:
    assert {path.stem for path in (CONF / "method").glob("*.yaml")} == set(METHODS)
    assert all(method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_config_gives_the_defaults(name: str) -> None:
    """Over conf/config.yaml, as Hydra composes them; no key is one that the method does not know."""
    common = yaml.safe_load((CONF / "config.yaml").read_text())
    own = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    assert own.pop("method") == name
    options = METHODS[name].Options
    assert method_options(options, {**common, **own}) == options()
    assert set(own) <= set(options.__dataclass_fields__)
    assert all(key not in common or common[key] != value for key, value in own.items())
