"""What people read of an export: report.html, and README.md, the model card.

facts      what both are written from: the values of the stages, read once
tables     the rows of every table, as text; how figures are written
summary    what came out, in sentences; how each artifact is loaded, as commands
charts     the curves and the histogram
templates/ the texts, the style of the page, the drawings

All is made of values alone: nothing here reads the store or a model.

The page is one file that asks for nothing else. What models and datasets say is not to be trusted:
everything goes through Jinja's escaping, and a Content-Security-Policy lets the page run no script
and fetch nothing, whatever it contains.

The card has the metadata that the Hugging Face Hub reads, and may be pushed to a public repository.
So it names no bucket, no address and no row of the data; the page, which stays in the output
folder, does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune_trainer.export.report import charts, tables
from finetune_trainer.export.report.facts import Facts
from finetune_trainer.export.report.summary import (
    compared_with_base,
    loading_commands,
    overall,
    statements,
)
from finetune_trainer.model.base_model import CARD, is_hub
from finetune_trainer.runtime import size

__all__ = ["Facts", "license_of", "write_model_card", "write_report"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MARKS = re.compile(r"([\\`*_{}\[\]<>|~])")


def write_report(target: Path, facts: Facts) -> None:
    """Write the page to the file `target`."""
    # A lone surrogate, as JSON can hold it, has no UTF-8.
    target.write_text(render_report(facts), encoding="utf-8", errors="replace")


def render_report(facts: Facts) -> str:
    environment = Environment(
        loader=PackageLoader(__name__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "size": size}
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        n=tables,
        style=Markup(  # noqa: S704 - our own style sheet
            (files(__name__) / "templates" / "report.css").read_text(encoding="utf-8")
        ),
        hub=is_hub(facts.config.model.source),
        overall=overall(facts),
        statements=statements(facts),
        evaluations=tables.listed_evaluations(facts),
        lineage=tables.lineage_rows(facts),
        **_shown_in_both(facts),
        **_charts(facts),
    )


def _shown_in_both(facts: Facts) -> dict[str, Sequence[object]]:
    """Tables and commands that the page and the card have in common."""
    return {
        "quality": (quality := tables.quality_rows(facts)),
        "compared": tables.COMPARED,
        "notes": tables.quality_notes(quality),
        "perplexities": tables.perplexity_bars(facts),
        "training": tables.training_rows(facts),
        "dataset": tables.dataset_rows(facts),
        "hyperparameters": tables.hyperparameter_rows(facts),
        "commands": loading_commands(facts),
    }


def _charts(facts: Facts) -> dict[str, charts.Chart | None]:
    return {
        "loss_wide": charts.loss_chart(facts, charts.WIDE, "loss-wide"),
        "loss_narrow": charts.loss_chart(facts, charts.NARROW, "loss-narrow"),
        "lengths": charts.length_chart(facts, charts.LENGTHS, "lengths"),
    }


def visible(text: str) -> str:
    """Replace control characters, which HTML forbids."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def write_model_card(target: Path, facts: Facts) -> None:
    """Write the card to the file `target`."""
    target.write_text(render_card(facts), encoding="utf-8", errors="replace")


def render_card(facts: Facts) -> str:
    """The card: metadata as YAML, then Markdown."""
    # Markdown is no HTML: `plain` escapes what either could take for a mark.
    environment = Environment(
        loader=PackageLoader(__name__),
        autoescape=False,  # noqa: S701 - as above
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "size": size}
    body = environment.get_template("card.md.jinja").render(
        facts=facts,
        n=tables,
        hub=is_hub(facts.config.model.source),
        data_name=data_name(facts),
        verdict=compared_with_base(facts).text,
        **_shown_in_both(facts),
    )
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}\n"


def metadata(facts: Facts) -> ModelCardData:
    """What the Hub reads, as far as it is known."""
    source = facts.config.model.source
    measured = results(facts) or None
    return ModelCardData(
        base_model=source if is_hub(source) else None,
        eval_results=measured,
        library_name="peft" if facts.has("adapter") and not facts.has("merged") else "transformers",
        license=facts.license,
        model_name=facts.name if measured else None,
        pipeline_tag="text-generation",
        tags=tags(facts),
        base_model_relation="finetune" if is_hub(source) else None,
    )


def tags(facts: Facts) -> list[str]:
    """Tags of the model on the Hub."""
    lora = facts.config.training.lora
    kinds = {
        "lora": facts.config.training.method != "full",
        "full-fine-tuning": facts.config.training.method == "full",
        "qlora": facts.config.training.method == "qlora",
        "dora": lora.use_dora,
        "rslora": lora.use_rslora,
        facts.objective: True,
        "gguf": any(each.path.endswith(".gguf") and not each.rejected for each in facts.files),
        "conversational": not facts.plain_text,
        "finetune-operator": True,
    }
    return [name for name, applies in kinds.items() if applies]


def data_name(facts: Facts) -> str:
    """The dataset's file name. Where it lies is private."""
    return PurePosixPath(facts.config.dataset.source.removeprefix("s3://")).name


def results(facts: Facts) -> list[EvalResult]:
    """Loss and perplexity on the held-out rows, for the Hub's model-index."""
    if preferences := facts.preferences:
        found = {
            "accuracy": ("Reward accuracy on held-out rows", preferences.accuracy),
            "margin": ("Reward margin on held-out rows", preferences.margin),
        }
        return _results_of(facts, found)
    change = facts.change
    if change is None:
        return []
    found = {
        "loss": (f"Loss on held-out {facts.learnt}", change.tuned_loss),
        "perplexity": (f"Perplexity of held-out {facts.learnt}", change.tuned_perplexity),
    }
    return _results_of(facts, found)


def _results_of(facts: Facts, found: Mapping[str, tuple[str, float]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=facts.dataset.detected.format if facts.dataset.detected else "text",
            dataset_name=f"held-out rows of {data_name(facts)}",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for kind, (name, value) in found.items()
    ]


def license_of(base: Path | None) -> str | None:
    """The license that a base model's folder names, in its README's metadata or config.json."""
    if base is None:
        return None
    for read in (_readme_license, _config_license):
        found = read(base)
        if found:
            return found
    return None


def _readme_license(base: Path) -> str | None:
    file = base / CARD
    if not file.is_file():
        return None
    try:
        return _name(metadata_load(file))
    except Exception:  # any parser error: the license is not known then
        return None


def _config_license(base: Path) -> str | None:
    try:
        return _name(json.loads((base / "config.json").read_bytes()))
    except (OSError, ValueError):
        return None


def _name(values: Any) -> str | None:
    found = values.get("license") if isinstance(values, dict) else None
    return found.strip() if isinstance(found, str) and found.strip() else None


def plain(text: str) -> str:
    """Escape text for Markdown, also in a table's cell."""
    escaped = _MARKS.sub(r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;")
