"""The one exception of the test host. What went wrong comes first, the cure after it."""

from __future__ import annotations


class HostError(Exception):
    """Something the user can act on; never raised for a bug in these scripts."""

    def __init__(self, problem: str, cure: str = ""):
        super().__init__(problem)
        self.cure = cure

    def __str__(self) -> str:
        problem = super().__str__()
        return f"{problem}\n  {self.cure}" if self.cure else problem
