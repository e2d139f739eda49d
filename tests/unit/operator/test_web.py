"""The web page: what it shows, to whom, and that what others wrote stays text."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote, urljoin

import httpx
import pytest

from finetune_operator.api.observed import FineTuneJobStatus, VersionState, VersionStatus
from finetune_operator.handlers import WatchesError
from finetune_operator.settings import Settings
from finetune_operator.web import LossCurves, WebPage
from finetune_operator.web.pages import PAGE_ROWS, chart_of, lasting, link_to, size
from finetune_trainer.contract import Notice, Reason
from tests.unit.operator.build import (
    ALL_DONE,
    NOW,
    SPEC,
    at,
    finished_status,
    stamp,
)
from tests.unit.operator.endings import train_fails, training

ATTACKS = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    '" onmouseover="document.title=\'owned\'" x="',
    "</span></section></main><h1>gone</h1><style>*{display:none}</style>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:alert(1)",
]
PROGRESS = {
    "stage": "train",
    "job": "support-train-1",
    "step": 40,
    "totalSteps": 120,
    "percent": "33%",
    "loss": 1.284,
    "evalLoss": 1.5,
    "eta": "4m10s",
    "message": "step 40",
}
VOID = {"meta", "link", "input", "br", "rect", "path", "circle", "polyline"}


def raw(
    name: str = "support",
    namespace: str = "ml",
    status: FineTuneJobStatus | None = None,
    progress: dict[str, Any] | None = None,
    created: float = -600,
    **spec: Any,
) -> dict[str, Any]:
    told = status.model_dump(mode="json", exclude_none=True) if status else {}
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{namespace}-{name}",
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": stamp(created),
        },
        "spec": {**SPEC, **spec},
        "status": {**told, **({"progress": progress} if progress else {})},
    }


class Elements(HTMLParser):
    """What an answer consists of; each element has to be closed where it belongs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


@asynccontextmanager
async def page(*shown: dict[str, Any], **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebPage(
        Settings(trainer_image="trainer:1", web_port=port, **settings), lambda: shown, lambda: NOW
    )
    for each in shown:
        web.note(each)
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)
    async with web.serve(), client:
        yield client


async def text_of(client: httpx.AsyncClient, path: str, code: int = 200) -> str:
    answer = await client.get(path)
    assert answer.status_code == code, answer.text
    Elements(answer.text)
    return answer.text


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


async def test_the_list_shows_where_each_one_is() -> None:
    jobs = (
        raw("old", status=finished_status(*ALL_DONE), created=-90000),
        raw("support", status=training(), progress=PROGRESS),
    )
    async with page(*jobs) as client:
        shown = words(await text_of(client, "/"))
    assert "1 to 2 of 2, the newest first" in shown
    first, second = shown.split(" support ")[1].split(" old ")
    assert "in ml Training 33 % of train 1.284 4m10s 10m 0s" in first
    assert "in ml Succeeded 0123456789ab 1d 1h" in second


async def test_a_page_of_one_shows_all_that_is_known() -> None:
    versions = (
        VersionStatus(version="0123456789ab", state=VersionState.CURRENT, eval_loss=0.81234),
        VersionStatus(version="fedcba987654", state=VersionState.DELETED),
    )
    notice = Notice(code="LossRising", step=7, evidence="0.5 to 0.9", remedy="Lower it.")
    status = finished_status(*ALL_DONE, versions=versions, notices=(notice,))
    async with page(raw(status=status)) as client:
        html = await text_of(client, "/jobs/ml/support")
    shown = words(html)
    for text in (
        "support in ml",
        "Base model org/base",
        "Dataset s3://data/faq.csv",
        "gguf/model-F16.gguf 10 B not measured",
        "Its place: s3://models/support/versions/0123456789ab/report.html",
        "kubectl finetune report support -n ml",
        "0123456789ab Current",
        "0.8123",
        "fedcba987654 Deleted",
        "trainLoss 0.5",
        "LossRising step 7: 0.5 to 0.9. Lower it.",
        "Ready True Succeeded The artifacts are in",
    ):
        assert text in shown, text
    assert "Open the report" not in shown


async def test_a_failed_one_says_why() -> None:
    status = train_fails(Reason.OUT_OF_DISK, "The disk is full.").status
    async with page(raw(status=status)) as client:
        shown = words(await text_of(client, "/jobs/ml/support"))
    assert "Failed OutOfDisk The disk is full." in shown
    assert "train Failed 1m 0s 1, 1 failed OutOfDisk The disk is full." in shown


async def test_a_stage_at_work_is_timed_until_now() -> None:
    async with page(raw(status=training(), progress=PROGRESS)) as client:
        html = await text_of(client, "/jobs/ml/support")
    shown = words(html)
    assert "train Running 1m 0s 1" in shown
    assert "Step 40 of 120" in shown
    assert "Loss on held-out rows 1.5" in shown
    assert "Time left 4m10s" in shown
    assert ("progress", {"max": "100", "value": "33", "aria-label": "train of support"}) in (
        Elements(html).tags
    )


async def test_the_report_opens_where_a_browser_reaches_the_store() -> None:
    url = "https://minio.example/{bucket}/{key}"
    status = finished_status(*ALL_DONE)
    async with page(raw(status=status), web_report_url=url) as client:
        tags = Elements(await text_of(client, "/jobs/ml/support")).tags
    (link,) = (known for tag, known in tags if tag == "a" and known.get("class") == "button")
    assert link["href"] == (
        "https://minio.example/models/support/versions/0123456789ab/report.html"
    )


def test_a_key_cant_change_where_a_link_leads() -> None:
    template = "https://{bucket}.example/{key}?download"
    assert link_to("s3://models/a b/../?x#y", template) == (
        "https://models.example/a%20b/../%3Fx%23y?download"
    )
    assert link_to("s3://evil.example%2F/x", template).startswith("https://evil.example%252F.exam")
    assert link_to("/data/report.html", template) == ""
    assert link_to("javascript://x/alert(1)", template) == ""
    assert link_to("s3://models/x", "") == ""


@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_others_wrote_stays_text(attack: str) -> None:
    status = train_fails(Reason.OUT_OF_DISK, attack).status
    name = re.sub(r"[/{}]", "", attack)  # which don't get into a path
    notice = Notice(code="Resumed", evidence=attack, remedy=attack)
    changed = status.model_copy(
        update={
            "reason": attack,
            "version": attack,
            "notices": (notice,),
            "metrics": {attack: 1.0},
            "manifest_uri": f"{attack}/manifest.json",
            "artifacts": finished_status(*ALL_DONE).artifacts,
        }
    )
    hostile = raw(
        name,
        status=changed,
        progress={**PROGRESS, "message": attack, "eta": attack},
        dataset={"source": attack},
    )
    plain = raw("n", status=changed.model_copy(update={"reason": "x", "version": "x"}))
    async with page(hostile, plain, web_report_url="https://minio/{key}") as client:
        for path in ("/", f"/jobs/ml/{quote(name)}"):
            answer = await client.get(path)
            assert answer.status_code == 200, path
            tags = Elements(answer.text).tags
            names = {tag for tag, _ in tags}
            assert not names & {"script", "img", "style", "iframe"}, path
            assert not any(name.startswith("on") for _, known in tags for name in known), path
            assert sum(tag == "h1" for tag, _ in tags) == 1
            links = [known["href"] or "" for _, known in tags if "href" in known]
            assert not any(link.lower().startswith("javascript:") for link in links)


async def test_what_cant_be_seen_is_spelled_out_and_no_text_is_endless() -> None:
    text = "a\x00\x1b[31mb\u202ec\ud800" + "x" * 10_000
    status = train_fails(Reason.OUT_OF_DISK, "m").status
    job = raw(status=status)
    for each in job["status"]["conditions"]:
        each["message"] = text
    async with page(job) as client:
        shown = await text_of(client, "/jobs/ml/support")
    assert "a&lt;U+0000&gt;&lt;U+001B&gt;[31mb&lt;U+202E&gt;c&lt;U+D800&gt;xxx" in shown
    assert len(shown) < 40_000


async def test_a_credential_in_a_url_is_blacked_out() -> None:
    job = raw(dataset={"source": "https://me:hunter22@example.com/rows.csv"})
    async with page(job) as client:
        shown = await text_of(client, "/jobs/ml/support")
    assert "hunter22" not in shown
    assert "https://***@example.com/rows.csv" in shown


async def test_neither_secrets_nor_rows_are_shown() -> None:
    job = raw(
        status=training(),
        storage={"secretRef": {"name": "object-store-login"}},
        stages={"train": {"env": [{"name": "WANDB_API_KEY", "value": "in-the-open"}]}},
    )
    row = {"row": 3, "reason": "EmptyCell", "excerpt": "a customer's words"}
    job["status"]["dataset"] = {"rows": 9, "firstInvalid": [row]}
    async with page(job) as client:
        shown = await text_of(client, "/jobs/ml/support")
    for hidden in ("object-store-login", "in-the-open", "customer"):
        assert hidden not in shown


@pytest.mark.parametrize("path", ["/", "/jobs/ml/support", "/style.css", "/icon.svg", "/nothing"])
async def test_every_answer_has_strict_headers(path: str) -> None:
    async with page(raw()) as client:
        answer = await client.get(path)
    policy = dict(
        each.split(" ", 1) for each in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy == {
        "default-src": "'none'",
        "style-src": "'self'",
        "img-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Server"] == "finetune-operator"
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_it_is_for_reading_only(method: str) -> None:
    async with page(raw()) as client:
        answer = await client.request(method, "/jobs/ml/support", content=b"x" * 1000)
        head = await client.head("/jobs/ml/support")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET,HEAD")
    assert (head.status_code, head.text) == (200, "")


async def test_only_the_machine_itself_is_served_where_nothing_else_is_said() -> None:
    """A page elsewhere could otherwise read it, by a name that leads to the reader's machine."""
    async with page(raw()) as client:
        for host in ("localhost:8081", "127.0.0.1", "LOCALHOST"):
            assert (await client.get("/", headers={"Host": host})).status_code == 200
        answer = await client.get("/", headers={"Host": "evil.example:8081"})
    assert answer.status_code == 421
    assert "support" not in answer.text
    async with page(raw(), web_address="*") as client:
        answer = await client.get("/", headers={"Host": "finetune.example"})
    assert answer.status_code == 200


async def test_other_namespaces_can_be_left_out() -> None:
    jobs = (raw("mine"), raw("theirs", namespace="other"))
    async with page(*jobs, web_namespaces=("ml",)) as client:
        shown = await text_of(client, "/")
        hidden = await text_of(client, "/jobs/other/theirs", 404)
    assert "mine" in shown
    assert "other" not in shown
    assert "There is no such FineTuneJob, or not any more." in hidden


async def test_thousands_are_shown_in_parts_and_can_be_narrowed() -> None:
    jobs = [raw(f"job-{n:04}", namespace=f"team-{n % 3}", created=-n) for n in range(3000)]
    jobs[7] = raw("job-0007", namespace="team-1", created=-7, status=training())
    async with page(*jobs) as client:
        first = await text_of(client, "/")
        last = await text_of(client, "/?page=60")
        beyond = await text_of(client, "/?page=999999")
        team = words(await text_of(client, "/?namespace=team-2&name=Job-00"))
        phase = words(await text_of(client, "/?phase=Training&page=nonsense&refresh=x"))
        nothing = await text_of(client, "/?name=%3Cscript%3E")
    assert "1 to 50 of 3000" in words(first)
    assert first.count("<tr") == PAGE_ROWS + 1
    assert "2951 to 3000 of 3000" in words(last)
    assert "job-2999" in last
    assert "2951 to 3000 of 3000" in words(beyond)
    assert 'rel="next" href="./?page=2"' in first
    assert 'rel="prev" href="./?page=59"' in last
    assert "of 33," in team
    assert "1 to 1 of 1" in phase
    assert "job-0007" in phase
    assert "There is no such FineTuneJob." in nothing
    assert "Training (1)" in words(first)


async def test_it_is_loaded_again_only_when_that_is_asked_for() -> None:
    async with page(raw()) as client:
        still = await text_of(client, "/?name=s")
        moving = await text_of(client, "/?name=s&refresh=1")
    assert "http-equiv" not in still
    assert 'href="?name=s&amp;refresh=15"' in still
    assert '<meta http-equiv="refresh" content="5">' in moving
    assert '<a href="?name=s">Stop</a>' in moving


async def test_it_says_when_the_watches_cant_tell() -> None:
    def begin_anew() -> list[dict[str, Any]]:
        raise WatchesError("the watches begin anew")

    async with page() as client:
        assert "There is no such FineTuneJob." in await text_of(client, "/")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    web = WebPage(Settings(trainer_image="trainer:1", web_port=port), begin_anew)
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)
    async with web.serve(), client:
        shown = await text_of(client, "/", 503)
    assert "Not yet: the watches begin anew." in shown


async def test_a_status_that_another_version_wrote_is_shown_as_far_as_it_is_understood() -> None:
    job = raw(status=training(), progress={"step": "many", "loss": 0.5, "shape": 1})
    job["status"] |= {"phase": "Pondering", "stages": [{"name": "distill"}, {"name": "train"}]}
    job["spec"] = {"model": {"source": "org/base"}, "unheard": True}
    empty = {
        "metadata": job["metadata"] | {"name": "empty", "uid": "u"},
        "spec": None,
        "status": None,
    }
    async with page(job, empty) as client:
        shown = words(await text_of(client, "/"))
        one = words(await text_of(client, "/jobs/ml/support"))
        none = words(await text_of(client, "/jobs/ml/empty"))
    assert "Pondering" in shown
    assert "Pondering" in one
    assert "org/base" in one
    assert "Pending" in none


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/", 200),
        ("/?phase=Running", 200),
        ("/jobs/ml/support", 200),
        ("/jobs/ml/none", 404),
        ("/jobs/ml", 404),
        ("/a/b/c/d%2Fe", 404),
        ("/none", 404),
    ],
)
async def test_every_link_stays_below_a_proxys_path(path: str, code: int) -> None:
    """An ingress takes its own part of the path away, so nothing here knows of it."""
    outside = "http://host/team/tool"
    async with page(raw()) as client:
        tags = Elements(await text_of(client, path, code)).tags
        links = [
            link
            for _, attributes in tags
            for name in ("href", "src", "action")
            if (link := attributes.get(name))
        ]
        assert len(links) >= 3
        for link in links:
            leads = urljoin(outside + path, link)
            assert leads.startswith(f"{outside}/"), link
            if not link.startswith("#"):
                assert (await client.get(leads.removeprefix(outside))).status_code == 200, link


async def test_without_a_port_nothing_listens() -> None:
    web = WebPage(Settings(trainer_image="trainer:1"), list)
    web.note(raw(status=training(), progress=PROGRESS))
    async with web.serve():
        pass


# The losses


def told(step: int, loss: float, held_out: float | None = None, training_of: str = "a") -> Any:
    status = training(fingerprint=training_of)
    return raw(
        status=status,
        progress={"stage": "train", "step": step, "loss": loss}
        | ({} if held_out is None else {"evalLoss": held_out}),
    )


def test_losses_are_remembered_as_they_are_told() -> None:
    curves = LossCurves()
    for each in (told(1, 3.0), told(1, 3.0), told(2, 2.0, 2.5), told(3, 1.5, 2.5)):
        curves.note(each)
    points = curves.of("uid-ml-support")
    assert [each[:2] for each in points] == [(1, 3.0), (2, 2.0), (3, 1.5)]
    assert math.isnan(points[0][2])
    assert [each[2] for each in points[1:]] == [2.5, 2.5]
    assert curves.of("another") == []


def test_a_resumed_training_goes_on_and_another_one_begins_anew() -> None:
    curves = LossCurves()
    for each in (told(10, 3.0), told(20, 2.0), told(30, 1.0), told(20, 2.1)):
        curves.note(each)
    assert [each[:2] for each in curves.of("uid-ml-support")] == [(10, 3.0), (20, 2.1)]
    curves.note(told(25, 4.0, training_of="b"))
    assert [each[:2] for each in curves.of("uid-ml-support")] == [(25, 4.0)]


@pytest.mark.parametrize(
    "progress",
    [
        {},
        {"stage": "export", "step": 1, "loss": 1.0},
        {"stage": "train", "step": "1", "loss": 1.0},
        {"stage": "train", "step": 1, "loss": True},
        {"stage": "train", "step": 1, "loss": math.nan},
        {"stage": "train", "step": 1},
    ],
)
def test_what_is_no_loss_is_left_out(progress: dict[str, Any]) -> None:
    curves = LossCurves()
    curves.note(raw(progress=progress))
    assert curves.of("uid-ml-support") == []


def test_memory_stays_small() -> None:
    curves = LossCurves(curves=2, points=10)
    for step in range(1, 1001):
        curves.note(told(step, 1 / step))
    points = curves.of("uid-ml-support")
    assert 5 <= len(points) <= 10
    assert points[0][0] == 1
    assert points[-1][0] == 1000
    steps = [each[0] for each in points]
    assert steps == sorted(set(steps))
    for name in ("b", "c"):
        curves.note({**told(1, 1.0), "metadata": {"uid": name}})
    assert curves.of("uid-ml-support") == []
    assert len(curves.of("c")) == 1


async def test_the_curve_is_drawn() -> None:
    jobs = [told(10, 3.0), told(20, 2.0, 2.5), told(30, 1.0, 2.5)]
    async with page(*jobs) as client:
        html = await text_of(client, "/jobs/ml/support")
    tags = Elements(html).tags
    lines = [known for tag, known in tags if tag == "polyline"]
    assert [line["class"] for line in lines] == ["train", "eval"]
    assert lines[0]["points"] == "0.0,0.0 300.0,80.0 600.0,160.0"
    (drawing,) = (known for tag, known in tags if tag == "svg")
    said = "Loss from 3 at step 10 to 1 at step 30. On the held-out rows 2.5 at last."
    assert drawing["aria-label"] == said


def test_one_point_is_a_curve_as_well() -> None:
    assert chart_of([]) is None
    chart = chart_of([(5, 2.0, math.nan)])
    assert chart is not None
    assert [line.last for line in chart.lines] == [(0.0, 0.0)]


# Words


def test_spans_and_sizes_are_for_people() -> None:
    spans = [(at(s) - NOW) for s in (0, 59, 60, 3661, 90061, -5)]
    assert [lasting(each) for each in spans] == ["0s", "59s", "1m 0s", "1h 1m", "1d 1h", "0s"]
    assert [size(n) for n in (0, 999, 1000, 271_000_000, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "271.0 MB",
        "2.5 TB",
    ]
