"""The web page of the real operator on the real API server, in a real browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from finetune_trainer.contract import Reason, Stage
from hack.cluster.control_plane import ControlPlane
from hack.operator_process import Operator
from hack.process import free_ports
from tests import chromium
from tests.integration.operator.stage import VERSION_FOLDER, Namespace, exported, prepared, trained

PHONE, DESK = (360, 780), (1280, 800)
ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(each => {
  if (each.closest('.hidden, .skip, thead')) return false;
  const box = each.getBoundingClientRect();
  return box.width && (box.left < -0.5 || box.right > innerWidth + 0.5);
}).map(each => each.outerHTML.slice(0, 120))"""
# What WCAG 2.2 asks for as far as the markup shows it: a language, a title, one first heading and
# none left out, a name for whatever is used or drawn, headers of tables, no id twice, no link or
# button too small for a thumb (24 px; those inside a sentence are free).
FAULTS = """() => {
  const found = [], all = what => [...document.querySelectorAll(what)];
  const tell = (bad, what) => { if (bad) found.push(what); };
  tell(!document.documentElement.lang, 'no language');
  tell(!document.title.trim(), 'no title');
  tell(all('h1').length !== 1, 'not one h1');
  tell(all('main').length !== 1, 'not one main');
  const levels = all('h1, h2, h3').map(each => Number(each.tagName[1]));
  tell(levels.some((level, n) => level > (levels[n - 1] ?? 0) + 1), 'a level is left out');
  for (const each of all('input:not([type=hidden]), select'))
    tell(!each.labels.length, 'no label: ' + each.outerHTML);
  for (const each of all('a, button'))
    tell(!each.textContent.trim(), 'no text: ' + each.outerHTML);
  for (const each of all('svg[role=img], progress'))
    tell(!each.getAttribute('aria-label'), 'no name: ' + each.outerHTML);
  for (const each of all('table')) {
    const named = each.caption || document.getElementById(each.getAttribute('aria-labelledby'));
    tell(!named, 'a table without a name');
    tell([...each.querySelectorAll('th')].some(th => !th.scope), 'th without scope');
  }
  for (const each of all('[aria-labelledby], [aria-describedby]'))
    for (const name of ['aria-labelledby', 'aria-describedby'])
      tell(each.hasAttribute(name) && !document.getElementById(each.getAttribute(name)),
           'dangling: ' + each.getAttribute(name));
  const ids = all('[id]').map(each => each.id);
  tell(new Set(ids).size !== ids.length, 'an id twice');
  for (const each of all('button, .button, select, input:not([type=hidden])'))
    tell(each.getBoundingClientRect().height < 24, 'too small: ' + each.outerHTML);
  return found;
}"""


@pytest.fixture(scope="module")
def address() -> str:
    """Where the page will be."""
    (port,) = free_ports("127.0.0.1", 1)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket that a browser can read, with the report of the version, at the path that stores
    give an object."""
    root = tmp_path_factory.mktemp("store")
    report = root / VERSION_FOLDER.removeprefix("s3://") / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text('<!doctype html><link rel="icon" href="data:,"><h1>The report</h1>')
    serve = partial(QuietFiles, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietFiles(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def operator(
    installed: ControlPlane, address: str, store: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    """An operator with the page switched on."""
    operator = Operator(
        installed,
        tmp_path_factory.mktemp("operator"),
        FINETUNE_WEB_PORT=address.rpartition(":")[2],
        FINETUNE_WEB_REPORT_URL=f"{store}/{{bucket}}/{{key}}",
    )
    operator.start()
    yield operator
    operator.stop()


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """A real Chromium; on Debian it is fetched into the cache folder where there is none."""
    with chromium.started(request.config) as browser:
        yield browser


class Reader:
    """A browser's window, and whatever went wrong in it."""

    def __init__(self, browser: Browser, size: tuple[int, int], scheme: Any = "light") -> None:
        self._context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        self.width = size[0]
        self.page: Page = self._context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("requestfailed", lambda request: self.said.append(request.url))

    def check(self) -> None:
        """The page fits, is sound and can be read, and nothing that others wrote has run."""
        assert self.said == []
        assert self.page.evaluate("document.documentElement.scrollWidth") == self.width
        assert self.page.evaluate(OUTSIDE) == []
        assert self.page.evaluate(FAULTS) == []
        contrasts = self.page.evaluate(chromium.CONTRAST)
        assert len(contrasts) > 20
        assert [each for each in contrasts if each["ratio"] < 4.5] == []
        assert "owned" not in self.page.title()
        assert self.page.locator("script, img, iframe").count() == 0

    def close(self) -> None:
        self._context.close()


def says(address: str, text: str) -> bool:
    """Whether the page has these words by now."""
    return text in httpx.get(address, trust_env=False).text


def test_a_training_is_followed_in_a_browser(
    here: Namespace, address: str, store: str, browser: Browser
) -> None:
    here.apply()
    here.succeed(prepared())
    pod = here.start_pod(Stage.TRAIN)
    here.wait_phase("Training")
    where = f"{address}/jobs/{here.name}/support"
    for step, loss in ((10, 2.5), (20, 1.75), (30, 1.25)):
        told = {"step": step, "totalSteps": 40, "percent": f"{step * 100 // 40}%", "loss": loss}
        here.report(pod, **told, evalLoss=1.5, eta="1m5s", message=f"{ATTACK}{'w' * 300}")
        here.wait(f"step {step}", partial(says, where, f"to {loss} at step {step}."))
    desk, phone = Reader(browser, DESK), Reader(browser, PHONE, "dark")
    for reader in (desk, phone):
        page = reader.page
        page.goto(f"{address}/?namespace={here.name}")
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name="support"))
        assert "Training" in row.inner_text()
        assert "75 % of train" in row.inner_text()
        reader.check()
        row.get_by_role("link", name="support").click()
        page.get_by_role("heading", level=1, name="support").wait_for()
        assert "Step\n30 of 40" in page.locator("main").inner_text()
        assert ATTACK in page.locator("main").inner_text()
        drawing = page.get_by_role("img", name="Loss from 2.5 at step 10 to 1.25 at step 30.")
        box = drawing.bounding_box()
        assert box
        assert box["width"] > 200
        reader.check()
    here.succeed(trained())
    here.succeed(exported())
    here.wait_phase("Succeeded")
    here.wait("the page", partial(says, where, "Open the report"))
    for reader in (desk, phone):
        page = reader.page
        page.reload()
        report = page.get_by_role("link", name="Open the report")
        assert "gguf/model-F16.gguf" in page.get_by_role("table", name="Artifacts").inner_text()
        reader.check()
        report.click()
        page.get_by_role("heading", level=1, name="The report").wait_for()
        assert page.url == f"{store}/models/support/versions/0123456789ab/report.html"
        assert "/" not in page.evaluate("document.referrer")
        reader.close()


def test_a_failure_with_a_script_in_its_words_is_read_and_not_run(
    here: Namespace, address: str, browser: Browser
) -> None:
    here.apply()
    here.fail(Stage.PREPARE, Reason.COLUMN_NOT_FOUND, f"No column {ATTACK}.")
    here.wait_phase("Failed")
    reader = Reader(browser, PHONE)
    page = reader.page
    here.wait("the page", partial(says, f"{address}/?name=support", "ColumnNotFound"))
    page.goto(f"{address}/jobs/{here.name}/support?refresh=3600")
    assert f"No column {ATTACK}." in page.locator("main").inner_text()
    reader.check()
    # All of it can be done by keyboard, and the list finds it by its phase.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_label("Namespace").select_option(here.name)
    page.get_by_label("Phase").select_option("Failed")
    page.get_by_label("Name contains").fill("supp")
    page.keyboard.press("Enter")
    page.get_by_text("1 to 1 of 1").wait_for()
    reader.check()
    reader.close()
