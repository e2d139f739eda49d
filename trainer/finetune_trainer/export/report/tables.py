"""The tables of report and card as text, and how figures are written in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune_trainer.contract import LengthSpread, Lineage, ListedRows, Training, usual_rate
from finetune_trainer.contract.verdict import Tone, word_for
from finetune_trainer.export.gguf.files import adapter_file_name
from finetune_trainer.export.report.facts import Facts, GgufFile, LossPoint
from finetune_trainer.runtime import duration, size

NOTHING = "–"  # noqa: RUF001 - a dash where there is no figure

MOST_EVALUATIONS = 100
"""Rows of the table of evaluations, about; the curve shows more."""


class TableRow(NamedTuple):
    """A name and what belongs to it."""

    name: str
    value: str
    changed: bool = False
    """Whether a setting is not the default."""

    code: bool = False
    """Whether it is for machines."""


@dataclass(frozen=True)
class QualityRow:
    """One GGUF file in the quality table."""

    file: str
    kind: str
    published: bool
    """Whether it is among the files: one that others are made of may be a temporary one."""

    adapter: bool
    """Whether it is the adapter alone."""

    size: str
    divergence: str
    limit: str
    used: float | None
    """Share of the limit that the divergence uses, up to 1; None where there is no limit."""

    same_top_token: str
    perplexity: str
    tone: Tone
    verdict: str
    problems: tuple[str, ...]

    @property
    def label(self) -> str:
        """What the table calls it."""
        marks = ("" if self.published else "¹") + ("²" if self.adapter else "")
        return ("LoRA " if self.adapter else "") + self.kind + marks


COMPARED = (
    "Each quantization was compared in llama.cpp with the 16-bit file that it is made of, and the "
    "16-bit files with base model and adapter as transformers computes them in float32."
)


def quality_notes(rows: Sequence[QualityRow]) -> tuple[str, ...]:
    """Footnotes of the quality table."""
    found = []
    if any(not row.published for row in rows):
        found.append("¹ Measured, but not asked for, and so not among the files.")
    if any(row.adapter for row in rows):
        found.append(
            "² The adapter alone: taken away from the 16-bit file again, it has to leave the base "
            "model, whose perplexity stands here."
        )
    return tuple(found)


class Bar(NamedTuple):
    """One perplexity, and how long its bar is."""

    name: str
    value: str
    length: float
    """0 to 1; the largest is 1."""

    kind: str
    """`base`, `tuned` or `file`."""


def quality_rows(facts: Facts) -> tuple[QualityRow, ...]:
    """One row for each GGUF file that was checked."""
    return tuple(_quality_row(each, facts.base_name) for each in facts.ggufs)


def _quality_row(each: GgufFile, base_name: str) -> QualityRow:
    verdict, found = each.verdict, each.verdict.quality
    word = word_for(each.artifact, verdict)
    limit = found.max_kl_divergence if found else None
    used = min(found.kl_divergence / limit, 1.0) if found and limit else None
    return QualityRow(
        file=each.artifact.path if each.artifact else verdict.file,
        kind=verdict.quantization.value,
        published=each.artifact is not None,
        adapter=verdict.file == adapter_file_name(base_name),
        size=size(each.artifact.bytes) if each.artifact else NOTHING,
        divergence=divergence(found.kl_divergence if found else None),
        limit=setting(limit) if limit else NOTHING,
        used=used,
        same_top_token=share(found.same_top_token if found else None),
        perplexity=perplexity(found.perplexity if found else None),
        tone=word.tone,
        verdict=word.text,
        problems=verdict.problems,
    )


def perplexity_bars(facts: Facts) -> tuple[Bar, ...]:
    """Base, tuned and each file, all on the same tokens; the training's where no gate measured."""
    gate, change = facts.gate, facts.change
    found = [
        ("Base model", gate.base_perplexity, "base"),
        ("Tuned", gate.tuned_perplexity, "tuned"),
    ]
    found += [
        (verdict.quantization.value, verdict.quality.perplexity, "file")
        for verdict in gate.files
        if verdict.quality and verdict.file != adapter_file_name(facts.base_name)
    ]
    if all(value is None for _, value, _ in found) and change:
        found = [
            ("Base model", change.base_perplexity, "base"),
            ("Tuned", change.tuned_perplexity, "tuned"),
        ]
    known = [(name, value, kind) for name, value, kind in found if value is not None]
    most = max((value for _, value, _ in known if math.isfinite(value)), default=1.0)
    return tuple(
        Bar(name, perplexity(value), min(value / most, 1.0), kind) for name, value, kind in known
    )


def training_rows(facts: Facts) -> tuple[TableRow, ...]:
    """Steps, time, tokens and losses of the training."""
    metrics = facts.metrics
    found = [
        _row("Steps", metrics.train_steps, count),
        _row("Duration", metrics.train_runtime_seconds, duration),
        _row("Tokens trained on", metrics.train_tokens, count),
        _row("Tokens per second", metrics.tokens_per_second, count),
        _row("Peak memory of a device", metrics.peak_memory_bytes, size),
        _row("Peak memory predicted", metrics.predicted_memory_bytes, size),
        _row("Trainable parameters", metrics.trainable_parameters, count),
        _row("Parameters of the base model", metrics.base_parameters, count),
        _row("Mean training loss", metrics.train_loss, loss),
        _row("Last training loss", metrics.final_loss, loss),
        _row("Reward accuracy on held-out rows", metrics.reward_accuracy, share),
        _row("Reward margin on held-out rows", metrics.reward_margin, loss),
    ]
    return tuple(row for row in found if row)


def _row(name: str, value: float | None, write: Any) -> TableRow | None:
    return None if value is None else TableRow(name, write(value))


def dataset_rows(facts: Facts) -> tuple[TableRow, ...]:
    """What `prepare` found in the data, as far as its report has it."""
    report = facts.dataset
    cut = "Split" if facts.plain_text else "Cut"
    found = [
        TableRow("Rows in the file", count(report.rows)),
        TableRow("Examples trained on", count(report.examples)),
        TableRow("Examples held out", count(report.eval_examples)),
        TableRow("Rows that can't be used", count(report.invalid)),
        TableRow("Blank rows, which count as none", count(report.blank_rows or None)),
        TableRow("Rows short of cells that aren't needed", count(report.short_rows or None)),
        TableRow("Rows with empty cells at their end", count(report.long_rows or None)),
        TableRow("Duplicates", count(_count(report.duplicates))),
        TableRow(f"{cut} at maxSequenceLength", count(_count(report.truncated))),
        TableRow("Left out: no answer within it", count(_count(report.left_out))),
        TableRow("Tokens of an example", _spread(report.tokens)),
        TableRow("Tokens of an answer", _spread(report.answer_tokens)),
        TableRow("Tokens in all", count(report.tokens.total if report.tokens else None)),
    ]
    return tuple(row for row in found if row.value != NOTHING)


def _count(listed: ListedRows | None) -> int | None:
    return listed.count if listed else None


def _spread(found: LengthSpread | None) -> str:
    if found is None:
        return NOTHING
    median, p95, most = (count(value) for value in (found.median, found.p95, found.max))
    return f"median {median}, 95% up to {p95}, longest {most}"


def listed_evaluations(facts: Facts) -> tuple[LossPoint, ...]:
    """Evaluations at even distances, with the last and the best."""
    found = facts.evaluations
    every = -(-len(found) // MOST_EVALUATIONS)
    kept = {*found[:: every or 1], *found[-1:], *([facts.best] if facts.best else [])}
    return tuple(point for point in found if point in kept)


def hyperparameter_rows(facts: Facts) -> tuple[TableRow, ...]:
    """The settings as they were applied, by their names in the spec."""
    usual = dict(_flat(Training().model_dump(mode="json")))
    training = facts.config.training
    usual["learningRate"] = usual_rate(training.method, training.objective)
    return tuple(
        TableRow(name, setting(value), changed=name in usual and usual[name] != value)
        for name, value in _flat(facts.trained.hyperparameters)
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def lineage_rows(facts: Facts) -> tuple[TableRow, ...]:
    """What the files were made from."""
    made = facts.lineage
    prints = made.fingerprints
    columns = ", ".join(f"{name}: {column}" for name, column in made.columns.items())
    return (
        TableRow("Dataset", made.dataset),
        TableRow("Dataset's ETag", made.dataset_etag, code=True),
        TableRow("Columns", columns or NOTHING),
        TableRow("Base model", made.model),
        TableRow("Base model's revision", made.model_commit or made.model_revision, code=True),
        *_initial(made),
        TableRow("Fingerprint of prepare", prints.prepare, code=True),
        TableRow("Fingerprint of train", prints.train, code=True),
        TableRow("Fingerprint of export", prints.export, code=True),
        *(TableRow(name, version) for name, version in made.versions.items()),
    )


def _initial(made: Lineage) -> Iterator[TableRow]:
    if made.init_from:
        yield TableRow("Went on from the adapter", made.init_from)
        yield TableRow("Adapter's revision", made.init_revision or NOTHING, code=True)


def loss(value: float | None) -> str:
    """A loss in nats per token, as 1.812."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def perplexity(value: float | None) -> str:
    """A perplexity, as 6.12 or 1,234."""
    if value is None:
        return NOTHING
    if not math.isfinite(value) or value >= 1e6:
        return "over a million"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def divergence(value: float | None) -> str:
    """A KL divergence in nats per token, as 0.0313."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    if 0 <= value < 1e-5:
        return "under 0.00001"
    return f"{value:.5f}" if value < 0.001 else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share from 0 to 1, as 97.7%."""
    return NOTHING if value is None else f"{value:.1%}"


def count(value: float | None) -> str:
    """A whole number, as 1,234,567."""
    return NOTHING if value is None else f"{value:,.0f}"


def setting(value: Any) -> str:
    """A value of the spec, spelled as in the spec."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value) or "none"
    return "none" if value is None else str(value)
