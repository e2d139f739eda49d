"""What the training used and left, which a file has to show again; and a file held against it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import Example, Export, FileVerdict, Quantization
from finetune_trainer.export import llama
from finetune_trainer.export.gate import file_checks, thresholds
from finetune_trainer.export.gate.file_checks import TrainedText
from finetune_trainer.export.gate.rows import MeasuredRows, Prompt
from finetune_trainer.export.gate.thresholds import Judgement, Learnt
from finetune_trainer.export.gguf.header import Header, HeaderError
from finetune_trainer.export.llama import CheckAnswer, CheckRequest, LlamaError
from finetune_trainer.export.reference import Measurement, Reference
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import available_cpus, idle_cpus
from finetune_trainer.runtime.child import as_steps
from finetune_trainer.runtime.reporter import Reporter

GPU_SPARE = 2 << 30  # bytes for keys, values, logits and the driver

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GateInputs:
    """What the gate is opened with."""

    base: ModelFolder
    adapter: Path | None
    """Without one, `base` is the finished model itself."""

    examples: Sequence[Example]
    """The held-out rows as `prepare` left them, or else training rows."""

    export: Export
    held_out: bool = True
    """Whether no training step saw the examples."""

    names: Sequence[str] = ()
    """Of the examples, for people."""

    merged: ModelFolder | None = None
    """The merged model, where it is to be checked."""

    reporter: Reporter | None = None


@dataclass(frozen=True)
class Expected:
    """What the training used and left, and a file has to show again."""

    inputs: GateInputs
    tokenizer: PreTrainedTokenizerBase
    rows: MeasuredRows
    text: TrainedText
    context_length: int | None
    """The longest text that the model is made for, in tokens."""

    reference: Reference | None
    """What the tuned model predicts for the rows; None if nothing is measured."""

    prompts: tuple[Prompt, ...]
    workspace: Path
    gpu_memory: int = 0
    """Bytes of the pod's GPU, if it has one."""

    @property
    def export(self) -> Export:
        return self.inputs.export

    @property
    def source_logprobs(self) -> Path:
        """Where the source file's log-probabilities are kept."""
        return self.workspace / "source.npy"

    def fits_gpu(self, file: Path) -> bool:
        """Whether a file with what it takes to run it fits into the GPU's memory."""
        size = file.stat().st_size if file.exists() else 0
        return bool(self.gpu_memory) and size + size // 10 + GPU_SPARE <= self.gpu_memory

    def compare(
        self,
        file: Path,
        reference: Path | None,
        *,
        logprobs_file: Path | None = None,
        without_adapter: Path | None = None,
        places: tuple[int, ...] | None = None,
    ) -> CheckAnswer:
        """Let llama.cpp load a file, and measure it where there is a reference.

        `places` are the rows to measure, without which it is all of them.
        """
        return llama.call(
            CheckRequest(
                file=file,
                texts=() if without_adapter else self.text.texts,
                ends=self.text.ends,
                rows=self.rows.measured if reference else (),
                reference=reference,
                places=places,
                logprobs_file=logprobs_file,
                without_adapter=without_adapter,
                threads=llama_threads(),
                gpu=self.fits_gpu(file),
            ),
            CheckAnswer,
            as_steps(self.inputs.reporter),
        )

    def judge(
        self,
        measured: Measurement,
        kind: Quantization,
        kept: Sequence[bool],
        *,
        parameters: int = 0,
        of_tuned: bool = True,
        places: Sequence[int] | None = None,
    ) -> Judgement:
        """The figures with their limit, and the problems that they show.

        `kept` says which tokens of all rows count. `of_tuned` is whether it should predict as the
        tuned model; `places` are the rows that were measured, where that isn't all of them.
        """
        reference = self.reference
        base = reference.base if reference else None
        effect = base.kl_divergence if base else None
        limit = thresholds.limit_for(kind, parameters, self.export.quality_limits, effect)
        learnt = None
        if reference and base and of_tuned:
            learnt = Learnt(base.only(kept), reference.tuned.only(kept))
        all_blocks = self.rows.blocks
        if places is not None:
            kept = self.rows.tokens_at(places, kept)
            all_blocks = self.rows.tokens_at(places, all_blocks)
        blocks = [block for block, keep in zip(all_blocks, kept, strict=True) if keep]
        return thresholds.judge(measured.only(kept), blocks, limit, learnt)

    def read(
        self,
        file: Path,
        kind: Quantization,
        further_problems: Callable[[Header], Iterable[str]],
        reference: Path | None,
        *,
        kept: Sequence[bool] | None = None,
        logprobs_file: Path | None = None,
    ) -> Read:
        """Read, load and measure a file of the model.

        `kept` says which tokens count; without it those of rows that llama.cpp reads alike.
        """
        alike, shown, problems = (True,) * len(self.rows.texts), None, list[str]()
        gpu: bool | None = None
        try:
            with Header(file) as header:
                problems += file_checks.header_problems(header, kind)
                if not file_checks.cut_problem(header):  # else it is of no use to anybody
                    problems += further_problems(header)
                    found = self.compare(file, reference, logprobs_file=logprobs_file)
                    problems += file_checks.reading_problems(found.reading, header, self.text)
                    alike, gpu = self.text.rows_alike(found.reading), found.gpu
                    shown = self.judge(
                        found.measurement,
                        kind,
                        self.tokens_of(alike) if kept is None else kept,
                        parameters=file_checks.parameter_count(header),
                    )
        except HeaderError as error:
            problems = [f"{error}"]
        except LlamaError as error:
            problems.append(f"llama.cpp can't load it: {error}")
        return Read(verdict_on(file.name, kind, problems, shown), alike, gpu)

    def tokens_of(self, alike: Sequence[bool]) -> tuple[bool, ...]:
        """For each token that is measured, whether it is of one of these rows."""
        return tuple(alike[place] for place in self.rows.conversations)


@dataclass(frozen=True)
class Read:
    """A file's verdict, and how llama.cpp reads with it."""

    verdict: FileVerdict
    alike: tuple[bool, ...]
    """Whether llama.cpp splits each row as the training did."""

    gpu: bool | None = None
    """Whether llama.cpp can use a GPU; None where it could not tell."""


def verdict_on(
    name: str, kind: Quantization, problems: Sequence[str], shown: Judgement | None
) -> FileVerdict:
    measured = shown.problems if shown else ()
    verdict = FileVerdict(
        file=name,
        quantization=kind,
        problems=(*problems, *measured),
        measured_problems=len(measured),
        quality=shown.quality if shown else None,
    )
    return _logged(verdict)


def _logged(verdict: FileVerdict) -> FileVerdict:
    quality = verdict.quality
    if quality:
        log.info(
            "%s: KL divergence %.3g (limit %.3g), same top token %.1f%%, perplexity %.4g%s",
            verdict.file,
            quality.kl_divergence,
            quality.max_kl_divergence or 0.0,
            100 * quality.same_top_token,
            quality.perplexity,
            "" if quality.judged else "; too few rows to judge",
        )
    for problem in verdict.problems:
        log.warning("%s: %s", verdict.file, problem)
    return verdict


def llama_threads() -> int:
    """As many as CPUs are idle, and at least half of those that this process may use.

    llama.cpp's threads wait actively: on busy CPUs more of them are slower.
    """
    usable = available_cpus()
    return max(1, usable // 2, min(usable, idle_cpus()))
