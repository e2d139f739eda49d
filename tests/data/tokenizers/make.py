"""Cut small parts out of published byte-level BPE vocabularies.

    python tests/data/tokenizers/make.py <folder with the sources>

llama.cpp's converter knows a tokenizer by the ids of one text. So a part with the tokens that this
text and the tests' rows pass through, each with its own id, is known to it like the whole.

    source (name in the folder)   from                                         licence
    qwen.tiktoken                 PyPI dashscope 2.0.2, dashscope/resources    Apache-2.0
    cl100k_base.tiktoken          PyPI litellm 1.110.2, where its file is      MIT
                                  named 9b5ad71b2ce5302211f9c61530b329a4922fc6a4
    smollm2/tokenizer.json        examples/base_model.py                       Apache-2.0
"""

from __future__ import annotations

import ast
import base64
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from finetune_trainer.model.converter import llama_folder
from tests.integration.trainer.conftest import ROWS

Ranks = Callable[[str, str], int | None]
"""When two tokens are merged: the smaller, the earlier; None for never."""

GPT4_WORDS = (  # of the publishers' own code
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = dict(
    zip(
        [*range(33, 127), *range(161, 173), *range(174, 256)]
        + [b for b in range(256) if b < 33 or 126 < b < 161 or b == 173],
        [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]],
        strict=True,
    )
)
"""GPT-2's printable character for each byte."""


def texts() -> list[str]:
    """What the part must split as the whole does."""
    source = (llama_folder() / "conversion" / "base.py").read_text(encoding="utf-8")
    (check,) = re.findall(r"chktxt = ('.*')\n", source)
    return [ast.literal_eval(check), *(text for row in ROWS for text in row)]


def part(whole: Tokenizer, ids: dict[str, int], ranks: Ranks) -> Tokenizer:
    """`whole` has the normalizer and splits into words; its vocabulary isn't looked at."""
    vocabulary = {char: ids[char] for char in BYTES.values() if char in ids}
    merges: dict[tuple[str, str], int] = {}
    for text in texts():
        normal = whole.normalizer.normalize_str(text) if whole.normalizer else text
        for word, _ in whole.pre_tokenizer.pre_tokenize_str(normal):
            tokens = list(word)
            while pairs := _mergeable(tokens, ranks):
                rank, at = min(pairs)
                merges[tokens[at], tokens[at + 1]] = rank
                tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
                vocabulary[tokens[at]] = ids[tokens[at]]
    small = Tokenizer(models.BPE(vocab=vocabulary, merges=sorted(merges, key=lambda m: merges[m])))
    small.normalizer, small.pre_tokenizer = whole.normalizer, whole.pre_tokenizer
    small.decoder = decoders.ByteLevel()
    return small


def _mergeable(tokens: list[str], ranks: Ranks) -> list[tuple[int, int]]:
    pairs = enumerate(itertools.pairwise(tokens))
    found = ((ranks(*pair), at) for at, pair in pairs)
    return [(rank, at) for rank, at in found if rank is not None]


def of_tiktoken(file: Path, words: str, normalizer: Any) -> Tokenizer:
    """OpenAI's format, a token and its id on each line; ids are ranks."""
    ids = {}
    for line in file.read_text().split("\n"):
        if line:
            token, number = line.split()
            ids["".join(BYTES[byte] for byte in base64.b64decode(token))] = int(number)
    whole = Tokenizer(models.BPE())
    whole.normalizer = normalizer
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return part(whole, ids, lambda left, right: ids.get(left + right))


def of_tokenizers(file: Path) -> Tokenizer:
    """tokenizer.json of the tokenizers library."""
    model = json.loads(file.read_bytes())["model"]
    pairs: Iterable[Any] = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    whole = Tokenizer.from_file(str(file))
    return part(whole, model["vocab"], lambda left, right: ranks.get((left, right)))


def main() -> None:
    """Write the parts beside this file."""
    sources, here = Path(sys.argv[1]), Path(__file__).parent
    parts = {
        "qwen2": of_tiktoken(sources / "qwen.tiktoken", GPT4_WORDS % "", normalizers.NFC()),
        "phi4": of_tiktoken(sources / "cl100k_base.tiktoken", GPT4_WORDS % "{1,3}", None),
        "smollm2": of_tokenizers(sources / "smollm2" / "tokenizer.json"),
    }
    for name, tokenizer in parts.items():
        (here / f"{name}.json").write_text(tokenizer.to_str(), encoding="utf-8")


if __name__ == "__main__":
    main()
