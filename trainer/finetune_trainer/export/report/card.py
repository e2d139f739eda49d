"""README.md: the model card, with the metadata that the Hugging Face Hub reads.

It may be pushed to a public repository. So it names no bucket, no address and no row of the data;
report.html, which stays in the output folder, does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune_trainer.export.report import numbers, tables
from finetune_trainer.export.report.facts import Facts
from finetune_trainer.export.report.loading import ways
from finetune_trainer.export.report.verdict import learnt
from finetune_trainer.model.source import CARD, is_hub
from finetune_trainer.runtime.units import size


def write_model_card(target: Path, facts: Facts) -> None:
    """Write the card to the file `target`."""
    target.write_text(render(facts), encoding="utf-8", errors="replace")


def render(facts: Facts) -> str:
    """The card: metadata as YAML, then Markdown."""
    # Markdown is no HTML: `plain` escapes what either could take for a mark.
    environment = Environment(
        loader=PackageLoader("finetune_trainer.export.report"),
        autoescape=False,  # noqa: S701 - as above
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "size": size}
    body = environment.get_template("card.md.jinja").render(
        facts=facts,
        n=numbers,
        hub=is_hub(facts.config.model.source),
        data_name=data_name(facts),
        verdict=learnt(facts).text,
        quality=tables.quality(facts),
        perplexities=tables.perplexities(facts),
        training=tables.training(facts),
        dataset=tables.dataset(facts),
        hyperparameters=tables.hyperparameters(facts),
        ways=ways(facts),
    )
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}\n"


def metadata(facts: Facts) -> ModelCardData:
    """What the Hub reads; only what is known."""
    source = facts.config.model.source
    measured = results(facts) or None
    return ModelCardData(
        base_model=source if is_hub(source) else None,
        eval_results=measured,
        library_name="transformers" if facts.has("merged") else "peft",
        license=facts.license,
        model_name=facts.name if measured else None,
        pipeline_tag="text-generation",
        tags=tags(facts),
        base_model_relation="finetune" if is_hub(source) else None,
    )


def tags(facts: Facts) -> list[str]:
    """What it is, in the Hub's words."""
    lora = facts.config.training.lora
    kinds = {
        "lora": True,
        "qlora": facts.config.training.method == "qlora",
        "dora": lora.use_dora,
        "rslora": lora.use_rslora,
        "sft": True,
        "gguf": any(each.path.endswith(".gguf") and not each.rejected for each in facts.files),
        "conversational": True,
        "finetune-operator": True,
    }
    return [name for name, applies in kinds.items() if applies]


def data_name(facts: Facts) -> str:
    """The dataset's file name: where it lies is nobody's business."""
    return PurePosixPath(facts.config.dataset.source.removeprefix("s3://")).name


def results(facts: Facts) -> list[EvalResult]:
    """Loss and perplexity on the held-out rows, for the Hub's model-index."""
    change = facts.change
    if change is None:
        return []
    found = {
        "loss": ("Loss on held-out answers", change.tuned_loss),
        "perplexity": ("Perplexity of held-out answers", change.tuned_perplexity),
    }
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
    except Exception:  # somebody else's file, read by a parser of its own: not known then
        return None


def _config_license(base: Path) -> str | None:
    try:
        return _name(json.loads((base / "config.json").read_bytes()))
    except (OSError, ValueError):
        return None


def _name(values: Any) -> str | None:
    found = values.get("license") if isinstance(values, dict) else None
    return found.strip() if isinstance(found, str) and found.strip() else None


_MARKS = re.compile(r"([\\`*_{}\[\]<>|~])")


def plain(text: str) -> str:
    """Text that is nothing but text in Markdown, also in a table's cell."""
    escaped = _MARKS.sub(r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;")
