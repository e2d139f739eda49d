"""`finetune` against an API server, a Hub or a program that breaks off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from finetune_cli.cluster import Cluster
from finetune_cli.commands import logs
from finetune_cli.commands.doctor import _store
from finetune_cli.estimate import _from_hub
from finetune_cli.exits import CliError, ExitCode
from finetune_cli.job import Job
from finetune_cli.main import Commands, app

Answer = tuple[int, dict[str, str], bytes]
ROOT = Path(__file__).parents[3]


class Server(ThreadingHTTPServer):
    """Gives the answers in their order, and keeps what was asked."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        code, headers, body = self.server.answers.pop(0)
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_PATCH(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    with Server(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def kubeconfig(folder: Path, port: int, current: str = "current-context: away,") -> Path:
    file = folder / "config"
    file.write_text(
        f"{{apiVersion: v1, kind: Config, {current}"
        f" clusters: [{{name: a, cluster: {{server: 'http://127.0.0.1:{port}'}}}}],"
        " users: [{name: a, user: {}}],"
        " contexts: [{name: away, context: {cluster: a, user: a, namespace: team}}]}"
    )
    return file


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


CUT: Answer = (200, {"Content-Length": "100"}, b"{")


@pytest.mark.parametrize("answer", [(503, {}, b""), (500, {}, b""), (429, {}, b"slowly"), CUT])
def test_a_server_that_may_answer_again_counts_as_away(answer: Answer, tmp_path: Path) -> None:
    with serving(answer, answer) as server:
        cluster = Cluster.connect(str(kubeconfig(tmp_path, server.port)))
        with pytest.raises(CliError) as caught:
            cluster.job("support")
    assert caught.value.code is ExitCode.UNREACHABLE


def test_a_log_that_breaks_off_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SECONDS", 0)
    cut: Answer = (200, {"Transfer-Encoding": "chunked"}, b"4\r\none\n\r\n")
    rest: Answer = (200, {"Content-Length": "4"}, b"two\n")
    with serving(cut, rest, cut) as server:
        cluster = Cluster.connect(str(kubeconfig(tmp_path, server.port)))
        assert b"".join(logs._pieces(cluster, "pod", True, 7)) == b"one\ntwo\n"
        with pytest.raises(CliError) as caught:
            list(logs._pieces(cluster, "pod", False, None))
        first, second, _ = (path for path, _ in server.asked)
    assert caught.value.code is ExitCode.UNREACHABLE
    assert "tailLines=7" in first
    assert "sinceSeconds" in second
    assert "tailLines" not in second


def test_a_context_without_a_current_one(tmp_path: Path) -> None:
    file = kubeconfig(tmp_path, 9, current="")
    cluster = Cluster.connect(str(file), "away")
    assert (cluster.context, cluster.namespace) == ("away", "team")
    with pytest.raises(CliError) as caught:
        Cluster.connect(str(file))
    assert caught.value.code is ExitCode.UNREACHABLE


def test_an_error_of_the_system_is_one_line(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["init", str(tmp_path / "none" / "job.yaml"), "--name", "a"])
    assert found.exit_code == ExitCode.FAILED
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1


def test_a_broken_pipe_is_left_to_the_shell() -> None:
    broken = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @broken.command()
    def write() -> None:
        raise BrokenPipeError

    @broken.command()
    def other() -> None:
        pass

    found = CliRunner().invoke(broken, ["write"], standalone_mode=False)
    assert isinstance(found.exception, BrokenPipeError)


def test_ctrl_c_lets_the_program_save(tmp_path: Path) -> None:
    """Both get SIGINT, as from a terminal; the program saves for longer than Python would wait."""
    saved = tmp_path / "saved"
    program = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(saved)!r}).touch()\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    code = (
        "import sys\n"
        "from finetune_cli.commands.run import _wait\n"
        "print(_wait([sys.executable, '-c', sys.argv[1]]))\n"
    )
    paths = os.pathsep.join(str(ROOT / each) for each in ("cli", "operator", "trainer"))
    with subprocess.Popen(
        [sys.executable, "-c", code, program],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == "(1, True)\n"
    assert saved.exists()


def as_answer(body: dict[str, Any]) -> Answer:
    return 200, {}, json.dumps(body).encode()


def a_job(**status: Any) -> dict[str, Any]:
    meta = {"name": "support", "namespace": "team", "uid": "1", "generation": 1}
    return {"metadata": meta, "spec": {}, "status": {"observedGeneration": 1, **status}}


@pytest.mark.parametrize(("degraded", "code"), [("True", 1), ("False", 0)])
def test_a_further_look_that_failed_fails_the_retry(
    degraded: str, code: int, tmp_path: Path
) -> None:
    said = {"type": "Degraded", "status": degraded, "message": "The last look failed."}
    job = as_answer(a_job(phase="Succeeded", conditions=[said]))
    none = as_answer({"items": []})
    with serving(job, job, job, none, none, job) as server:
        file = str(kubeconfig(tmp_path, server.port))
        command = ["retry", "support", "--watch", "--kubeconfig", file]
        found = CliRunner().invoke(app, command)
    assert found.exit_code == code, (found.output, found.exception)
    assert ("error: The last look failed." in found.stderr) == bool(code)


def test_tail_cuts_the_log_of_the_first_pod_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SECONDS", 0)

    def pods(*names: str) -> Answer:
        state: dict[str, Any] = {"containerStatuses": [{"state": {"running": {}}}]}
        meta = [{"name": each, "creationTimestamp": each} for each in names]
        return as_answer({"items": [{"metadata": each, "status": state} for each in meta]})

    line: Answer = (200, {"Content-Length": "2"}, b"x\n")
    on, over = as_answer(a_job(phase="Training")), as_answer(a_job(phase="Succeeded"))
    with serving(on, pods("a"), line, on, pods("a", "b"), line, over) as server:
        file = str(kubeconfig(tmp_path, server.port))
        command = ["logs", "support", "-f", "--tail", "5", "--kubeconfig", file]
        found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, (found.output, found.exception)
    tails = ["tailLines=5" in path for path, _ in server.asked if "/log?" in path]
    assert tails == [True, False]


def test_a_deleted_version_is_not_rolled_back_to(tmp_path: Path) -> None:
    versions = [
        {"version": "b" * 12, "state": "Current"},
        {"version": "a" * 12, "state": "Deleted"},
    ]
    with serving(as_answer(a_job(versions=versions))) as server:
        file = str(kubeconfig(tmp_path, server.port))
        found = CliRunner().invoke(app, ["rollback", "support", "a" * 12, "--kubeconfig", file])
    assert found.exit_code == ExitCode.NOT_FOUND
    assert f"it has {'b' * 12} (Current)." in found.stderr


def test_a_label_alone_is_a_change(tmp_path: Path) -> None:
    before, after = a_job(), a_job()
    after["metadata"]["labels"] = {"team": "support"}
    file = tmp_path / "job.yaml"
    file.write_text(
        "{apiVersion: finetune.dev/v1alpha1, kind: FineTuneJob, metadata: {name: support}, spec: "
        "{model: {source: a/b}, dataset: {source: s3://a/b.csv}, output: {uri: s3://a/b}}}"
    )
    with serving(*map(as_answer, (before, after, after, after))) as server:
        config = str(kubeconfig(tmp_path, server.port))
        told = [
            CliRunner().invoke(app, ["submit", "-f", str(file), "--kubeconfig", config]).stdout
            for _ in range(2)
        ]
    assert told == ["team/support changed\n", "team/support unchanged\n"]


def test_the_token_stays_with_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving((200, {}, b"{}")) as elsewhere:
        moved: Answer = (302, {"Location": f"http://localhost:{elsewhere.port}/file"}, b"")
        with serving(moved) as hub:
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}")
            assert _from_hub("org/base", "refs/pr/1") == b"{}"
    (path, headers), (_, others) = *hub.asked, *elsewhere.asked
    assert path == "/org/base/resolve/refs%2Fpr%2F1/config.json"
    assert headers["authorization"] == "Bearer secret"
    assert "authorization" not in others


def test_doctor_asks_the_store_at_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    job = Job({"metadata": {"name": "a"}, "spec": {"output": {"uri": "s3://models/a"}}})
    with serving((200, {"Content-Length": "2"}, b"{}")) as server:
        found = _store(job, f"http://127.0.0.1:{server.port}")
    assert found.verdict == "ok", found.told
