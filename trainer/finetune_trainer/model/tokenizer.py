"""The tokenizer: loading it, and how a conversation becomes tokens and labels."""

from __future__ import annotations

import json
import logging
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from finetune_trainer.contract import Example, Reason, StageError, as_example, is_document
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.rendering import (
    REASONING,
    NotRenderedError,
    Script,
    begin_of_text,
    render_example,
    render_prompt,
    script,
)

log = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
_ORIGINAL_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

HARD_TO_SPLIT = (
    "3 33 333 3333 33333 1,234.56 2026-11-24",
    "I've said it'd WORK; they'LL see. (Don't [stop]!) a_b-c/d == 'x' && \"y\"",
    "one  two   three\n\nfour\n\n\nfive\tsix\n  seven",
    "Zürich, naïve café, señor, Привет мир, Ελλάδα, 你好世界, こんにちは, 한국어, ١٢٣",
    "🙂 👩‍👩‍👧 ✓ → ≤ ½ € ™",
)
"""Texts at which the ways to split text before tokenizing differ: numbers, contractions, white
space, scripts, emoji. A handful of rows may contain none of these."""

SHOWN_ROWS = 10  # that a message names
LONGEST_OF_ITS_OWN = 200  # characters that a template writes before an answer by itself
IGNORED = -100  # label of a token that no loss is computed on

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ '### ' + ('Instruction' if message['role'] == 'user' else 'Context') + ':\n'"
    " + message['content'] + '\n\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""For base models without a chat template. It is saved with the tokenizer, so that the merged model
and the GGUF files use what the training used. Where the tokenizer begins a text with a token, that
stands before it."""

BEGIN_OF_TEXT = "{{ bos_token }}"


def load_tokenizer(model: ModelFolder) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it always has a chat template, an end token and a padding token.

    A trusted model's own code is run only where the tokenizer itself is made of it: stages, which
    hold the keys of the store, load the tokenizer in their own process.
    Raises StageError when transformers can't read it.
    """
    try:
        trusted = model.trust_remote_code and has_code(model.path)
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=trusted)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        # What transformers raises for a broken or unknown tokenizer depends on where it broke.
        raise unsupported("tokenizer", error, model) from error
    if tokenizer.eos_token_id is None:
        raise StageError(
            Reason.MODEL_UNSUPPORTED,
            "The base model's tokenizer names no end token (eos_token), so a tuned model would "
            "never stop: add it to tokenizer_config.json.",
        )
    if not tokenizer.chat_template:
        log.warning(
            "The base model has no chat template; '### Instruction: … ### Response: …' is used"
        )
        tokenizer.chat_template = fallback_template(tokenizer)
    if tokenizer.pad_token_id is None:
        # Not a new token: the vocabulary must keep the shape of the embeddings.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_code(model: Path) -> bool:
    """Whether the tokenizer in a folder comes with Python code of its own."""
    try:
        settings = json.loads((model / TOKENIZER_CONFIG).read_bytes())
    except FileNotFoundError:
        return False
    named = settings.get("auto_map") or {}
    return bool(named.get("AutoTokenizer") if isinstance(named, dict) else named)


def settings_of(model: Path) -> PreTrainedConfig:
    """The configuration of the model in a folder, without running code of its own.

    That of an architecture which transformers doesn't have is what its file says.
    """
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except ValueError:
        found = PreTrainedConfig.from_pretrained(model)
    return found


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, base: Path, target: Path) -> None:
    """Write the tokenizer as the base model's folder has it, with the chat template in use.

    transformers 5 writes tokenizer.json and a configuration of its own kind. Others need what it
    leaves out: llama.cpp's converter the tokenizer's class and its SentencePiece model (Phi-3,
    Phi-4, Gemma 2), programs with an older transformers the class. `target` must have the model's
    config.json: without it transformers 5 takes some of these classes at their word, and splits
    text in another way.
    """
    tokenizer.save_pretrained(target)
    for name in _ORIGINAL_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    settings = json.loads((target / TOKENIZER_CONFIG).read_bytes())
    if settings.pop("chat_template", None):  # it lies in chat_template.jinja, maybe another one
        (target / TOKENIZER_CONFIG).write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def fallback_template(tokenizer: PreTrainedTokenizerBase) -> str:
    return BEGIN_OF_TEXT + PLAIN_TEMPLATE if begin_of_text(tokenizer) else PLAIN_TEMPLATE


def is_plain_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the base model has no chat template, so that PLAIN_TEMPLATE stands in."""
    return str(tokenizer.get_chat_template()).removeprefix(BEGIN_OF_TEXT) == PLAIN_TEMPLATE


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens."""

    ids: list[int]
    labels: list[int]
    """The ids of what is learnt (answers, each with its end of turn); IGNORED elsewhere."""

    only_last: bool
    """Whether earlier answers are not learnt. Some templates write an answer in another way once
    the conversation goes on, for example without its reasoning."""

    some_left: bool = False
    """The same where some of them are learnt, as in conversations with tools."""

    leaves_reasoning_out: bool = False
    """Whether the template leaves out the reasoning of earlier answers."""

    last_begins: int = 0
    """The place of the last answer's first token."""

    @property
    def judged(self) -> Encoded:
        """The same with labels on the last answer alone: what somebody judged."""
        begins = self.last_begins
        return replace(
            self,
            labels=[IGNORED] * begins + self.labels[begins:],
            only_last=False,
            some_left=False,
        )


def message_pair(instruction: str, response: str) -> Example:
    return as_example(
        ({"role": "user", "content": instruction}, {"role": "assistant", "content": response})
    )


def pieces(length: int, limit: int) -> list[slice]:
    """The parts of plain text of so many tokens that are rows of their own, of `limit` at most.

    Each begins with the last token of the one before it, so that every token but the first of all
    is predicted, and none twice.
    """
    starts = range(0, max(length - 1, 1), limit - 1)
    return [slice(start, min(start + limit, length)) for start in starts]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of the whole conversation and their labels; see `encode_batch`."""
    (encoded,) = encode_batch(tokenizer, [example])
    return encoded.ids, encoded.labels


def encode_batch(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Encoded]:
    """Examples as token ids and labels: every answer with its end of turn is learnt.

    For a question and an answer the result is TRL's (a test compares the two). Of longer
    conversations TRL would learn the last answer only. Many texts at once are tokenized several
    times faster. Raises what the template raises for a conversation that it refuses.
    """
    rendered = [_rendered(tokenizer, example) for example in examples]
    texts = [text for item in rendered for text in item.texts()]
    if not texts:
        return []
    # A tokenizer warns of texts beyond the model's length; those are counted, and cut later.
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    return [item.encoded(ids) for item in rendered]


def encode_sides(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[tuple[Encoded, ...]]:
    """All that is learnt from each example: its conversation, and of a pair the rejected one too.

    Where answers are judged (a pair, or a label), only the judged ones have labels. Raises as
    `encode_batch`.
    """
    every: list[Example] = []
    for example in examples:
        every.append(example)
        if "rejected" in example:
            every.append({**example, "completion": example["rejected"]})
    encoded = iter(encode_batch(tokenizer, every))
    found: list[tuple[Encoded, ...]] = []
    for example in examples:
        if "rejected" in example:
            found.append((next(encoded).judged, next(encoded).judged))
        else:
            found.append((next(encoded).judged if "label" in example else next(encoded),))
    return found


@dataclass(frozen=True)
class _Rendered:
    """The texts of a conversation that have to be tokenized to label it."""

    full: str
    earlier: list[tuple[str, str]]
    """Per learnt answer but the last: the text up to its beginning, and up to its end."""

    last: str | None
    """The text up to the beginning of the last answer; None where that is not learnt. Plain text is
    an answer from its beginning on."""

    only_last: bool = False
    some_left: bool = False
    leaves_reasoning_out: bool = False

    def texts(self) -> list[str]:
        last = [] if self.last is None else [self.last]
        return [self.full, *(text for pair in self.earlier for text in pair), *last]

    def encoded(self, ids: Iterator[list[int]]) -> Encoded:
        """Take this conversation's texts' ids, in the order of `texts`, and label them."""
        full = next(ids)
        labels, start = [IGNORED] * len(full), 0
        for _ in self.earlier:
            begin, end = common_length(full, next(ids)), common_length(full, next(ids))
            labels[begin:end] = full[begin:end]
        if self.last is not None:
            start = common_length(full, next(ids))
            labels[start:] = full[start:]
        return Encoded(
            full, labels, self.only_last, self.some_left, self.leaves_reasoning_out, start
        )


def _rendered(tokenizer: PreTrainedTokenizerBase, example: Example) -> _Rendered:
    if is_document(example):
        return _Rendered(render_example(tokenizer, example), [], "")  # it begins at once
    part = script(tokenizer, example)
    messages = example["prompt"] + example["completion"]
    full = part.render(tokenizer)
    *answers, last = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    begun = None
    if messages[last].get("weight") != 0:
        begun = _last_begun(tokenizer, part, full, last)
    answers = [i for i in answers if messages[i].get("weight") != 0]
    earlier: list[tuple[str, str]] = []
    for index in answers:
        span = _span(tokenizer, part, full, index)
        if span:
            earlier.append(span)
        elif part.plain:
            # All or the last alone: what trainings that are there were made with.
            return _Rendered(full, [], begun, only_last=True)
    all_found = len(earlier) == len(answers)
    return _Rendered(
        full,
        earlier,
        begun,
        some_left=not all_found,
        leaves_reasoning_out=part.leaves_reasoning_out,
    )


def _span(
    tokenizer: PreTrainedTokenizerBase, part: Script, full: str, index: int
) -> tuple[str, str] | None:
    """The text up to the beginning of an answer, and up to its end; None where it is no such."""
    try:
        begun = part.render(tokenizer, index, prompt=True)
        ended = part.render(tokenizer, index + 1)
        if full.startswith(ended) and ended.startswith(begun):
            return begun, ended
        if not part.plain:
            before = part.render(tokenizer, index)
            return _rewritten_span(part.messages[index], full, before, begun, ended)
    except StageError:
        raise
    except Exception as error:  # the model's own template runs: anything can come out
        log.debug("The template refuses a part of a conversation that it takes: %s", error)
    return None


def _rewritten_span(
    message: dict[str, Any], full: str, before: str, begun: str, ended: str
) -> tuple[str, str] | None:
    """The same where the template writes something of its own before an answer while it is the
    last, such as an empty block of reasoning, and leaves it out later (Qwen3).

    Only tool calls are learnt without it, since a model that is to learn them often has no others.
    """
    head, same = common_length(full, begun), common_length(full, ended)
    head = len(full[:head].rstrip("<|["))  # two marks that begin alike are two
    if not (full.startswith(before) and head > len(before)):
        return None
    if full.startswith(ended):
        return full[:head], ended
    if "tool_calls" not in message:
        return None
    rest = full[same:]
    for cut in range(same, min(same + LONGEST_OF_ITS_OWN, len(ended))):
        if rest.startswith(ended[cut:]):
            end = same + len(ended) - cut
            said = all(text in full[head:end] for text in _texts(message))
            return (full[:head], full[:end]) if said else None
    return None


def _last_begun(tokenizer: PreTrainedTokenizerBase, part: Script, full: str, index: int) -> str:
    """The text up to the beginning of the last answer; raises NotRenderedError."""
    begun = part.render(tokenizer, index, prompt=True)
    if part.plain or full.startswith(begun):
        return begun
    # It may differ in what the template writes by itself behind the prompt, and in nothing else.
    if common_length(full, begun) < common_length(part.render(tokenizer, index), begun):
        raise NotRenderedError(
            "the model's chat template writes the messages before the last answer in another way "
            "once that is there, so that it can't be told what to learn: take reasoning_content "
            "out of all messages but the last, or choose another model"
        )
    return begun


def _texts(message: dict[str, Any]) -> list[str]:
    """What an answer says, as far as every template writes it as it is."""
    keys = ("content", *REASONING)
    said = [str(message[key]).strip() for key in keys if message.get(key)]
    return said + [call["function"]["name"] for call in message["tool_calls"]]


def common_length(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many tokens, or characters, both begin with."""
    for position, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return position
    return min(len(ours), len(theirs))


def other_tokens(
    texts: Sequence[str],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    who: str = "llama.cpp",
) -> str:
    """In how many texts `who` finds other tokens (`theirs`), and the first such place; empty where
    there is none."""
    pairs = zip(texts, ours, theirs, strict=True)
    different = [(text, [*mine], [*other]) for text, mine, other in pairs if [*mine] != [*other]]
    if not different:
        return ""
    text, mine, other = different[0]
    at = common_length(mine, other)
    return (
        f"{who} splits {len(different)} of {len(texts)} texts into other tokens than the "
        f"training ({other[at : at + 8]} instead of {mine[at : at + 8]} in {text[:60]!r})"
    )


def model_probes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that llama.cpp has to split as the tokenizer does: HARD_TO_SPLIT by themselves, and as
    a conversation with the template's special tokens."""
    return (*HARD_TO_SPLIT, render_example(tokenizer, message_pair(*HARD_TO_SPLIT[:2])))


def rows_read_otherwise(names: Sequence[str], texts: Sequence[str]) -> str:
    """What to say of rows that llama.cpp splits into other tokens; empty where there are none.

    That is a matter of the rows and no fault of the model, whose probes came out alike.
    """
    if not names:
        return ""
    shown = ", ".join(names[:SHOWN_ROWS])
    more = f" and {len(names) - SHOWN_ROWS} more" if len(names) > SHOWN_ROWS else ""
    if all(unicodedata.is_normalized("NFC", text) for text in texts):
        cause = "Its GGUF files may answer such text a little worse."
    else:
        cause = (
            "Their text isn't in Unicode's normal form C (NFC), into which the tokenizer brings "
            "it and llama.cpp doesn't: normalise the dataset, and what is sent to a GGUF file."
        )
    return f"llama.cpp splits some rows into other tokens than the training: {shown}{more}. {cause}"


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template begins a conversation with the bos_token."""
    pair = message_pair("a", "b")
    return bool(tokenizer.bos_token) and render_prompt(tokenizer, pair).startswith(
        str(tokenizer.bos_token)
    )


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens that the chat template puts behind an answer."""
    answer = "\N{SNOWMAN}"  # in no template, so that what follows it is the end of the turn
    text = render_example(tokenizer, message_pair("a", answer))
    tail = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return special.intersection(tail)


def unsupported(part: str, error: Exception, model: ModelFolder) -> StageError:
    """The error for a part of the model that transformers can't load."""
    lines = str(error).strip().splitlines()
    cause = lines[0] if lines else type(error).__name__
    remedy = "Choose a model that this version of transformers supports"
    if "trust_remote_code" in str(error) and not model.trust_remote_code:
        remedy += ", or set spec.model.trustRemoteCode after reading the model's code"
    return StageError(
        Reason.MODEL_UNSUPPORTED,
        f"The base model's {part} can't be loaded: {cause.rstrip(' :.'):.300}. {remedy}.",
    )
