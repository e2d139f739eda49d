"""What a page shows, worked out from a FineTuneJob as the watches hold it. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self
from urllib.parse import quote, urlencode

from finetune_operator.api import Condition, JsonObject
from finetune_operator.api.observed import ArtifactStatus, FineTuneJobStatus, Phase, StageStatus
from finetune_operator.observe import observe_finetunejob
from finetune_trainer.contract import Artifact, Progress, read_readable
from finetune_trainer.contract.verdict import Statement, word_for

PAGE_ROWS = 50
WIDTH, HEIGHT = 600, 160  # of the chart, in its own units
QUERY_LIMIT = 253  # characters of a name or namespace
REPORT = "report.html"
SETTLED = (Phase.SUCCEEDED, Phase.FAILED)

Point = tuple[float, float, float]
"""Step, loss, and loss on the held-out rows, which is NaN where there is none."""

TONES: dict[str, str] = {
    Phase.SUCCEEDED: "good",
    Phase.FAILED: "bad",
    Phase.WAITING: "warning",
    Phase.QUEUED: "warning",
}


@dataclass(frozen=True)
class Filters:
    """What of the list is asked for."""

    namespace: str = ""
    phase: str = ""
    name: str = ""
    """A part of the name."""

    page: int = 1

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Self:
        """As the address says; what makes no sense is left out."""
        number = query.get("page", "")
        sensible = number.isascii() and number.isdigit() and len(number) < 8
        names = ("namespace", "phase", "name")
        texts = {each: query.get(each, "").strip()[:QUERY_LIMIT] for each in names}
        return cls(**texts, page=max(int(number), 1) if sensible else 1)

    def address(self, page: int) -> str:
        """The query that leads to another page of the same list."""
        given = {"namespace": self.namespace, "phase": self.phase, "name": self.name}
        told = {key: value for key, value in given.items() if value}
        return f"?{urlencode({**told, 'page': page})}"

    def admits(self, raw: JsonObject) -> bool:
        """Whether a FineTuneJob is among what is asked for."""
        meta = raw["metadata"]
        return (
            self.namespace in ("", meta["namespace"])
            and self.phase in ("", _phase(raw))
            and self.name.lower() in meta["name"]
        )


@dataclass(frozen=True)
class Row:
    """One FineTuneJob of the list."""

    namespace: str
    name: str
    phase: str
    tone: str
    reason: str
    stage: str
    percent: int | None
    loss: str
    eta: str
    version: str
    age: str
    created: str


@dataclass(frozen=True)
class ListPage:
    """A part of the list, and what it can be narrowed to."""

    filters: Filters
    rows: Sequence[Row]
    total: int
    first: int
    """Number of the first row here, from 1; 0 where there is none."""

    namespaces: Sequence[str]
    phases: Sequence[tuple[str, int]]
    """Each phase that there is, with how many are in it."""

    previous: str | None
    next: str | None


def list_page(raws: Sequence[JsonObject], filters: Filters, now: datetime) -> ListPage:
    """The part of the list that is asked for."""
    found = [raw for raw in raws if filters.admits(raw)]
    pages = max(math.ceil(len(found) / PAGE_ROWS), 1)
    page = min(filters.page, pages)
    start = (page - 1) * PAGE_ROWS
    return ListPage(
        filters=filters,
        rows=[_row(raw, now) for raw in found[start : start + PAGE_ROWS]],
        total=len(found),
        first=min(start + 1, len(found)),
        namespaces=sorted({str(raw["metadata"]["namespace"]) for raw in raws}),
        phases=sorted(Counter(map(_phase, raws)).items()),
        previous=filters.address(page - 1) if page > 1 else None,
        next=filters.address(page + 1) if page < pages else None,
    )


def _row(raw: JsonObject, now: datetime) -> Row:
    meta, status = raw["metadata"], raw.get("status") or {}
    progress = _progress(raw)
    phase = _phase(raw)
    return Row(
        namespace=meta["namespace"],
        name=meta["name"],
        phase=phase,
        tone=TONES.get(phase, "plain"),
        reason=str(status.get("reason") or ""),
        stage=str(status.get("stage") or ""),
        percent=percent_of(progress) if phase not in SETTLED else None,
        loss=figure(progress.loss),
        eta=(progress.eta or "") if phase not in SETTLED else "",
        version=str(status.get("version") or ""),
        age=lasting(_since(meta.get("creationTimestamp"), now)),
        created=str(meta.get("creationTimestamp") or ""),
    )


def _phase(raw: JsonObject) -> str:
    return str((raw.get("status") or {}).get("phase") or Phase.PENDING)


def _progress(raw: JsonObject) -> Progress:
    read = read_readable(Progress, (raw.get("status") or {}).get("progress") or {})
    return read.value if read else Progress()


# --- The losses of a training ------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the chart: corners in its units, and its last one."""

    kind: str
    points: str
    last: tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """The losses as lines, and the figures at its edges."""

    lines: Sequence[Line]
    low: str
    high: str
    first_step: int
    last_step: int
    words: str


def chart_of(curve: Sequence[Point]) -> Chart | None:
    """The lines through the points; None where there is no point."""
    if not curve:
        return None
    training = [(step, loss) for step, loss, _ in curve]
    held_out = list(_changes(curve))
    values = [value for _, value in [*training, *held_out]]
    low, high = min(values), max(values)
    begin, end = curve[0][0], curve[-1][0]

    def line(kind: str, points: Sequence[tuple[float, float]]) -> Line:
        corners = [
            (
                round((step - begin) / (end - begin or 1) * WIDTH, 1),
                round((high - value) / (high - low or 1) * HEIGHT, 1),
            )
            for step, value in points
        ]
        return Line(kind, " ".join(f"{x},{y}" for x, y in corners), corners[-1])

    told = f"Loss from {figure(training[0][1])} at step {begin:.0f}"
    words = f"{told} to {figure(training[-1][1])} at step {end:.0f}."
    if held_out:
        words += f" On the held-out rows {figure(held_out[-1][1])} at last."
    lines = [line("train", training), *([line("eval", held_out)] if held_out else [])]
    return Chart(lines, figure(low), figure(high), int(begin), int(end), words)


def _changes(curve: Sequence[Point]) -> Iterator[tuple[float, float]]:
    """Where another loss on the held-out rows was told for the first time."""
    before = math.nan
    for step, _, value in curve:
        if not math.isnan(value) and value != before:
            yield step, value
            before = value


# --- One FineTuneJob ---------------------------------------------------------------------------


@dataclass(frozen=True)
class StageRow:
    """A stage, with how long it took."""

    status: StageStatus
    tone: str
    duration: str


@dataclass(frozen=True)
class ArtifactRow:
    """A file, with the gate's verdict."""

    artifact: ArtifactStatus
    path: str
    size: str
    verdict: Statement


@dataclass(frozen=True)
class Report:
    """Where the report of the version lies; the link is empty where a browser can't get there."""

    uri: str
    link: str


@dataclass(frozen=True)
class JobPage:
    """All that is shown of one FineTuneJob."""

    row: Row
    status: FineTuneJobStatus
    headline: Condition | None
    """The condition that says most."""

    sources: Sequence[tuple[str, str]]
    progress: Progress
    at_work: bool
    """Whether a stage has told of its progress, and nothing is settled yet."""

    chart: Chart | None
    stages: Sequence[StageRow]
    artifacts: Sequence[ArtifactRow]
    report: Report | None
    figures: Sequence[tuple[str, str]]


def job_page(
    raw: JsonObject,
    curve: Sequence[Point],
    report_url: str,
    now: datetime,
) -> JobPage:
    """What is known of a FineTuneJob; `report_url` is that of the settings."""
    status = observe_finetunejob(raw).status
    return JobPage(
        row=_row(raw, now),
        status=status,
        headline=_headline(status.conditions),
        sources=list(_sources(raw)),
        progress=_progress(raw),
        at_work=_progress(raw).stage is not None and _phase(raw) not in SETTLED,
        chart=chart_of(curve),
        stages=[
            StageRow(each, TONES.get(each.state, "plain"), _duration(each, now))
            for each in status.stages
        ],
        artifacts=[_artifact(each, status) for each in status.artifacts],
        report=_report(status, report_url),
        figures=[(name, figure(value)) for name, value in sorted(status.metrics.items())],
    )


def _headline(conditions: Sequence[Condition]) -> Condition | None:
    held = {each.type: each for each in conditions if each.status == "True"}
    ready = next((each for each in conditions if each.type == "Ready"), None)
    return held.get("Degraded") or held.get("Progressing") or ready


def _sources(raw: JsonObject) -> Iterator[tuple[str, str]]:
    """Where model, dataset and results are. No Secret is named, and no row quoted."""
    spec = raw.get("spec") or {}
    for title, part, key in (
        ("Base model", "model", "source"),
        ("Dataset", "dataset", "source"),
        ("Output", "output", "uri"),
    ):
        value = (spec.get(part) or {}).get(key)
        if value:
            yield title, str(value)


def _artifact(artifact: ArtifactStatus, status: FineTuneJobStatus) -> ArtifactRow:
    folder = (status.manifest_uri or "").rpartition("/")[0]
    inside = folder and artifact.uri.startswith(f"{folder}/")
    path = artifact.uri[len(folder) + 1 :] if inside else artifact.uri
    plain = Artifact(
        path=path, bytes=artifact.bytes, sha256=artifact.sha256, quality=artifact.quality
    )
    return ArtifactRow(artifact, path, size(artifact.bytes), word_for(plain))


def _report(status: FineTuneJobStatus, template: str) -> Report | None:
    folder, slash, _ = (status.manifest_uri or "").rpartition("/")
    if not slash:
        return None
    uri = f"{folder}/{REPORT}"
    return Report(uri, link_to(uri, template))


def link_to(uri: str, template: str) -> str:
    """The address of a bucket's file for browsers; empty where there is none."""
    scheme, _, path = uri.partition("://")
    bucket, _, key = path.partition("/")
    if scheme != "s3" or not template:
        return ""
    return template.replace("{bucket}", quote(bucket, safe="")).replace("{key}", quote(key))


# --- Words -------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    """A number with four significant digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent_of(progress: Progress) -> int | None:
    """Share done, 0 to 100."""
    number = (progress.percent or "").rstrip("%")
    if not (number.isascii() and number.isdigit() and len(number) < 4):
        return None
    return min(int(number), 100)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def lasting(span: timedelta | None) -> str:
    """A span of time in its two largest units, e.g. 4m 10s."""
    if span is None:
        return ""
    rest = max(int(span.total_seconds()), 0)
    parts: list[str] = []
    for unit, seconds in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, seconds)
        if count or parts:
            parts.append(f"{count}{unit}")
        if len(parts) == 2:
            break
    return " ".join(parts) or "0s"


def _duration(stage: StageStatus, now: datetime) -> str:
    began = _moment(stage.start_time)
    if began is None:
        return ""
    return lasting((_moment(stage.completion_time) or now) - began)


def _since(text: Any, now: datetime) -> timedelta | None:
    began = _moment(text)
    return None if began is None else now - began


def _moment(text: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo else None
