"""One FineTuneJob owns an output folder."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from finetune_trainer.contract import JobReference, Output, Reason, StageError, Storage
from finetune_trainer.store import Folder, LocalFolder, open_folder
from finetune_trainer.store.marker import OWNER, check_owner, claim, read_owner
from tests.dying_folder import contents

OURS = JobReference(name="support", namespace="team-a")
THEIRS = JobReference(name="support", namespace="team-b")


@pytest.fixture
def output(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "output")


def settings(output: Folder, take_over_from: str | None = None) -> Output:
    return Output(uri=output.uri, take_over_from=take_over_from)


def owner(output: Folder) -> str:
    found = read_owner(output)
    assert found is not None
    return found.job


def test_the_first_to_come_owns_the_folder_and_a_second_is_refused(output: LocalFolder) -> None:
    asked = settings(output)
    claim(output, asked, OURS)
    before = contents(output)
    assert before.keys() == {OWNER}
    assert json.loads(before[OWNER]).keys() == {"namespace", "name", "since"}
    claim(output, asked, OURS)
    check_owner(output, asked, JobReference(name="support", namespace="team-a"))
    for refuse in (claim, check_owner):
        with pytest.raises(StageError, match="belongs to the FineTuneJob team-a/support") as caught:
            refuse(output, asked, THEIRS)
        assert caught.value.reason is Reason.OUTPUT_IN_USE
        assert "takeOverFrom: team-a/support" in caught.value.message
    assert contents(output) == before, "nothing of the first is touched"


def test_what_0_1_0_left_belongs_to_the_first_to_come(output: LocalFolder) -> None:
    output.write("manifest.json", b"{}")
    check_owner(output, settings(output), OURS)
    claim(output, settings(output), OURS)
    assert owner(output) == "team-a/support"


def test_taking_over_is_explicit_and_names_the_former_owner(output: LocalFolder) -> None:
    claim(output, settings(output), OURS)
    with pytest.raises(StageError, match="takeOverFrom names team-c/support: "):
        claim(output, settings(output, "team-c/support"), THEIRS)
    taking = settings(output, "team-a/support")
    claim(output, taking, THEIRS)
    assert owner(output) == "team-b/support"
    claim(output, taking, THEIRS)  # the field may stay
    for refuse in (claim, check_owner):
        with pytest.raises(StageError, match="belongs to the FineTuneJob team-b/support"):
            refuse(output, settings(output), OURS)
    with pytest.raises(StageError, match="team-b/support"):
        check_owner(output, taking, OURS)


def test_nothing_is_taken_over_from_somebody_who_has_not_come_yet(output: LocalFolder) -> None:
    claim(output, settings(output, "team-b/support"), OURS)
    assert owner(output) == "team-a/support"


@pytest.mark.parametrize("data", [b"", b"not JSON", b'{"name": "support"}'])
def test_an_owner_that_can_not_be_read_is_an_error_and_no_takeover(
    output: LocalFolder, data: bytes
) -> None:
    output.write(OWNER, data)
    for refuse in (claim, check_owner):
        with pytest.raises(StageError, match=r"delete that object if the folder is") as caught:
            refuse(output, settings(output, "team-b/support"), OURS)
        assert caught.value.reason is Reason.INVALID_CONFIG
        assert output.uri_of(OWNER) in caught.value.message
    assert output.read(OWNER) == data


def test_a_later_release_may_say_more(output: LocalFolder) -> None:
    claim(output, settings(output), OURS)
    fields = json.loads(output.read(OWNER) or b"")
    output.write(OWNER, json.dumps({**fields, "cluster": "west"}).encode())
    check_owner(output, settings(output), OURS)


def test_a_run_without_a_finetunejob_owns_nothing_and_keeps_off_what_one_owns(
    output: LocalFolder,
) -> None:
    claim(output, settings(output), None)
    check_owner(output, settings(output), None)
    assert contents(output) == {}
    claim(output, settings(output), OURS)
    for refuse in (claim, check_owner):
        with pytest.raises(StageError, match="team-a/support") as caught:
            refuse(output, settings(output, "team-a/support"), None)
        assert caught.value.reason is Reason.OUTPUT_IN_USE
        assert "name another output.uri" in caught.value.message


def test_of_many_at_the_same_time_one_wins(output: LocalFolder) -> None:
    jobs = [JobReference(name=f"job-{n}", namespace="team") for n in range(8)]
    start = Barrier(len(jobs))

    def attempt(job: JobReference) -> Reason:
        start.wait()
        try:
            claim(output, settings(output), job)
        except StageError as error:
            return error.reason
        return Reason.SUCCEEDED

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = {
            f"team/{job.name}": end for job, end in zip(jobs, pool.map(attempt, jobs), strict=True)
        }
    assert found.pop(owner(output)) is Reason.SUCCEEDED
    assert set(found.values()) == {Reason.OUTPUT_IN_USE}


@pytest.mark.parametrize(
    "uri",
    [
        "s3://models/support",
        "s3://models/support/",
        "s3://models//support",
        "s3://models/support//",
    ],
)
def test_spellings_of_one_uri_are_one_folder(uri: str) -> None:
    folder = Output(uri=uri).folder
    assert folder == "s3://models/support"
    assert open_folder(folder, Storage()).uri == folder


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("s3://models/a//b/", "s3://models/a/b"),
        ("s3://models", "s3://models"),
        ("s3://models/", "s3://models"),
        ("/data/out/", "/data/out"),
        ("//data//out", "/data/out"),
        ("relative/out/", "relative/out"),
    ],
)
def test_a_uri_has_one_spelling(uri: str, folder: str) -> None:
    assert Output(uri=uri).folder == folder


def test_on_disk_another_spelling_finds_the_owner(tmp_path: Path) -> None:
    first = Output(uri=f"{tmp_path}/output")
    claim(open_folder(first.folder, Storage()), first, OURS)
    second = Output(uri=f"{tmp_path}//output/")
    with pytest.raises(StageError, match="team-a/support"):
        claim(open_folder(second.folder, Storage()), second, THEIRS)
