"""report.html: one file that shows what came out, and asks for nothing else.

What models and datasets say is not to be trusted: everything goes through Jinja's escaping, and a
Content-Security-Policy lets the page run no script and fetch nothing, whatever it contains.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from finetune_trainer.export.report import charts, numbers, tables
from finetune_trainer.export.report.facts import Facts
from finetune_trainer.export.report.loading import ways
from finetune_trainer.export.report.verdict import overall, verdicts
from finetune_trainer.model.source import is_hub
from finetune_trainer.runtime.units import size

_PACKAGE = "finetune_trainer.export.report"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_report(target: Path, facts: Facts) -> None:
    """Write the page to the file `target`."""
    # A lone surrogate, as JSON can hold it, has no UTF-8.
    target.write_text(render(facts), encoding="utf-8", errors="replace")


def render(facts: Facts) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "size": size}
    return environment.get_template("report.html.jinja").render(
        facts=facts,
        n=numbers,
        style=Markup(  # noqa: S704 - our own style sheet
            (files(_PACKAGE) / "templates" / "report.css").read_text(encoding="utf-8")
        ),
        hub=is_hub(facts.config.model.source),
        overall=overall(facts),
        verdicts=verdicts(facts),
        **_tables(facts),
        **_charts(facts),
    )


def _tables(facts: Facts) -> dict[str, Any]:
    return {
        "quality": tables.quality(facts),
        "perplexities": tables.perplexities(facts),
        "training": tables.training(facts),
        "evaluations": tables.evaluations(facts),
        "dataset": tables.dataset(facts),
        "hyperparameters": tables.hyperparameters(facts),
        "lineage": tables.lineage(facts),
        "ways": ways(facts),
    }


def _charts(facts: Facts) -> dict[str, Markup | None]:
    drawn = {
        "loss_wide": charts.loss_chart(facts, charts.WIDE, "loss-wide"),
        "loss_narrow": charts.loss_chart(facts, charts.NARROW, "loss-narrow"),
        "lengths": charts.length_chart(facts, charts.LENGTHS, "lengths"),
    }
    # matplotlib escapes what it writes, and only numbers and our own words go in.
    return {name: Markup(svg) if svg else None for name, svg in drawn.items()}  # noqa: S704


def visible(text: str) -> str:
    """Control characters, which HTML forbids, as the replacement character."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
