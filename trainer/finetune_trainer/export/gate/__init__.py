"""Whether a GGUF file is what it should be: the gates, in the order in which the files are made.

    source_gate = SourceGate.open(base, adapter, rows, workspace, export)  # asks the tuned model
    gate = source_gate.check(file, kind)     # the file that all others are made of
    gate.check(other_file, other_kind)
    gate.check_adapter(adapter_file)
    gate.samples(adapter_file)

The source file is held against base model and adapter as transformers and PEFT run them in float32,
unmerged; types without quantization as well; every other type against the source file, in llama.cpp
itself. A bad file is a FileVerdict with problems. An error is raised only where the gate itself
can't work.

rows         the rows that files are measured on, and samples of them
file_checks  header, sizes, types and metadata; the same tokens, template and end as in training
thresholds   how much a type may lose, by the model's size
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from finetune_trainer.contract import (
    UNQUANTIZED,
    Example,
    Export,
    FileVerdict,
    GateReport,
    Quality,
    Quantization,
    Reason,
    Sample,
    StageError,
)
from finetune_trainer.contract.verdict import over_limit
from finetune_trainer.export import llama
from finetune_trainer.export.gate import file_checks, thresholds
from finetune_trainer.export.gate.file_checks import TrainedText
from finetune_trainer.export.gate.rows import (
    MeasuredRows,
    choose_rows,
    question_of,
    said,
    spread,
)
from finetune_trainer.export.gguf.header import Header, HeaderError
from finetune_trainer.export.llama import (
    CheckAnswer,
    CheckRequest,
    GenerateAnswer,
    Generated,
    GenerateRequest,
    LlamaError,
)
from finetune_trainer.export.reference import Measurement
from finetune_trainer.export.reference.float32 import Reference, compute_reference
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import available_cpus
from finetune_trainer.model.rendering import render_prompt
from finetune_trainer.model.tokenizer import load_tokenizer

SAMPLES = 10
SAMPLE_TOKENS = 128
SAMPLE_SECONDS = 300.0  # for all answers of one model together
LONGEST_PROMPT = 1024  # tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expected:
    """What the training used and left, and a GGUF file has to show again."""

    tokenizer: PreTrainedTokenizerBase
    rows: MeasuredRows
    held_out: bool
    """Whether no training step saw the rows."""

    text: TrainedText
    context_length: int | None
    """The longest text that the model is made for, in tokens."""

    reference: Reference | None
    """What the tuned model predicts for the rows; None if nothing is measured."""

    export: Export
    workspace: Path

    @property
    def source_logprobs(self) -> Path:
        """Where the source file's log-probabilities are kept."""
        return self.workspace / "source.npy"

    def compare(
        self,
        file: Path,
        reference: Path | None,
        *,
        kept_file: Path | None = None,
        without_adapter: Path | None = None,
    ) -> CheckAnswer:
        """Let llama.cpp load a file, and measure it where there is a reference."""
        return llama.call(
            CheckRequest(
                file=file,
                texts=() if without_adapter else self.text.texts,
                ends=self.text.ends,
                rows=self.rows.measured if reference else (),
                reference=reference,
                kept_file=kept_file,
                without_adapter=without_adapter,
                threads=_threads(),
            ),
            CheckAnswer,
        )

    def judge(
        self, measured: Measurement, kind: Quantization, parameters: int = 0
    ) -> tuple[Quality | None, tuple[str, ...]]:
        """The figures with their limit, and the problems that they show."""
        if not measured.finite:
            return None, ("it computes numbers that are not finite",)
        if not measured.tokens:
            return None, ()
        effect = self.reference.effect if self.reference else None
        limit = thresholds.limit_for(kind, parameters, self.export.quality_limits, effect)
        quality = Quality(
            kl_divergence=measured.kl_divergence,
            same_top_token=measured.same_top_token,
            perplexity=measured.perplexity,
            max_kl_divergence=limit,
        )
        problems = (over_limit(quality.kl_divergence, limit),) if quality.over_limit else ()
        return quality, problems

    def verdict_on(
        self,
        file: Path,
        kind: Quantization,
        further_problems: Callable[[Header], Iterable[str]],
        reference: Path | None,
        kept_file: Path | None = None,
    ) -> FileVerdict:
        """Read, load and measure a file of the model."""
        quality = None
        try:
            with Header(file) as header:
                problems = list(file_checks.header_problems(header, kind))
                if not file_checks.cut_problem(header):  # else it is of no use to anybody
                    problems += further_problems(header)
                    found = self.compare(file, reference, kept_file=kept_file)
                    problems += file_checks.reading_problems(found.reading, header, self.text)
                    parameters = file_checks.parameter_count(header)
                    quality, shown = self.judge(found.measurement, kind, parameters)
                    problems += shown
        except HeaderError as error:
            problems = [f"{error}"]
        except LlamaError as error:
            problems.append(f"llama.cpp can't load it: {error}")
        return _logged(
            FileVerdict(
                file=file.name, quantization=kind, problems=tuple(problems), quality=quality
            )
        )


@dataclass(frozen=True)
class SourceGate:
    """The gate of the file without quantization that all others are made of."""

    expected: Expected

    @classmethod
    def open(
        cls,
        base: ModelFolder,
        adapter: Path | None,
        examples: Sequence[Example],
        workspace: Path,
        export: Export,
        *,
        held_out: bool = True,
    ) -> SourceGate:
        """Choose the rows, and run base model and adapter over them unless export.verify is off.

        `examples` are the held-out rows as `prepare` left them, or else training rows, with
        `held_out` False. Without an adapter, `base` is the finished model itself. `workspace`
        takes three files of 2 bytes for each token (512 at most) and entry of the vocabulary.
        Raises StageError when the model can't be run.
        """
        workspace.mkdir(parents=True, exist_ok=True)
        # As the training loads it: without a config.json beside it, which an adapter lacks,
        # transformers takes another class for some families, with other tokens (Mistral, Phi-3).
        tokenizer = load_tokenizer(base)
        rows = choose_rows(tokenizer, examples)
        reference = None
        if export.verify != "off" and rows.measured:
            reference = compute_reference(base, adapter, rows.measured, workspace)
            alone = reference.base_perplexity
            log.info(
                "The gate measures on %d tokens of %d rows: perplexity %.4g%s",
                rows.tokens,
                len(rows.measured),
                reference.tuned_perplexity,
                "" if alone is None else f", and {alone:.4g} of the base model",
            )
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=base.trust_remote_code)
        return cls(
            Expected(
                tokenizer=tokenizer,
                rows=rows,
                held_out=held_out,
                text=file_checks.trained_text(tokenizer, rows),
                context_length=getattr(config.get_text_config(), "max_position_embeddings", None),
                reference=reference,
                export=export,
                workspace=workspace,
            )
        )

    def check(self, file: Path, kind: Quantization) -> DerivedGate:
        """Look at the source file; returns the gate of the files that are made of it."""
        expected = self.expected

        def further_problems(header: Header) -> Iterator[str]:
            yield from file_checks.context_problems(header, expected.context_length)
            yield from file_checks.vocabulary_problems(header, expected.tokenizer)

        verdict = expected.verdict_on(
            file,
            kind,
            further_problems,
            reference=expected.reference.tuned if expected.reference else None,
            kept_file=expected.source_logprobs if expected.reference else None,
        )
        return DerivedGate(expected, file, verdict)


@dataclass(frozen=True)
class DerivedGate:
    """The gate of the files that are made of the source file, or applied to its model."""

    expected: Expected
    source: Path
    source_verdict: FileVerdict

    def check(self, file: Path, kind: Quantization) -> FileVerdict:
        """Look at a file that was made of the source file."""
        reference = None
        if self.expected.reference is not None:
            of_tuned = kind in UNQUANTIZED
            tuned = self.expected.reference.tuned
            reference = tuned if of_tuned else self.expected.source_logprobs
        return self.expected.verdict_on(file, kind, self._beside_source, reference)

    def _beside_source(self, header: Header) -> Iterator[str]:
        if not self.source_verdict.passed:
            yield f"it was made of {self.source.name}, which is refused"
        try:
            with Header(self.source) as before:
                yield from file_checks.differences_from_source(header, before)
        except HeaderError:
            return  # the verdict on the source file says it

    def check_adapter(self, file: Path) -> FileVerdict:
        """The adapter alone: taken away from the source file, it has to leave the base model."""
        quality = None
        try:
            with Header(file) as header:
                problems = tuple(_adapter_problems(header))
            if not problems:
                reference = self.expected.reference
                base = reference.base if reference else None
                found = self.expected.compare(self.source, base, without_adapter=file)
                kind = self.source_verdict.quantization
                quality, problems = self.expected.judge(found.measurement, kind)
        except HeaderError as error:
            problems = (f"{error}",)
        except LlamaError as error:
            problems = (f"llama.cpp can't apply it: {error}",)
        return _logged(
            FileVerdict(
                file=file.name,
                quantization=Quantization.F32,
                problems=problems,
                quality=quality,
            )
        )

    def samples(self, adapter: Path | None = None) -> tuple[Sample, ...]:
        """Let the source file answer the prompts of some rows, greedily; and the base model, where
        the adapter's GGUF file is there to be taken away from it."""
        expected, prompts = self.expected, []
        for example in expected.rows.examples:
            text = render_prompt(expected.tokenizer, example)
            ids = expected.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) <= LONGEST_PROMPT:
                prompts.append((example, tuple(ids)))
        chosen = spread(prompts, SAMPLES)
        if not chosen:
            return ()
        tuned = self._answers([ids for _, ids in chosen], None)
        base = self._answers([ids for _, ids in chosen], adapter) if adapter else ()
        samples = tuple(
            Sample(
                prompt=question_of(example),
                expected=said(example["completion"][-1]),
                base=base[index].text if base else None,
                tuned=tuned[index].text,
                stopped=tuned[index].stopped,
            )
            for index, (example, _) in enumerate(chosen)
        )
        cut = sum(not sample.stopped for sample in samples)
        if cut:
            log.warning(
                "%d of %d answers did not end within %d tokens", cut, len(samples), SAMPLE_TOKENS
            )
        return samples

    def _answers(
        self, prompts: Sequence[tuple[int, ...]], without_adapter: Path | None
    ) -> tuple[Generated, ...]:
        request = GenerateRequest(
            file=self.source,
            prompts=tuple(prompts),
            limit=SAMPLE_TOKENS,
            seconds=SAMPLE_SECONDS,
            without_adapter=without_adapter,
            threads=_threads(),
        )
        try:
            return llama.call(request, GenerateAnswer).answers
        except LlamaError as error:
            raise StageError(
                Reason.INTERNAL_ERROR,
                f"{self.source.name} passed the gate, and then llama.cpp could not answer with it: "
                f"{error}",
            ) from error

    def report(
        self, verdicts: Sequence[FileVerdict] = (), samples: Sequence[Sample] = ()
    ) -> GateReport:
        """Everything that was measured; `verdicts` are those on the files after the source file."""
        reference, rows = self.expected.reference, self.expected.rows
        return GateReport(
            rows=len(rows.measured) if reference else 0,
            tokens=rows.tokens if reference else 0,
            held_out=self.expected.held_out,
            base_perplexity=reference.base_perplexity if reference else None,
            tuned_perplexity=reference.tuned_perplexity if reference else None,
            files=(self.source_verdict, *verdicts),
            samples=tuple(samples),
        )


def rejects(export: Export, verdict: FileVerdict) -> bool:
    """Whether a file has to be kept apart; with `verify: warn` none has."""
    return not verdict.passed and export.verify != "warn"


def _logged(verdict: FileVerdict) -> FileVerdict:
    quality = verdict.quality
    if quality:
        log.info(
            "%s: KL divergence %.3g (limit %.3g), same top token %.1f%%, perplexity %.4g",
            verdict.file,
            quality.kl_divergence,
            quality.max_kl_divergence or 0.0,
            100 * quality.same_top_token,
            quality.perplexity,
        )
    for problem in verdict.problems:
        log.warning("%s: %s", verdict.file, problem)
    return verdict


def _adapter_problems(header: Header) -> Iterator[str]:
    if cut := file_checks.cut_problem(header):
        yield cut
    if header.value("general.type") != "adapter":
        yield "its metadata does not say that it is an adapter"


def _threads() -> int:
    # llama.cpp's threads wait actively: on busy CPUs more of them are slower.
    return max(1, available_cpus() // 2)
