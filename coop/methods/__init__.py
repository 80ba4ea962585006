"""The methods that can be compared, by name."""

from coop.methods.base import Classes, Method
from coop.methods.coop import CoOp
from coop.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {method.name: method for method in (ZeroShot, CoOp)}

__all__ = ["METHODS", "Classes", "Method"]
