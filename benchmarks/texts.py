"""Questions and answers of real English text, from what is installed anyway: docstrings.

Python's standard library, NumPy and PyTorch document some 5,000 functions and classes. Their texts
are as long as instruction data is: most are short and a few very long (median 60 tokens, mean 250,
one in ten above 700). Half of the rows ask for the documentation of a name (short question, long
answer), half for a name's first line given the rest (long question, short answer).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from finetune_trainer.contract import Example
from finetune_trainer.model.tokenizer import message_pair

MODULES = (
    "argparse asyncio collections concurrent.futures contextlib csv datetime decimal difflib email "
    "fractions functools gzip heapq http.client inspect io ipaddress itertools json logging math "
    "os pathlib pickle random re sched shutil socket sqlite3 statistics string subprocess tarfile "
    "tempfile textwrap threading typing unittest urllib.request uuid zipfile "
    "numpy numpy.linalg numpy.random numpy.fft torch torch.nn torch.nn.functional torch.optim"
)
SHORTEST = 40  # characters of a docstring

Count = Callable[[Example], int]


def variable(number: int, count: Count, longest: int, seed: int = 0) -> list[Example]:
    """Rows as they come, of at most `longest` tokens."""
    rows = (row for row in _shuffled(seed) if count(row) <= longest)
    return [row for row, _ in zip(rows, range(number), strict=False)]


def fixed(number: int, count: Count, tokens: int, seed: int = 0) -> list[Example]:
    """Rows of just so many tokens: longer texts, cut behind the word that makes them so long."""
    cut = (_cut(row, count, tokens) for row in _shuffled(seed))
    rows = (row for row in cut if row is not None)
    return [row for row, _ in zip(rows, range(number), strict=False)]


def _cut(row: Example, count: Count, tokens: int) -> Example | None:
    question = row["prompt"][0]["content"]
    words = row["completion"][0]["content"].split(" ")
    low, high = 1, len(words)
    while low < high:  # the fewest words with as many tokens
        middle = (low + high) // 2
        if count(message_pair(question, " ".join(words[:middle]))) < tokens:
            low = middle + 1
        else:
            high = middle
    made = message_pair(question, " ".join(words[:low]))
    return made if count(made) == tokens else None


def _shuffled(seed: int) -> Iterator[Example]:
    texts = sorted(_docstrings().items())
    for index, chosen in enumerate(np.random.default_rng(seed).permutation(len(texts))):
        text, name = texts[chosen]
        first, _, rest = text.partition("\n\n")
        if index % 2 and rest.strip():
            yield message_pair(f"Sum up what {name} does.\n\n{rest.strip()}", first.strip())
        else:
            yield message_pair(f"What does {name} do?", text)


def _docstrings() -> dict[str, str]:
    """Text -> name; what is documented twice counts once."""
    found: dict[str, str] = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or inspect.ismodule(value) or not callable(value):
                continue
            _add(found, f"{name}.{key}", value)
            if inspect.isclass(value):
                for inner, member in sorted(vars(value).items()):
                    if not inner.startswith("_") and callable(member):
                        _add(found, f"{name}.{key}.{inner}", member)
    return found


def _add(found: dict[str, str], name: str, value: Any) -> None:
    text = inspect.getdoc(value)
    if text and len(text) >= SHORTEST:
        found.setdefault(text, name)
