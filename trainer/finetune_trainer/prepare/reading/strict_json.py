"""JSON as the standard has it: no NaN, no key twice, no endless nesting."""

from __future__ import annotations

import json
from typing import Any, NoReturn


class NotJsonError(Exception):
    """The text is no JSON; the message says why and where."""


def _constant(name: str) -> NoReturn:
    raise NotJsonError(f"{name} is no JSON value")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise NotJsonError(f"the key {twice[:60]!r} occurs twice")
    return found


DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_pairs)


def parse(text: str) -> Any:
    """The value of a whole text; raises NotJsonError."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise NotJsonError(f"{error.msg} at character {error.pos + 1}") from error
    except RecursionError:
        raise NotJsonError("it is nested too deeply") from None
    except ValueError:  # Python's limit for the digits of an integer
        raise NotJsonError("a number in it has thousands of digits") from None
