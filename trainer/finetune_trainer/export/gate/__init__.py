"""Whether a model file is what it should be: the gates, in the order in which the files are made.

    source_gate = SourceGate.ask(expect(inputs, workspace), kept)   # the tuned model
    source_gate.check_merged(kind)
    gate = source_gate.check(file, kind)     # the file that all others are made of
    gate.check(other_file, other_kind)
    gate.check_adapter(adapter_file)
    gate.samples(smallest_file, adapter_file)

The source file is held against base model and adapter as transformers and PEFT run them in float32,
unmerged; the merged model and types without quantization as well; every other type against the
source file, in llama.cpp itself. A bad file is a FileVerdict with problems. An error is raised only
where the gate itself can't work. With `verify: off` it looks at nothing and passes everything.

expected     what the training left, and a file held against it
rows         the rows that files are measured on, and samples of them
file_checks  header, sizes, types and metadata; the same tokens, template and end as in training
kept         what earlier attempts have measured
thresholds   how much a type may lose, by the model's size, and what figures show of it
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from finetune_trainer.contract import (
    UNQUANTIZED,
    Export,
    FileVerdict,
    GateReport,
    Notice,
    NoticeCode,
    Quantization,
    Reason,
    Sample,
    StageError,
)
from finetune_trainer.export import llama
from finetune_trainer.export.gate import file_checks
from finetune_trainer.export.gate.expected import Expected, GateInputs, llama_threads, verdict_on
from finetune_trainer.export.gate.file_checks import tokens_of
from finetune_trainer.export.gate.kept import KeptFigures
from finetune_trainer.export.gate.rows import Prompt, choose_rows, prompts_of
from finetune_trainer.export.gguf.header import Header, HeaderError
from finetune_trainer.export.llama import GenerateAnswer, GenerateRequest, LlamaError
from finetune_trainer.export.reference import Generated, Reference, ReferenceRequest
from finetune_trainer.export.reference.float32 import compute_reference
from finetune_trainer.memory.machine import find_gpus
from finetune_trainer.model.tokenizer import (
    load_tokenizer,
    other_tokens,
    rows_read_otherwise,
    settings_of,
)
from finetune_trainer.runtime.child import as_steps

SAMPLE_TOKENS = 128
SAMPLE_SECONDS = 300.0  # for all answers of one model together, prompts included

GPU_UNUSED = Notice(
    code=NoticeCode.GPU_UNUSED,
    evidence="The export's pod has a GPU, and llama.cpp in this image was built without one: its "
    "files are checked on the CPU",
    remedy="Build the trainer's image with CMAKE_ARGS=-DGGML_CUDA=ON, or leave the GPU to others.",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceGate:
    """The gate of the merged model, and of the file without quantization that all others are made
    of."""

    expected: Expected

    @classmethod
    def ask(cls, expected: Expected, kept: KeptFigures) -> SourceGate:
        """Run the models over the rows, unless an earlier attempt did or export.verify is off.

        Raises StageError when that fails.
        """
        return cls(replace(expected, reference=_reference(expected, kept)))

    def check_merged(self, kind: Quantization) -> FileVerdict | None:
        """Look at the merged model, whose weights are of that type; None where none was given."""
        expected, merged = self.expected, self.expected.inputs.merged
        if merged is None:
            return None
        name = merged.path.name
        if expected.export.verify == "off":
            return FileVerdict(file=name, quantization=kind)
        probes = expected.text.probes
        theirs = tokens_of(load_tokenizer(merged), probes)
        different = other_tokens(probes, expected.text.probe_ids, theirs, who="Its tokenizer")
        shown = None
        if expected.reference and expected.reference.merged:
            kept = (True,) * expected.rows.tokens
            shown = expected.judge(expected.reference.merged, kind, kept)
        return verdict_on(name, kind, [different] if different else [], shown)

    def merged_samples(self) -> tuple[Sample, ...]:
        """What the merged model answered, where there is no GGUF file to ask."""
        reference = self.expected.reference
        if reference is None or self.expected.inputs.merged is None:
            return ()
        return _samples(self.expected.prompts, reference.answers)

    def check(self, file: Path, kind: Quantization) -> DerivedGate:
        """Look at the source file; returns the gate of the files that are made of it."""
        expected = self.expected
        if expected.export.verify == "off":
            return DerivedGate(expected, file, FileVerdict(file=file.name, quantization=kind))

        def further_problems(header: Header) -> Iterator[str]:
            yield from file_checks.context_problems(header, expected.context_length)
            yield from file_checks.vocabulary_problems(header, expected.tokenizer)

        found = expected.read(
            file,
            kind,
            further_problems,
            reference=expected.reference.tuned_file if expected.reference else None,
            logprobs_file=expected.source_logprobs if expected.reference else None,
        )
        gate = DerivedGate(expected, file, found.verdict, found.alike)
        for notice in gate.notices:
            log.warning("%s", notice)
        if expected.gpu_memory and found.gpu is False and expected.inputs.reporter:
            expected.inputs.reporter.notice(GPU_UNUSED)
        return gate

    def report(self, samples: Sequence[Sample] = ()) -> GateReport:
        """What was measured where no GGUF file was made."""
        return _report(self.expected, (True,) * self.expected.rows.tokens, samples=tuple(samples))


@dataclass(frozen=True)
class DerivedGate:
    """The gate of the files that are made of the source file, or applied to its model."""

    expected: Expected
    source: Path
    source_verdict: FileVerdict
    alike: tuple[bool, ...] = ()
    """Whether llama.cpp splits each row as the training did; the others are not measured on."""

    @property
    def kept(self) -> tuple[bool, ...]:
        """Which tokens are measured on."""
        return self.expected.tokens_of(self.alike)

    @property
    def notices(self) -> tuple[str, ...]:
        """What is worth knowing of the rows, and refuses no file."""
        rows = self.expected.rows
        others = [place for place, alike in enumerate(self.alike) if not alike]
        said = rows_read_otherwise(
            [rows.names[place] for place in others], [rows.texts[place] for place in others]
        )
        return (f"{said} They are left out of the measurement.",) if said else ()

    def check(self, file: Path, kind: Quantization) -> FileVerdict:
        """Look at a file that was made of the source file."""
        if self.expected.export.verify == "off":
            return FileVerdict(file=file.name, quantization=kind)
        reference = None
        if self.expected.reference is not None:
            of_tuned = kind in UNQUANTIZED
            tuned = self.expected.reference.tuned_file
            reference = tuned if of_tuned else self.expected.source_logprobs
        beside = self._beside_source
        return self.expected.read(file, kind, beside, reference, kept=self.kept).verdict

    def _beside_source(self, header: Header) -> Iterator[str]:
        if not self.source_verdict.passed:
            yield f"it was made of {self.source.name}, which is refused"
        try:
            with Header(self.source) as before:
                yield from file_checks.differences_from_source(header, before)
        except HeaderError:
            return  # the verdict on the source file says it

    def check_adapter(self, file: Path) -> FileVerdict:
        """The adapter alone: taken away from the source file, it has to leave the base model.

        It is measured on a few rows.
        """
        kind, shown, problems = self.source_verdict.quantization, None, list[str]()
        if self.expected.export.verify == "off":
            return FileVerdict(file=file.name, quantization=Quantization.F32)
        try:
            with Header(file) as header:
                problems += _adapter_problems(header)
            if not problems:
                reference = self.expected.reference
                base, few = reference.base_file if reference else None, self.expected.rows.few
                found = self.expected.compare(self.source, base, without_adapter=file, places=few)
                shown = self.expected.judge(
                    found.measurement, kind, self.kept, of_tuned=False, places=few
                )
        except HeaderError as error:
            problems = [f"{error}"]
        except LlamaError as error:
            problems = [f"llama.cpp can't apply it: {error}"]
        return verdict_on(file.name, Quantization.F32, problems, shown)

    def samples(self, file: Path, adapter: Path | None = None) -> tuple[Sample, ...]:
        """Let a file answer the prompts of some rows, greedily; and the base model, where the
        adapter's GGUF file is there to be taken away from it."""
        prompts = self.expected.prompts
        if not prompts or self.expected.export.verify == "off":
            return ()
        tuned = self._answers(file, None)
        base = self._answers(file, adapter) if adapter else ()
        return _samples(prompts, tuned, base)

    def _answers(self, file: Path, without_adapter: Path | None) -> tuple[Generated | None, ...]:
        request = GenerateRequest(
            file=file,
            prompts=tuple(prompt.ids for prompt in self.expected.prompts),
            limit=SAMPLE_TOKENS,
            seconds=SAMPLE_SECONDS,
            without_adapter=without_adapter,
            threads=llama_threads(),
            gpu=self.expected.fits_gpu(file),
        )
        try:
            steps = as_steps(self.expected.inputs.reporter)
            return llama.call(request, GenerateAnswer, steps).answers
        except LlamaError as error:
            raise StageError(
                Reason.INTERNAL_ERROR,
                f"{file.name} passed the gate, and then llama.cpp could not answer with it: "
                f"{error}",
            ) from error

    def report(
        self, verdicts: Sequence[FileVerdict] = (), samples: Sequence[Sample] = ()
    ) -> GateReport:
        """Everything that was measured; `verdicts` are those on the files after the source file."""
        return _report(
            self.expected,
            self.kept,
            files=(self.source_verdict, *verdicts),
            notices=self.notices,
            samples=tuple(samples),
        )


def expect(inputs: GateInputs, workspace: Path) -> Expected:
    """Choose the rows that files are measured on; none where export.verify is off.

    `workspace` takes three files of 2 bytes for each token (512 at most) and entry of the
    vocabulary.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    base, off = inputs.base, inputs.export.verify == "off"
    # As the training loads it: without a config.json beside it, which an adapter lacks,
    # transformers takes another class for some families, with other tokens (Mistral, Phi-3).
    tokenizer = load_tokenizer(base)
    rows = choose_rows(tokenizer, () if off else inputs.examples, inputs.names)
    settings = settings_of(base.path).get_text_config()
    return Expected(
        inputs=inputs,
        tokenizer=tokenizer,
        rows=rows,
        text=file_checks.trained_text(tokenizer, rows),
        context_length=getattr(settings, "max_position_embeddings", None),
        reference=None,
        prompts=prompts_of(tokenizer, rows.examples),
        workspace=workspace,
        gpu_memory=min((gpu.memory_bytes for gpu in find_gpus().usable), default=0),
    )


def rejects(export: Export, verdict: FileVerdict) -> bool:
    """Whether a file has to be kept apart; with `verify: warn` none has."""
    return not verdict.passed and export.verify != "warn"


def _reference(expected: Expected, kept: KeptFigures) -> Reference | None:
    inputs, rows = expected.inputs, expected.rows
    if not rows.measured:
        return None
    asked = () if inputs.export.gguf or inputs.merged is None else expected.prompts
    request = ReferenceRequest(
        base=inputs.base,
        adapter=inputs.adapter,
        rows=rows.measured,
        tuned_file=expected.workspace / "reference-tuned.npy",
        base_file=expected.workspace / "reference-base.npy",
        merged=inputs.merged,
        prompts=tuple(prompt.ids for prompt in asked),
        answer_tokens=SAMPLE_TOKENS,
        answer_seconds=SAMPLE_SECONDS,
    )
    if kept.reference:
        known = Reference.of(request, kept.reference)
        if all(kept.bring(file) for file in (known.tuned_file, known.base_file) if file):
            log.info("The tuned model was asked by an earlier attempt")
            return known
    reference = compute_reference(request, as_steps(inputs.reporter))
    kept.add_reference(reference.answer, [request.tuned_file, request.base_file])
    log.info(
        "The gate measures on %d tokens of %d rows: perplexity %.4g%s",
        rows.tokens,
        len(rows.measured),
        reference.tuned.perplexity,
        f", and {reference.base.perplexity:.4g} of the base model" if reference.base else "",
    )
    return reference


def _samples(
    prompts: Sequence[Prompt],
    tuned: Sequence[Generated | None],
    base: Sequence[Generated | None] = (),
) -> tuple[Sample, ...]:
    """Prompts with their answers; a model that had no time for one has none."""
    found = tuple(
        prompt.sample(before.text if before else None, after)
        for prompt, before, after in zip_longest(prompts, base, tuned)
    )
    asked = [sample for sample in found if sample.tuned is not None]
    cut = sum(not sample.stopped for sample in asked)
    if cut:
        log.warning("%d of %d answers did not end within %d tokens", cut, len(asked), SAMPLE_TOKENS)
    if len(asked) < len(found):
        log.warning(
            "%d of %d prompts were not asked: no time was left", len(found) - len(asked), len(found)
        )
    return found


def _report(expected: Expected, kept: Sequence[bool], **found: object) -> GateReport:
    reference, rows = expected.reference, expected.rows
    counted = {place for place, keep in zip(rows.conversations, kept, strict=True) if keep}
    base = reference.base.only(kept).perplexity if reference and reference.base else None
    return GateReport.model_validate(
        {
            "rows": len(counted) if reference else 0,
            "tokens": sum(kept) if reference else 0,
            "held_out": expected.inputs.held_out,
            "base_perplexity": base,
            "tuned_perplexity": reference.tuned.only(kept).perplexity if reference else None,
            **found,
        }
    )


def _adapter_problems(header: Header) -> Iterator[str]:
    if cut := file_checks.cut_problem(header):
        yield cut
    if header.value("general.type") != "adapter":
        yield "its metadata does not say that it is an adapter"
