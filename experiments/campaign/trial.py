"""A trial of the campaign: what was tried, with the seed that repeats it, and what was wrong."""

from dataclasses import dataclass, field


@dataclass
class Trial:
    """One try; it is survived if there are no complaints."""

    part: str
    seed: int
    what: str
    complaints: list[str] = field(default_factory=list)
