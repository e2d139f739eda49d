"""report.html: what it says, in which structure, and what it never lets through."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from finetune_trainer.contract import FileVerdict, GateReport, Quantization, Sample
from finetune_trainer.contract.verdict import Tone
from finetune_trainer.export.report import render_card, render_report, tables, visible, write_report
from finetune_trainer.export.report.charts import (
    LENGTHS,
    MOST_POINTS,
    NARROW,
    WIDE,
    length_chart,
    loss_chart,
    short,
    thin,
    ticks,
)
from finetune_trainer.export.report.facts import LossPoint
from finetune_trainer.export.report.summary import (
    overall,
    statements,
)
from tests.report_facts import (
    config,
    dataset_report,
    facts,
    gate,
    lineage,
    name,
    trained,
)
from tests.unit.trainer.html_page import Page


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of an export with everything."""
    return render_report(facts())


EVERY_MISSING: dict[str, dict[str, Any]] = {
    "everything": {},
    "no evaluation": {
        "trained": trained(
            metrics={"trainLoss": 1.2, "finalLoss": 1.0, "trainSteps": 30.0},
            history=[{"step": n, "loss": 3 / n} for n in range(1, 31)],
            notices=[],
        )
    },
    "verify off": {
        "config": config(export={"verify": "off"}),
        "gate": GateReport(
            files=(FileVerdict(file=name(Quantization.F16), quantization=Quantization.F16),)
        ),
    },
    "no samples": {"gate": gate(samples=())},
    "no GGUF": {"config": config(export={"gguf": []}), "gate": GateReport(), "files": ()},
    "one step": {"trained": trained(history=[{"step": 1.0, "epoch": 1.0, "loss": 2.5}])},
    "only step 0": {"trained": trained(history=[{"step": 0.0, "eval_loss": 2.5}])},
    "no finite loss": {
        "trained": trained(
            metrics={}, history=[{"step": 1}, {"step": 2, "loss": None}, {"step": 3}]
        )
    },
    "an old dataset report": {"dataset": {"rows": 12}},
    "an empty histogram": {"dataset": dataset_report(histogram=[], tokens=None, answerTokens=None)},
    "training rows": {"gate": gate(held_out=False)},
    "nothing at all": {
        "trained": {"metrics": {}, "hyperparameters": {}},
        "dataset": {},
        "gate": GateReport(),
        "files": (),
        "lineage": lineage(versions={}, columns={}),
    },
}


@pytest.mark.parametrize("missing", EVERY_MISSING)
def test_the_page_is_well_formed_whatever_is_missing(missing: str) -> None:
    page = Page(render_report(facts(**EVERY_MISSING[missing])))
    assert page.faults == []
    identifiers = page.values("id")
    assert len(identifiers) == len(set(identifiers))
    targets = [value[1:] for value in page.values("href") if value.startswith("#")]
    targets += " ".join(page.values("aria-labelledby")).split()
    assert set(targets) <= set(identifiers)
    for word in ("nan", "None", "inf", "Undefined"):
        assert not re.search(rf"\b{word}\b", page.text), word


def test_the_page_asks_for_nothing_and_runs_nothing(whole: str) -> None:
    text, page = whole, Page(whole)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert page.values("src") == []
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert "default-src 'none'" in " ".join(page.values("content"))
    links = [value for value in page.values("href") if not value.startswith("#")]
    assert links == ["https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct"]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_language_title_and_headings_are_there(whole: str) -> None:
    page = Page(whole)
    assert ("html", "lang", "en") in page.attributes
    assert page.tags["h1"] == page.tags["main"] == 1
    assert page.tags["title"] == 1 + page.tags["svg"]
    assert page.tags["h2"] == page.tags["section"] == 9
    images = [tag for tag, key, value in page.attributes if (key, value) == ("role", "img")]
    assert images == ["svg"] * 3
    assert page.tags["desc"] == 3
    assert (
        "Loss by step Training from 3.179 to 1.534; on held-out rows the lowest is 1.812 at step 40"
        in page.text
    )


def test_the_result_stands_first(whole: str) -> None:
    text = Page(whole).text
    first = text[text.index("Usable, with warnings") :][:900]
    for part in (
        "perplexity on held-out answers fell from 24.56 to 6.33",
        "1 of 4 GGUF files not good enough: Q3_K_M; what was refused lies in rejected/",
        "The training noticed: Overfitting.",
        "24.56 → to 6.33",
        "3.201 → to 1.845",
        "Train fewer epochs, or set training.earlyStopping.",
    ):
        assert part in first, part


def test_each_file_has_its_figures() -> None:
    rows = tables.quality_rows(facts())
    assert [(r.kind, r.size, r.divergence, r.limit, r.same_top_token, r.verdict) for r in rows] == [
        ("F16", "2.5 GB", "0.00002", "0.001", "99.8%", "passed"),
        ("Q8_0", "1.3 GB", "0.0014", "0.005", "97.8%", "passed"),
        ("Q4_K_M", "808 MB", "0.0347", "0.08", "92.0%", "passed"),
        ("Q3_K_M", "691 MB", "0.2113", "0.15", "83.6%", "refused"),
    ]
    assert rows[3].file == f"rejected/{name(Quantization.Q3_K_M)}"
    assert rows[3].problems
    assert rows[3].used == 1.0
    bars = [(bar.name, bar.value) for bar in tables.perplexity_bars(facts())]
    assert bars[:3] == [("Base model", "24.31"), ("Tuned", "6.12"), ("F16", "6.12")]
    assert len(bars) == 6


def test_only_what_may_be_used_is_called_usable() -> None:
    """A file that was refused, one that was only measured, and the adapter's own."""
    measured = gate()
    own = FileVerdict(file=name(Quantization.BF16), quantization=Quantization.BF16)
    adapter = "Llama-3.2-1B-Instruct-LoRA-F32.gguf"
    alone = FileVerdict(file=adapter, quantization=Quantization.F32)
    given = facts(gate=gate(files=(own, *measured.files, alone)))
    page = Page(render_report(given)).text
    assert "GGUF files that may be used 4 of 5 F16, Q8_0, Q4_K_M, LoRA F32² Trained" in page
    assert "1 of 5 GGUF files not good enough" in page
    assert "BF16¹" in page
    assert "¹ Measured, but not asked for" in page
    assert "² The adapter alone: taken away from the 16-bit file" in page
    for text in (page, render_card(given)):
        assert "compared with the merged model in 16 bits" not in text
        assert "16-bit files with base model and adapter" in text


def test_dataset_settings_files_and_lineage_are_told() -> None:
    given = facts()
    text = Page(render_report(given)).text
    for file in given.files:
        assert file.path in text
        assert file.sha256 in text
    for part in (
        given.lineage.dataset_etag,
        str(given.lineage.model_commit),
        given.lineage.fingerprints.export,
        f"copied from {given.config.output.uri}/versions/{given.version}",
        "torch 2.13.0+cpu",
        "instruction: question, response: reply",
        "Rows that can't be used 3",
        "learningRate 0.0003 not the default",
        "lora.targetModules q_proj, k_proj, v_proj, o_proj",
    ):
        assert part in text, part
    assert "minio.internal" not in text


ATTACKS = [
    "<script>alert(1)</script>",
    "</div></section><h1>gone</h1>",
    "' onload='x' \" onclick=\"x",
    "&lt;b&gt; &amp; &#60;",
    "{{ 7 * 7 }} {% if %}",
    "<!-- -- > ]]>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_what_a_model_or_a_dataset_says_stays_text(text: str) -> None:
    sample = Sample(prompt=text, expected=text, base=text, tuned=text, stopped=True)
    bad = FileVerdict(file="x.gguf", quantization=Quantization.F16, problems=(text,))
    notice = {"code": "Overfitting", "step": 1, "evidence": text, "remedy": text}
    given = facts(
        gate=gate(samples=(sample,), files=(bad,)),
        trained=trained(notices=[notice]),
        lineage=lineage(columns={"instruction": text}, dataset=text),
    )
    page = Page(render_report(given))
    assert page.faults == []
    assert page.tags["script"] == 0
    assert page.tags["h1"] == 1
    assert page.text.count(" ".join(text.split())) == 9
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]


def test_control_characters_are_shown_as_such_and_surrogates_are_written(tmp_path: Path) -> None:
    assert visible("a\x00b\x1b[31m\tc\r\nd") == "a\ufffdb\ufffd[31m\tc\nd"
    columns = {"instruction": "\ud800"}
    given = facts(lineage=lineage(columns=columns))
    write_report(tmp_path / "report.html", given)
    assert "instruction: ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_answer_that_did_not_stop_is_marked(whole: str) -> None:
    assert Page(whole).text.count("did not stop") == 1


@pytest.mark.parametrize(
    ("changes", "tone", "first"),
    [
        ({}, Tone.WARNING, "Better than its base model"),
        ({"gate": GateReport()}, Tone.WARNING, "Better than its base model"),
        (
            {"trained": trained(notices=[]), "gate": gate(files=gate().files[:3])},
            Tone.GOOD,
            "Better than its base model",
        ),
        (
            {"trained": trained(metrics={"baseEvalLoss": 1.0, "evalLoss": 1.2})},
            Tone.BAD,
            "Worse than its base model: perplexity on held-out answers 2.72 before",
        ),
        ({"gate": gate(files=gate().files[3:])}, Tone.BAD, "Better than its base model"),
        (
            {"trained": trained(metrics={}, notices=[]), "gate": GateReport()},
            Tone.PLAIN,
            "What was learnt is not measured",
        ),
    ],
)
def test_the_verdict(changes: dict[str, Any], tone: Tone, first: str) -> None:
    given = facts(**changes)
    assert overall(given).tone is tone
    assert statements(given)[0].text.startswith(first)


REWARDS = {"rewardAccuracy": 0.9, "rewardMargin": 0.4, "baseRewardAccuracy": 0.0}


@pytest.mark.parametrize(
    ("objective", "metrics", "tone", "first"),
    [
        ("dpo", REWARDS, Tone.GOOD, "Prefers the better answer in 90% of the held-out pairs; the"),
        (
            "orpo",
            {**REWARDS, "baseRewardAccuracy": 0.6},
            Tone.GOOD,
            "Prefers the better answer in 90% of the held-out pairs, the base model in 60%",
        ),
        ("orpo", {**REWARDS, "baseRewardAccuracy": 0.95}, Tone.BAD, "Prefers the better answer"),
        ("dpo", {**REWARDS, "rewardAccuracy": 0.5}, Tone.BAD, "Prefers the better answer in 50%"),
        ("dpo", {}, Tone.PLAIN, "What was learnt is not measured"),
    ],
)
def test_the_verdict_on_preferences(
    objective: str, metrics: dict[str, float], tone: Tone, first: str
) -> None:
    """Perplexity says nothing about them, whoever measured it."""
    history = [
        {"step": 0, "eval_loss": 0.69, "reward_accuracy": 0.0, "reward_margin": 0.0},
        {"step": 9, "eval_loss": 0.4, "reward_accuracy": 0.9, "reward_margin": 0.4},
    ]
    given = facts(
        config=config(training={"objective": objective}),
        trained=trained(metrics=metrics, history=history, notices=[]),
    )
    verdict = statements(given)[0]
    assert (verdict.tone, verdict.text[: len(first)]) == (tone, first)
    page, card = render_report(given), render_card(given)
    for text in (page, card):
        assert ("Perplexity of held-out answers" in text) is False
        assert ("Reward margin" in text) is bool(metrics)
    assert f"- {objective}\n" in card
    if metrics:
        assert "90.0%" in page


def test_labelled_answers_are_called_so() -> None:
    detected = {"format": "csv", "layout": "prompt-completion", "columns": {"label": "label"}}
    given = facts(
        config=config(training={"objective": "kto"}),
        trained=trained(metrics=REWARDS),
        dataset=dataset_report(detected=detected),
    )
    assert statements(given)[0].text.startswith("Judges 90% of the held-out answers")


def test_the_gate_stands_in_where_the_training_measured_nothing() -> None:
    change = facts(trained=trained(metrics={})).change
    assert change
    assert (change.by, round(change.base_perplexity, 2)) == ("gate", 24.31)
    assert facts(trained=trained(metrics={}), gate=gate(held_out=False)).change is None


def test_the_same_facts_are_the_same_bytes(whole: str) -> None:
    assert render_report(facts()) == whole


def test_charts_are_drawn_in_the_pages_colours_and_named(whole: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", whole, re.DOTALL)
    charts = [ElementTree.fromstring(text) for text in drawn]  # noqa: S314 - our own
    assert [each.get("viewBox") for each in charts] == [
        f"0 0 {size.width} {size.height}" for size in (WIDE, NARROW, LENGTHS)
    ]
    for chart in charts:
        title, description = chart[0], chart[1]
        assert title.text and description.text  # noqa: PT018 - both
        assert chart.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        parts = [*chart.iter()][1:]
        colours = {each.get(kind) for each in parts for kind in ("fill", "stroke")} - {None, "none"}
        assert all(re.fullmatch(r"var\(--\w+\)", str(colour)) for colour in colours)
        assert not [each for each in parts if each.get("style") or each.tag.endswith("style")]
        assert any(each.tag.endswith("text") for each in parts)


def test_what_is_drawn_stands_where_the_axes_say() -> None:
    given = facts()
    chart = loss_chart(given, WIDE, "mine")
    assert chart
    assert chart.lines[0].points.startswith(
        f"{chart.x(given.losses[0].step)},{chart.y(given.losses[0].loss)} "
    )
    for place, text in chart.rows:
        assert chart.y(float(text)) == place
    for place, text in chart.columns:
        assert chart.x(float(text)) == place
    assert chart.y(1.5) > chart.y(3.0), "more is higher"
    assert given.best
    assert chart.mark == chart.x(given.best.step)
    bars = length_chart(given, LENGTHS, "mine")
    assert bars
    rows = [count for _, count in given.dataset.histogram]
    heights = [height for _, _, _, height in bars.bars]
    assert heights.index(max(heights)) == rows.index(max(rows))
    assert [h / max(heights) for h in heights] == pytest.approx(
        [n / max(rows) for n in rows], abs=0.01
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 102, [0, 20, 40, 60, 80, 100]),
        (1.46, 3.25, [1.5, 2.0, 2.5, 3.0]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0.0612, 0.0688, [0.062, 0.064, 0.066, 0.068]),
        (0, 3_600_000, [0, 1_000_000, 2_000_000, 3_000_000]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 6 if high == 102 else 5) == expected


def test_numbers_beside_an_axis_are_short() -> None:
    assert [short(n, 0) for n in (0, 9_000, 20_000, 1_500_000, 2e9)] == [
        *("0", "9000", "20k", "1.5M", "2G")
    ]
    assert short(1.5, 2) == "1.50"


def test_a_long_training_is_drawn_with_few_points() -> None:
    points = thin([LossPoint(n, float(n)) for n in range(1, 50_001)])
    assert len(points) <= MOST_POINTS
    assert sum(loss for _, loss in points) / len(points) == pytest.approx(25_000, rel=0.01)
    long = [{"step": n, "loss": 2.0, "eval_loss": 2.0 + 1 / (n + 1)} for n in range(20_000)]
    given = facts(trained=trained(history=long))
    assert len(tables.listed_evaluations(given)) <= tables.MOST_EVALUATIONS + 2
    assert given.best in tables.listed_evaluations(given)
    assert len(render_report(given)) < 150_000


def test_maximum_length_is_marked_also_where_it_is_far_away(whole: str) -> None:
    assert "maxSequenceLength 512</text>" in whole
    far = render_report(facts(dataset=dataset_report(maxSequenceLength=131_072)))
    assert "maxSequenceLength 131,072 →</text>" in far


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (tables.perplexity(6.1234), "6.12"),
        (tables.perplexity(1234.5), "1,234"),
        (tables.perplexity(float("inf")), "over a million"),
        (tables.perplexity(None), "–"),  # noqa: RUF001 - the dash
        (tables.divergence(0.0000021), "under 0.00001"),
        (tables.divergence(0.00031), "0.00031"),
        (tables.divergence(0.0313), "0.0313"),
        (tables.loss(float("nan")), "not finite"),
        (tables.setting([]), "none"),
        (tables.setting(0.0002), "0.0002"),
        (tables.setting(True), "true"),
    ],
)
def test_figures_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected


def test_rows_that_were_read_over_are_counted() -> None:
    report = dataset_report(blankRows=3, shortRows=0, longRows=2)
    rows = {row.name: row.value for row in tables.dataset_rows(facts(dataset=report))}
    assert rows["Blank rows, which count as none"] == "3"
    assert rows["Rows with empty cells at their end"] == "2"
    assert "Rows short of cells that aren't needed" not in rows


def test_an_adapter_that_it_went_on_from_is_told() -> None:
    made = lineage(init_from="s3://models/faq/versions/0123456789ab", init_revision="sha256:ab")
    given = facts(lineage=made)
    text = Page(render_report(given)).text
    assert "Went on from the adapter s3://models/faq/versions/0123456789ab" in text
    assert "sha256:ab" in text


def test_a_prompt_without_time_is_called_so() -> None:
    """And not one that the model didn't end."""
    asked, *others = gate().samples
    silent = tuple(each.model_copy(update={"tuned": None, "stopped": False}) for each in others)
    given = facts(gate=gate(samples=(asked, *silent)))
    words = f"{len(silent)} of {len(silent) + 1} prompts were not asked, since no time was left."
    page = Page(render_report(given))
    assert words in page.text
    assert page.text.count("(not asked)") == len(silent)
    assert "did not stop" not in page.text
    assert words in render_card(given)
    assert "not asked" not in render_card(facts())
