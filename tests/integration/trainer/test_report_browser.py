"""report.html as people see it: in a real browser, at the width of a phone and of a desk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

from finetune_trainer.contract import GateReport, Sample
from finetune_trainer.export.report import write_report
from tests import chromium, report_facts

PHONE, SMALL_PHONE, DESK = (390, 844), (360, 780), (1280, 800)
SECTIONS = ("result", "quality", "answers", "training", "use", "dataset", "settings", "files")

OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(each => {
  if (each.closest('.scroll, pre, nav, .hidden, .said')) return false;
  const box = each.getBoundingClientRect();
  return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5);
}).map(each => each.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A real Chromium; on Debian it is fetched into the cache folder where there is none."""
    with chromium.started(request.config) as browser:
        yield browser


@dataclass
class View:
    """An open page, and what it did."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


Opener = Callable[..., View]


@pytest.fixture
def read(browser: Browser, tmp_path: Path) -> Iterator[Opener]:
    """Open a report of some facts at a size, with every request noted and refused."""
    contexts = []

    def open_report(size: tuple[int, int] = DESK, scheme: Any = "light", **changes: Any) -> View:
        file = tmp_path / "report.html"
        write_report(file, report_facts.facts(**changes))
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        contexts.append(context)
        view = View(context.new_page())

        def refuse(route: Route) -> None:
            if route.request.url == file.as_uri():
                route.continue_()
            else:
                view.requests.append(route.request.url)
                route.abort()

        context.route("**/*", refuse)
        view.page.on("console", lambda message: view.messages.append(message.text))
        view.page.on("pageerror", lambda error: view.messages.append(str(error)))
        view.page.goto(file.as_uri())
        return view

    yield open_report
    for context in contexts:
        context.close()


EMPTY: dict[str, Any] = {
    "trained": report_facts.trained(metrics={}, history=[], notices=[]),
    "dataset": {},
    "gate": GateReport(),
    "files": (),
}
SHAPES: dict[str, dict[str, Any]] = {
    "everything": {},
    "nothing measured": EMPTY,
    "one step": {"trained": report_facts.trained(history=[{"step": 1, "loss": 2.5}])},
}


@pytest.mark.parametrize(
    ("size", "shape"),
    [*itertools.product([PHONE, SMALL_PHONE, DESK], ["everything"]), *((PHONE, s) for s in SHAPES)],
)
def test_the_page_fits_and_loads_nothing(read: Opener, size: tuple[int, int], shape: str) -> None:
    view = read(size, **SHAPES[shape])
    assert view.requests == []
    assert view.messages == []
    assert view.page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert view.page.evaluate(OUTSIDE) == []


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_every_section_is_seen(read: Opener, size: tuple[int, int]) -> None:
    page = read(size).page
    for name in SECTIONS:
        page.locator(f"nav a[href='#{name}']").click()
        box = page.locator(f"section#{name} h2").bounding_box()
        assert box, name
        # Below the bar that stays at the top, and not below the fold.
        assert 0 <= box["y"] < size[1], name


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_charts_are_drawn_at_a_size_that_can_be_read(
    read: Opener, size: tuple[int, int]
) -> None:
    page = read(size).page
    charts = page.locator(".chart svg:visible")
    assert charts.count() == 2
    for chart in charts.all():
        box = chart.bounding_box()
        assert box
        assert box["width"] > 280
        assert box["height"] > 180
        for text in chart.locator("text").all():
            label = text.bounding_box()
            assert label
            assert label["height"] > 9, text.text_content()
            assert box["x"] - 1 <= label["x"], text.text_content()
            assert label["x"] + label["width"] <= box["x"] + box["width"] + 1, text.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_text_stands_out(read: Opener, scheme: str, shape: str) -> None:
    found = read(DESK, scheme, **SHAPES[shape]).page.evaluate(chromium.CONTRAST)
    assert len(found) > 50
    assert [each for each in found if each["ratio"] < 4.5] == []


def test_dark_is_dark(read: Opener) -> None:
    def background(scheme: str) -> str:
        page = read(DESK, scheme).page
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def sum_of(colour: str) -> int:
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert sum_of(background("dark")) < 150
    assert sum_of(background("light")) > 600


ATTACKS = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    '" onmouseover="document.title=\'owned\'" x="',
    "</div></section></main><h1>gone</h1><style>*{display:none}</style>",
    "{{ 7 * 7 }} {% raw %}",
    "<!-- <![CDATA[ \x00\x1b[31m \u202eevil",
]


def test_what_a_model_says_stays_text(read: Opener) -> None:
    samples = tuple(
        Sample(prompt=text, expected=text, base=text, tuned=text, stopped=False) for text in ATTACKS
    )
    view = read(PHONE, gate=report_facts.gate(samples=samples))
    assert view.page.title() == "support-bot – fine-tuning report"  # noqa: RUF001
    assert view.messages == []
    assert view.requests == []
    assert view.page.locator("h1").count() == 1
    said = view.page.locator(".answer.tuned .said").all_text_contents()
    shown = [text.replace("\x00", "\ufffd").replace("\x1b", "\ufffd") for text in ATTACKS]
    assert said == shown
