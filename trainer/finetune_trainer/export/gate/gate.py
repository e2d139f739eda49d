"""The gate that each GGUF file has to pass, in the order in which the files are made.

    gate = Gate.open(base, adapter, rows, workspace, export)   # what the tuned model says, once
    gate.check(file, kind)                                     # 16 bits first, then the others
    gate.check_adapter(file)
    gate.samples(file, adapter_file)
    gate.report()

The 16-bit file is held against base model and adapter as transformers and PEFT run them in
float32, unmerged; types without quantization as well; every other type against the 16-bit file,
in llama.cpp itself. A bad file is a FileVerdict with problems. An error is raised only where the
gate itself can't work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedTokenizerBase

from finetune_trainer.contract import (
    UNQUANTIZED,
    Export,
    FileVerdict,
    GateReport,
    Quality,
    Quantization,
    Reason,
    Sample,
    StageError,
)
from finetune_trainer.contract.verdict_words import over_limit
from finetune_trainer.export import llama
from finetune_trainer.export.gate import structure, thresholds, tokens
from finetune_trainer.export.gguf.header import Header, HeaderError
from finetune_trainer.export.reference import compute
from finetune_trainer.export.reference import rows as choosing
from finetune_trainer.model.loading import available_cpus
from finetune_trainer.model.tokenizer import load_tokenizer, render_prompt

SAMPLES = 10
SAMPLE_TOKENS = 128
SAMPLE_SECONDS = 300.0  # for all answers of one model together
LONGEST_PROMPT = 1024  # tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What the training used and left, as far as it can be found in a GGUF file."""

    tokenizer: PreTrainedTokenizerBase
    rows: choosing.Rows
    held_out: bool
    """Whether no training step saw the rows."""

    context: int | None
    """The longest text that the model is made for, in tokens."""

    reference: compute.Reference | None
    """What the tuned model says of the rows; None where nothing is measured."""


class Gate:
    """What is known of the tuned model, and of the files checked so far."""

    def __init__(self, training: Training, workspace: Path, export: Export) -> None:
        self.training = training
        self._wanted = tokens.wanted(training.tokenizer, training.rows)
        self._workspace = workspace
        self._export = export
        self._sixteen: tuple[Path, FileVerdict] | None = None
        self._files: tuple[FileVerdict, ...] = ()
        self._samples: tuple[Sample, ...] = ()

    @classmethod
    def open(
        cls,
        base: Path,
        adapter: Path | None,
        examples: Sequence[dict[str, Any]],
        workspace: Path,
        export: Export,
        *,
        held_out: bool = True,
        trust_remote_code: bool = False,
    ) -> Gate:
        """Choose the rows, and run base model and adapter over them unless export.verify is off.

        `examples` are the held-out rows as `prepare` left them, or else training rows, with
        `held_out` False. Without an adapter, `base` is the finished model itself. `workspace`
        takes three files of 2 bytes for each token (512 at most) and entry of the vocabulary.
        Raises StageError when the model can't be run.
        """
        workspace.mkdir(parents=True, exist_ok=True)
        # As the training loads it: without a config.json beside it, which an adapter lacks,
        # transformers takes another class for some families, with other tokens (Mistral, Phi-3).
        tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
        rows = choosing.choose(tokenizer, examples)
        known = None
        if export.verify != "off" and rows.cut:
            known = compute.compute(
                base, adapter, rows.cut, workspace, trust_remote_code=trust_remote_code
            )
            _log_reference(rows, known)
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(Training(tokenizer, rows, held_out, context, known), workspace, export)

    @property
    def mode(self) -> Literal["fail", "warn", "off"]:
        """What spec.export.verify asks for."""
        return self._export.verify

    def rejects(self, check: FileVerdict) -> bool:
        """Whether a file has to be kept apart; with `warn` none has."""
        return not check.passed and self.mode != "warn"

    def check(self, file: Path, kind: Quantization) -> FileVerdict:
        """Look at a file; the first has to be the one without quantization that the others are
        made of."""
        if self._sixteen is None and kind not in UNQUANTIZED:
            raise ValueError(f"{file.name} is checked before the file that it was made of")
        try:
            with Header(file) as header:
                check = self._check(file, kind, header)
        except HeaderError as error:
            check = FileVerdict(file=file.name, quantization=kind, problems=(f"{error}",))
        if self._sixteen is None:
            self._sixteen = (file, check)
        return self._finished(check)

    def check_adapter(self, file: Path) -> FileVerdict:
        """The adapter alone: taken away from the 16-bit file, it has to leave the base model."""
        sixteen, of_sixteen = self._source()
        quality = None
        try:
            with Header(file) as header:
                problems = list(_adapter_problems(header))
            if not problems:
                said = self._ask(sixteen, self._against_base(), adapter=file)
                quality, problems = self._judged(said, of_sixteen.quantization)
        except HeaderError as error:
            problems = [f"{error}"]
        except llama.LlamaError as error:
            problems = [f"llama.cpp can't apply it: {error}"]
        return self._finished(
            FileVerdict(
                file=file.name,
                quantization=Quantization.F32,
                problems=tuple(problems),
                quality=quality,
            )
        )

    def samples(self, file: Path, adapter: Path | None = None) -> tuple[Sample, ...]:
        """Let a file answer the prompts of some rows, greedily; and the base model, where the
        adapter's GGUF file is there to be taken away from it."""
        chosen = self._prompts()
        if not chosen:
            return ()
        tuned = self._answers(file, [ids for _, ids in chosen], None)
        base = self._answers(file, [ids for _, ids in chosen], adapter) if adapter else []
        self._samples = tuple(
            Sample(
                prompt=example["prompt"][-1]["content"],
                expected=example["completion"][-1]["content"],
                base=base[index]["text"] if base else None,
                tuned=tuned[index]["text"],
                stopped=tuned[index]["stopped"],
            )
            for index, (example, _) in enumerate(chosen)
        )
        rambling = sum(not sample.stopped for sample in self._samples)
        if rambling:
            log.warning(
                "%d of %d answers did not end within %d tokens",
                rambling,
                len(self._samples),
                SAMPLE_TOKENS,
            )
        return self._samples

    def report(self) -> GateReport:
        """Everything that was measured so far."""
        known = self.training.reference
        return GateReport(
            rows=len(self.training.rows.cut) if known else 0,
            tokens=self.training.rows.tokens if known else 0,
            held_out=self.training.held_out,
            base_perplexity=known.base_perplexity if known else None,
            tuned_perplexity=known.tuned_perplexity if known else None,
            files=self._files,
            samples=self._samples,
        )

    def _check(self, file: Path, kind: Quantization, header: Header) -> FileVerdict:
        problems = list(structure.problems_of(header, kind))
        if header.size < header.end:  # a cut file is of no use to anybody
            return FileVerdict(file=file.name, quantization=kind, problems=tuple(problems))
        problems += self._beside_source(header)
        quality = None
        try:
            said = self._ask(file, self._against(kind))
        except llama.LlamaError as error:
            problems.append(f"llama.cpp can't load it: {error}")
        else:
            problems += tokens.problems_of(said, header, self._wanted)
            quality, more = self._judged(said, kind, structure.parameters(header))
            problems += more
        return FileVerdict(
            file=file.name, quantization=kind, problems=tuple(problems), quality=quality
        )

    def _beside_source(self, header: Header) -> Iterator[str]:
        if self._sixteen is None:
            yield from structure.unlike_config(header, self.training.context)
            yield from tokens.other_vocabulary(header, self.training.tokenizer)
            return
        source, of_source = self._sixteen
        if not of_source.passed:
            yield f"it was made of {source.name}, which is refused"
        try:
            with Header(source) as before:
                yield from structure.unlike(header, before)
        except HeaderError:
            return  # said already

    def _against(self, kind: Quantization) -> dict[str, Any]:
        """What a file is held against, and whether its own words are kept for others."""
        kept = self._workspace / "sixteen.npy"
        if self.training.reference is None:
            return {"rows": [], "against": None, "write": None}
        of_tuned = kind in UNQUANTIZED
        return {
            "rows": self._request_rows(),
            "against": str(self.training.reference.tuned if of_tuned else kept),
            "write": str(kept) if self._sixteen is None else None,
        }

    def _against_base(self) -> dict[str, Any]:
        if self.training.reference is None or self.training.reference.base is None:
            return {"rows": [], "against": None, "write": None}
        return {
            "rows": self._request_rows(),
            "against": str(self.training.reference.base),
            "write": None,
        }

    def _request_rows(self) -> list[dict[str, Any]]:
        return [{"ids": row.ids, "measured": row.measured} for row in self.training.rows.cut]

    def _ask(
        self, file: Path, measured: dict[str, Any], *, adapter: Path | None = None
    ) -> dict[str, Any]:
        return llama.call(
            do="check",
            file=str(file),
            texts=[] if adapter else self._wanted.texts,
            ends=self._wanted.ends,
            adapter=str(adapter) if adapter else None,
            scale=-1.0,
            threads=_threads(),
            **measured,
        )

    def _judged(
        self, said: dict[str, Any], kind: Quantization, parameters: int = 0
    ) -> tuple[Quality | None, list[str]]:
        if not said["finite"]:
            return None, ["it computes numbers that are not finite"]
        if not said["measured"]:
            return None, []
        effect = self.training.reference.effect if self.training.reference else None
        limit = thresholds.limit_for(kind, parameters, self._export.quality_limits, effect)
        divergence = float(said["klDivergence"])
        quality = Quality(
            kl_divergence=divergence,
            same_top_token=said["sameTopToken"],
            perplexity=said["perplexity"],
            max_kl_divergence=limit,
        )
        return quality, [over_limit(divergence, limit)] if quality.over_limit else []

    def _prompts(self) -> list[tuple[dict[str, Any], list[int]]]:
        found = []
        for example in self.training.rows.examples:
            text = render_prompt(self.training.tokenizer, example)
            ids = self.training.tokenizer(text, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            if len(ids) <= LONGEST_PROMPT:
                found.append((example, ids))
        return choosing.spread(found, SAMPLES)

    def _answers(
        self, file: Path, prompts: list[list[int]], adapter: Path | None
    ) -> list[dict[str, Any]]:
        try:
            said = llama.call(
                do="answer",
                file=str(file),
                prompts=prompts,
                limit=SAMPLE_TOKENS,
                seconds=SAMPLE_SECONDS,
                adapter=str(adapter) if adapter else None,
                scale=-1.0,
                threads=_threads(),
            )
        except llama.LlamaError as error:
            raise StageError(
                Reason.INTERNAL_ERROR,
                f"{file.name} passed the gate, and then llama.cpp could not answer with it: "
                f"{error}",
            ) from error
        answers: list[dict[str, Any]] = said["answers"]
        return answers

    def _source(self) -> tuple[Path, FileVerdict]:
        if self._sixteen is None:
            raise ValueError("the 16-bit file has to be checked first")
        return self._sixteen

    def _finished(self, check: FileVerdict) -> FileVerdict:
        self._files += (check,)
        quality = check.quality
        if quality:
            log.info(
                "%s: KL divergence %.3g (limit %.3g), same top token %.1f%%, perplexity %.4g",
                check.file,
                quality.kl_divergence,
                quality.max_kl_divergence or 0.0,
                100 * quality.same_top_token,
                quality.perplexity,
            )
        for problem in check.problems:
            log.warning("%s: %s", check.file, problem)
        return check


def _log_reference(rows: choosing.Rows, known: compute.Reference) -> None:
    base = known.base_perplexity
    log.info(
        "The gate measures on %d tokens of %d rows: perplexity %.4g%s",
        rows.tokens,
        len(rows.cut),
        known.tuned_perplexity,
        "" if base is None else f", and {base:.4g} of the base model",
    )


def _adapter_problems(header: Header) -> Iterator[str]:
    if header.size < header.end:
        yield f"the file was cut: it has {header.size:,} bytes, its tensors need {header.end:,}"
    if header.value("general.type") != "adapter":
        yield "its metadata does not say that it is an adapter"


def _threads() -> int:
    # llama.cpp's threads wait actively: on busy CPUs more of them are slower.
    return max(1, available_cpus() // 2)
