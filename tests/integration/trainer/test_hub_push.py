"""Pushing a published version to a Hub, with the Hub's own client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from finetune_trainer.contract import Export, Hub, Output, PrivateFile, Reason, Stage, StageError
from finetune_trainer.export.publish.hub_push import TOKEN_VARIABLE, check_token, push
from finetune_trainer.prepare.stored import without_push
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import LocalFolder
from finetune_trainer.store.marker import MANIFEST, PUSHED, find_complete
from finetune_trainer.store.versions import Version, current, find_pushed
from tests.integration.trainer.hub_push_server import TOKEN, PushHub, push_hub
from tests.publishing import fingerprint, publish

# The Hub's client sends files by LFS in a way that httpx wants spelled otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "org/tuned"
HUB = Hub(repo=REPO)
FILES = {
    "adapter/adapter_model.safetensors": b"weights" * 1000,
    "gguf/tuned-Q8_0.gguf": b"GGUF" * 1000,
    "README.md": b"---\nlicense: apache-2.0\n---\n# tuned\n",
    "rejected/tuned-Q3_K_M.gguf": b"bad",
    "report.html": b"the first row",
    "dataset-report.json": b"{}",
}
PUBLIC = list(FILES)[:3]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    with push_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        # Files go by LFS, which this Hub understands.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield running


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


@pytest.fixture
def run(output: LocalFolder, tmp_path: Path) -> Any:
    """Push as the stage does, in an empty workspace."""
    count = iter(range(10))

    def push_now(target: Hub = HUB) -> str:
        workspace = tmp_path / f"workspace-{next(count)}"
        return push(target, output, now(output), workspace, Reporter()).commit

    publish(output, tmp_path / "workspace", "fp", FILES)
    return push_now


def now(output: LocalFolder) -> Version:
    """The current version."""
    version = current(output)
    assert version is not None
    return version


def pushed(output: LocalFolder, hub: Hub = HUB) -> bool:
    """Whether the current version is on the Hub."""
    return find_pushed(output, hub, now(output)) is not None


def test_the_public_files_are_on_the_hub(
    hub: PushHub, run: Any, output: LocalFolder, tmp_path: Path
) -> None:
    assert not pushed(output)
    assert run() == f"{hub.endpoint}/{REPO}/commit/0123456789abcdef0123456789abcdef01234567"
    found = hub.files(REPO)
    expected = {path: output.read(now(output).path(path)) for path in PUBLIC}
    assert {path: found[path] for path in PUBLIC} == expected
    assert set(found) == {*PUBLIC, "SHA256SUMS", MANIFEST, ".gitattributes"}
    assert set(sums(found)) == set(PUBLIC)
    listed = json.loads(found[MANIFEST])["files"]
    assert {item["path"] for item in listed} == {*PUBLIC, "SHA256SUMS"}
    assert hub.private == {REPO: True}
    # Large files don't stay on the disk.
    left = {p.name for p in (tmp_path / "workspace-0" / "hub").rglob("*") if p.is_file()}
    assert left == {"README.md"}


def test_private_files_go_where_they_are_named_and_again_not(
    hub: PushHub, run: Any, output: LocalFolder
) -> None:
    run()
    both = Hub(repo=REPO, include=(PrivateFile.REPORT, PrivateFile.MANIFEST))
    assert not pushed(output, both)
    run(both)
    assert hub.files(REPO)["report.html"] == FILES["report.html"]
    assert hub.files(REPO)[MANIFEST] == now(output).data
    assert "dataset-report.json" not in hub.files(REPO)
    run()
    assert "report.html" not in hub.files(REPO)
    assert hub.files(REPO)[MANIFEST] != now(output).data


def test_a_public_repository_is_refused_unless_the_spec_says_so(hub: PushHub, run: Any) -> None:
    hub.private[REPO] = False
    hub.branches[REPO, "main"] = {}
    with pytest.raises(StageError, match=r"exists and is public.*set it to false") as caught:
        run()
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert hub.files(REPO) == {}
    assert not hub.stored
    run(Hub(repo=REPO, private=False))
    assert "gguf/tuned-Q8_0.gguf" in hub.files(REPO)


def sums(files: Mapping[str, bytes]) -> dict[str, str]:
    """The lines of SHA256SUMS, each held against the file."""
    found = {}
    for line in files["SHA256SUMS"].decode().splitlines():
        sha256, _, path = line.partition("  ")
        assert hashlib.sha256(files[path]).hexdigest() == sha256
        found[path] = sha256
    return found


def test_what_is_pushed_is_not_pushed_again_and_another_version_is(
    hub: PushHub, run: Any, output: LocalFolder, tmp_path: Path
) -> None:
    assert run() == run()
    assert hub.commits == 1
    hub.files(REPO)["theirs.txt"] = b"somebody else's"
    hub.files(REPO)[".gitignore"] = b"*.gguf"
    publish(output, tmp_path / "workspace", "other", {"README.md": b"# new", "gguf/b.gguf": b"new"})
    assert not pushed(output)
    run()
    assert set(hub.files(REPO)) == {
        *(".gitattributes", ".gitignore", "theirs.txt"),
        *("README.md", "gguf/b.gguf", "SHA256SUMS", MANIFEST),
    }
    assert pushed(output)
    assert not pushed(output, Hub(repo="org/other"))


def test_another_branch_is_made(hub: PushHub, run: Any) -> None:
    run(Hub(repo=REPO, private=False, revision="v2"))
    assert "gguf/tuned-Q8_0.gguf" in hub.files(REPO, "v2")
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert hub.private == {REPO: False}


@pytest.mark.parametrize(
    ("route", "failure"),
    [
        ("create", (503, Reason.MODEL_HUB_UNAVAILABLE)),
        ("commit", (503, Reason.MODEL_HUB_UNAVAILABLE)),
        ("commit", (403, Reason.MODEL_ACCESS_DENIED)),
        ("commit", (412, Reason.INVALID_CONFIG)),
        ("store", (403, Reason.MODEL_ACCESS_DENIED)),
    ],
)
def test_a_failed_push_leaves_the_bucket_whole_and_the_next_one_only_pushes(
    hub: PushHub, run: Any, output: LocalFolder, route: str, failure: tuple[int, Reason]
) -> None:
    status, reason = failure
    hub.fail[route] = status
    with pytest.raises(StageError, match=r"complete in .*; the next attempt only pushes") as caught:
        run()
    assert caught.value.reason is reason
    assert TOKEN not in caught.value.message
    assert output.read(PUSHED) is None
    assert {path: output.read(now(output).path(path)) for path in FILES} == FILES
    hub.fail.clear()
    sent = list(hub.stored)
    run()
    assert hub.stored[: len(sent)] == sent
    assert len(hub.stored) == 2, "no content was sent twice"


def test_a_wrong_token_and_a_hub_that_is_not_there(
    hub: PushHub, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "hf_wrong")
    with pytest.raises(StageError, match="tokenSecretRef needs the right") as caught:
        run()
    assert caught.value.reason is Reason.MODEL_ACCESS_DENIED
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StageError, match="can't be reached") as caught:
        run()
    assert caught.value.reason is Reason.MODEL_HUB_UNAVAILABLE
    assert hub.commits == 0


def test_without_a_token_it_fails_at_once() -> None:
    check_token(None, {})
    check_token(HUB, {TOKEN_VARIABLE: TOKEN})
    with pytest.raises(StageError, match="tokenSecretRef") as caught:
        check_token(HUB, {})
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_a_file_that_is_not_what_the_manifest_says_is_not_pushed(
    hub: PushHub, run: Any, output: LocalFolder
) -> None:
    output.write(now(output).path("gguf/tuned-Q8_0.gguf"), b"GGUF" * 999 + b"GGUE")
    with pytest.raises(StageError, match=r"is not what manifest\.json says"):
        run()
    assert hub.commits == 0


def test_prepare_asks_for_an_export_until_the_push_is_done(
    hub: PushHub, output: LocalFolder, tmp_path: Path
) -> None:
    files = {path: data for path, data in FILES.items() if not path.startswith("rejected/")}
    publish(output, tmp_path / "workspace", "fp", files)
    marker = find_complete(output, Stage.EXPORT, fingerprint("fp"))
    assert marker is not None

    def held(target: Hub | None) -> set[Stage]:
        asked = Output(uri=output.uri, hub=target)
        return set(without_push({Stage.EXPORT: marker}, output, asked, Export()))

    assert held(None) == {Stage.EXPORT}
    assert held(HUB) == {Stage.TRAIN}
    push(HUB, output, now(output), tmp_path / "workspace", Reporter())
    assert held(HUB) == {Stage.EXPORT}
    assert held(Hub(repo="org/other")) == {Stage.TRAIN}
    assert hub.commits == 1
