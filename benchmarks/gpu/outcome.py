"""What a case found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self


class Verdict(StrEnum):
    PASSED = "passed"
    FAILED = "FAILED"
    MEASURED = "measured"
    ERROR = "ERROR"
    """It did not come to an end."""

    LEFT_OUT = "left out"
    """This machine can't, or there was no time."""


@dataclass(frozen=True)
class Outcome:
    verdict: Verdict
    words: str
    """For the table."""

    figures: dict[str, Any] = field(default_factory=dict)
    """For the JSON; bytes, seconds, tokens a second."""

    @classmethod
    def of_check(cls, right: bool, words: str, figures: dict[str, Any]) -> Self:
        return cls(Verdict.PASSED if right else Verdict.FAILED, words, figures)

    @classmethod
    def left_out(cls, why: str) -> Self:
        return cls(Verdict.LEFT_OUT, why)

    def saying(self, words: str) -> Self:
        """The same in other words."""
        return replace(self, words=words)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
