"""Credentials are blacked out in whatever leaves a process: its log, its result, its progress."""

from __future__ import annotations

import json
import os
import re

BLACK = "***"
_SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIALS?$|TOKEN$|_KEY$", re.IGNORECASE
)
_SECRET_LENGTH = 8  # characters; anything shorter would black out ordinary words
_USER_IN_URL = re.compile(r"""(?<=://)[^\s/"'?#]+(?=@)""")


def redact(text: str) -> str:
    """Black out the values of credentials in the environment, and of users in URLs."""
    for value in sorted(_secrets(), key=len, reverse=True):
        # As it is, and as JSON writes it.
        text = text.replace(value, BLACK).replace(json.dumps(value)[1:-1], BLACK)
    return _USER_IN_URL.sub(BLACK, text)


def without_user(url: str) -> str:
    """A URL without the user and password in it."""
    return _USER_IN_URL.sub(BLACK, url)


def names_user(url: str) -> bool:
    """Whether there is a user or password in a URL."""
    return _USER_IN_URL.search(url) is not None


def _secrets() -> set[str]:
    """Values of the environment that may not be shown; of a PEM file each line as well."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    lines = [line.strip() for value in values for line in value.splitlines()]
    return {each for each in (*values, *lines) if len(each) >= _SECRET_LENGTH}
