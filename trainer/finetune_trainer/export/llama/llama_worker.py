"""llama.cpp's library at work, in a process of its own: a Request in, its answer out, as JSON.

Weights stay in the file, which is mapped into memory: llama.cpp would otherwise keep a second copy
of many types in an order that its CPU code likes.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp
import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from finetune_trainer.export.llama import (
    CheckAnswer,
    CheckRequest,
    GenerateAnswer,
    GenerateRequest,
    Reading,
    Request,
    TokenizeRequest,
)
from finetune_trainer.export.reference import (
    Generated,
    MeasuredRow,
    Measurement,
    Meter,
    create_logprobs,
    read_logprobs,
    store_logprobs,
)
from finetune_trainer.runtime import child

T = TypeVar("T")

MIN_CONTEXT = 128  # tokens
CACHE_BYTES = 400 << 20  # for keys and values of answers that are computed side by side
UBATCH = 1024  # tokens that are computed at once: the weights are read once for so many
DECODE_TOKENS = 2048  # of all rows of one call, which bounds keys and values
DECODE_ROWS = 64
LOGITS_BYTES = 256 << 20  # of one call
ABORTED = 2  # what llama_decode returns where it was interrupted


class TimeUpError(Exception):
    """llama.cpp was interrupted while it read tokens."""


@dataclass
class LlamaSession:
    """A model, and the context that it runs in."""

    file: Path
    threads: int
    vocabulary_only: bool = False
    check: bool = False
    """Look at every block of every tensor for values that are not finite."""

    gpu: bool = False
    """Put all layers onto the GPU, where llama.cpp was built for one."""

    model: Any = field(init=False)
    vocabulary: Any = field(init=False)
    size: int = field(init=False)
    """Entries of the vocabulary."""

    context: Any = field(init=False, default=None)
    _interrupt: Any = field(init=False, default=None)  # llama.cpp keeps a pointer to it

    def __post_init__(self) -> None:
        # The process ends where llama.cpp can't load the file.
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = -1 if self.gpu and llama_cpp.llama_supports_gpu_offload() else 0
        options.vocab_only = self.vocabulary_only
        options.check_tensors = self.check
        options.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(self.file).encode(), options)
        if not self.model:
            sys.exit(1)  # llama.cpp has said why
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def tokens(self, text: str, *, add_special: bool) -> list[int]:
        """The tokens of a text. Special tokens in it count as such."""
        data = text.encode()
        most = len(data) + 8  # there are never more tokens than bytes
        found = (llama_cpp.llama_token * most)()
        count = llama_cpp.llama_tokenize(
            self.vocabulary, data, len(data), found, most, add_special, True
        )
        if count < 0:
            sys.exit(f"a text of {len(data)} bytes has more than {most} tokens")
        return list(found[:count])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        most = 64 * len(tokens) + 64  # bytes
        found = ctypes.create_string_buffer(most)
        given = (llama_cpp.llama_token * len(tokens))(*tokens)
        count = llama_cpp.llama_detokenize(
            self.vocabulary, given, len(tokens), found, most, False, False
        )
        return found.raw[: max(count, 0)].decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at this token."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocabulary, token))

    def open(self, *, length: int, sequences: int = 1, outputs: int = 1) -> None:
        """Make a context for `length` tokens of all sequences together, `outputs` logits a call."""
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = length
        options.n_ubatch = min(UBATCH, length)
        options.n_seq_max = sequences
        options.n_outputs_max = max(outputs, sequences)
        options.n_outputs_max_per_seq = outputs
        options.kv_unified = True
        options.swa_full = False
        options.n_threads = options.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            sys.exit("llama.cpp can't make a context for this model")

    def interrupt_at(self, until: float) -> None:
        """Let `run` raise TimeUpError from `until` on, by time.monotonic(), also within a call.

        llama.cpp asks once for each tensor that it computes.
        """
        self._interrupt = llama_cpp.ggml_abort_callback(lambda _: time.monotonic() >= until)
        llama_cpp.llama_set_abort_callback(self.context, self._interrupt, None)

    def take_away(self, adapter: Path) -> None:
        """Take a LoRA adapter (a GGUF file) away from the model that it was merged into."""
        loaded = llama_cpp.llama_adapter_lora_init(self.model, str(adapter).encode())
        if not loaded:
            sys.exit(1)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
        scales = (ctypes.c_float * 1)(-1.0)
        if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            sys.exit("llama.cpp can't apply the adapter")

    @property
    def bytes_per_token(self) -> int:
        """Memory that a token's keys and values take, in 16 bits (a little more than they do where
        some layers see a window only)."""
        heads = llama_cpp.llama_model_n_head(self.model)
        width = llama_cpp.llama_model_n_embd(self.model) // max(1, heads)
        per_layer = 2 * 2 * llama_cpp.llama_model_n_head_kv(self.model) * width
        return int(llama_cpp.llama_model_n_layer(self.model) * per_layer)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        self.context = None

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def run(self, tokens: Sequence[tuple[int, int, int, bool]]) -> Iterator[npt.NDArray[Any]]:
        """Read (token, position, sequence, wanted); yields the logits after each wanted token.

        Raises TimeUpError where that was interrupted.
        """
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, (token, position, sequence, wanted) in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = wanted
            status = llama_cpp.llama_decode(self.context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status == ABORTED:
            raise TimeUpError
        if status != 0:
            sys.exit(f"llama_decode returned {status}")
        for index, (_, _, _, wanted) in enumerate(tokens):
            if wanted:
                pointer = llama_cpp.llama_get_logits_ith(self.context, index)
                yield np.ctypeslib.as_array(pointer, shape=(self.size,))


def groups(items: Sequence[T], fits: Callable[[Sequence[T]], bool]) -> Iterator[list[T]]:
    """Neighbours in groups that fit; what doesn't even fit alone makes up one of its own."""
    group: list[T] = []
    for item in items:
        if group and not fits([*group, item]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def greedy(
    session: LlamaSession, prompts: Sequence[Sequence[int]], limit: int, seconds: float
) -> list[tuple[list[int], bool] | None]:
    """Continue all prompts side by side; returns the tokens of each answer, and whether it ended.

    An answer has at most `limit` tokens. After `seconds` all that are not finished are cut, and
    prompts that weren't read to their end by then have None.
    """
    session.interrupt_at(time.monotonic() + seconds)
    pending: dict[int, int] = {}  # the token that comes next, by number of the prompt
    with suppress(TimeUpError):
        for number, prompt in enumerate(prompts):
            pending[number] = _first(session, number, prompt)
    answers: dict[int, list[int]] = {number: [] for number in pending}
    ended = dict.fromkeys(pending, False)
    live = list(pending)
    while True:
        for number in list(live):
            ended[number] = session.ends(pending[number])
            if not ended[number]:
                answers[number].append(pending[number])
            if ended[number] or len(answers[number]) == limit:
                live.remove(number)
        step = [(answers[n][-1], len(prompts[n]) + len(answers[n]) - 1, n, True) for n in live]
        try:
            chosen = [int(logits.argmax()) for logits in session.run(step)] if live else []
        except TimeUpError:
            break
        if not live:
            break
        pending.update(zip(live, chosen, strict=True))
    return [(answers[n], ended[n]) if n in answers else None for n in range(len(prompts))]


def _first(session: LlamaSession, sequence: int, prompt: Sequence[int]) -> int:
    last = len(prompt) - 1
    tokens = [(token, at, sequence, at == last) for at, token in enumerate(prompt)]
    (logits,) = session.run(tokens)
    return int(logits.argmax())


def tokenize(request: TokenizeRequest) -> Reading:
    session = LlamaSession(request.file, threads=1, vocabulary_only=True)
    return _read(session, request.texts, (), add_special=True)


def check(request: CheckRequest) -> CheckAnswer:
    # With an adapter taken away, the file was looked at before.
    check_all = request.without_adapter is None
    session = LlamaSession(request.file, request.threads, check=check_all, gpu=request.gpu)
    chosen = range(len(request.rows)) if request.places is None else request.places
    decodes = list(decodes_of([request.rows[place] for place in chosen], session.size))
    places = placed_tokens(request.rows, chosen)
    session.open(
        length=max((sum(len(row.ids) for row in rows) for rows in decodes), default=MIN_CONTEXT),
        sequences=max(map(len, decodes), default=1),
        outputs=max((sum(len(row.measured) for row in rows) for rows in decodes), default=1),
    )
    if request.without_adapter:
        session.take_away(request.without_adapter)
    return CheckAnswer(
        reading=_read(session, request.texts, request.ends, add_special=False),
        measurement=_measure(session, decodes, places, request.reference, request.logprobs_file),
        gpu=bool(llama_cpp.llama_supports_gpu_offload()),
    )


def decodes_of(rows: Sequence[MeasuredRow], vocabulary: int) -> Iterator[list[MeasuredRow]]:
    """Rows in groups that llama.cpp computes in one call, so that it seldom reads the weights."""
    outputs = LOGITS_BYTES // (4 * vocabulary)

    def fits(group: Sequence[MeasuredRow]) -> bool:
        return (
            len(group) <= DECODE_ROWS
            and sum(len(row.ids) for row in group) <= DECODE_TOKENS
            and sum(len(row.measured) for row in group) <= outputs
        )

    return groups(rows, fits)


def placed_tokens(rows: Sequence[MeasuredRow], chosen: Iterable[int]) -> list[int]:
    """Where the first measured token of each chosen row stands among those of all rows."""
    begins = [0, *accumulate(len(row.measured) for row in rows)]
    return [begins[place] for place in chosen]


def _read(
    session: LlamaSession, texts: Sequence[str], ends: Sequence[int], *, add_special: bool
) -> Reading:
    return Reading(
        tokens=tuple(tuple(session.tokens(text, add_special=add_special)) for text in texts),
        adds_bos=bool(llama_cpp.llama_vocab_get_add_bos(session.vocabulary)),
        adds_eos=bool(llama_cpp.llama_vocab_get_add_eos(session.vocabulary)),
        stops_at=tuple(token for token in ends if session.ends(token)),
    )


def _measure(
    session: LlamaSession,
    decodes: Sequence[Sequence[MeasuredRow]],
    begins: Sequence[int],
    reference_file: Path | None,
    logprobs_file: Path | None,
) -> Measurement:
    reference = read_logprobs(reference_file) if reference_file else None
    total = sum(len(row.measured) for rows in decodes for row in rows)
    written = create_logprobs(logprobs_file, total, session.size) if logprobs_file else None
    meter, places = Meter(), iter(begins)
    for number, rows in enumerate(decodes):
        child.say_progress(number, len(decodes))
        session.clear()
        logits = session.run([token for n, row in enumerate(rows) for token in _tokens(row, n)])
        for row in rows:  # one row's copy at a time
            found = np.stack(list(islice(logits, len(row.measured))))
            done = next(places)
            beside = None if reference is None else reference[done : done + len(row.measured)]
            values = meter.add(found, [row.ids[position] for position in row.measured], beside)
            if written is not None and values is not None:
                store_logprobs(written, done, values)
    return meter.measurement()


def _tokens(row: MeasuredRow, sequence: int) -> Iterator[tuple[int, int, int, bool]]:
    """What of a row has to be read, as LlamaSession.run takes it."""
    wanted = {position - 1 for position in row.measured}
    for at, token in enumerate(row.ids[: row.measured[-1]]):
        yield token, at, sequence, at in wanted


def generate(request: GenerateRequest) -> GenerateAnswer:
    session = LlamaSession(request.file, request.threads, gpu=request.gpu)
    most = CACHE_BYTES // max(1, session.bytes_per_token)
    limit, answers = request.limit, list[Generated | None]()

    def fits(group: Sequence[tuple[int, ...]]) -> bool:
        return sum(len(prompt) + limit for prompt in group) <= most

    for group in groups(request.prompts, fits):
        child.say_progress(len(answers), len(request.prompts))
        session.open(
            length=sum(len(prompt) + limit for prompt in group),
            sequences=len(group),
        )
        if request.without_adapter:
            session.take_away(request.without_adapter)
        seconds = request.seconds * len(group) / len(request.prompts)
        answers += [
            None
            if found is None
            else Generated(text=session.text(found[0]), tokens=len(found[0]), stopped=found[1])
            for found in greedy(session, group, limit, seconds)
        ]
        session.close()
    return GenerateAnswer(answers=tuple(answers))


def main() -> None:
    # llama.cpp reports every tensor; only its errors are worth a line.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    request: Request = TypeAdapter(Request).validate_json(sys.stdin.read())
    answer: Reading | CheckAnswer | GenerateAnswer
    match request:
        case TokenizeRequest():
            answer = tokenize(request)
        case CheckRequest():
            answer = check(request)
        case GenerateRequest():
            answer = generate(request)
    sys.stdout.write(answer.model_dump_json())


if __name__ == "__main__":
    main()
