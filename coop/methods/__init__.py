"""The methods that can be compared, by name."""

from coop.methods.base import Classes, Method
from coop.methods.clip_adapter import ClipAdapter
from coop.methods.cocoop import CoCoOp
from coop.methods.coop import CoOp
from coop.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {method.name: method for method in (ZeroShot, CoOp, CoCoOp, ClipAdapter)}

__all__ = ["METHODS", "Classes", "Method"]
