"""What worker and stage say reaches the other, also where one is killed within a message."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from finetune_trainer.contract import Notice, NoticeCode, Progress, Reason
from finetune_trainer.train.link import (
    Channel,
    CheckpointOnDisk,
    Failed,
    StageLink,
    TrainingWork,
    WorkerMessage,
    listening,
)
from tests.unit.trainer.training_work import work_in


@pytest.fixture
def work(tmp_path: Path) -> TrainingWork:
    return work_in(tmp_path)


class Heard(list[WorkerMessage]):
    """What the stage heard, without the first words of each worker."""

    def __call__(self, message: WorkerMessage) -> None:
        if message.process is None:
            self.append(message)


@contextmanager
def connected(link: StageLink) -> Iterator[Channel]:
    with closing(Channel(link.address)) as channel:
        yield channel


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_that_was_sent_is_handled_when_the_block_ends(work: TrainingWork) -> None:
    got = Heard()
    notice = Notice(code=NoticeCode.OVERFITTING, evidence="loss 1", remedy="Stop.")
    with listening(work, got) as link:
        with connected(link) as channel:
            assert channel.work == work
            channel.publish(Progress(step=1))
            channel.checkpoint(5, Path("checkpoint-5"))
            eventually(lambda: len(got) == 2)
        with connected(link) as channel:  # another worker
            channel.lengths([5, 3, 5])
            channel.notice(notice)
    assert got == [
        WorkerMessage(progress=Progress(step=1)),
        WorkerMessage(checkpoint=CheckpointOnDisk(step=5, folder=Path("checkpoint-5"))),
        WorkerMessage(lengths={3: 1, 5: 2}),
        WorkerMessage(notice=notice),
    ]
    assert not link.address.parent.exists()
    link.tell_stored_step()  # nobody listens any more, which is no error


def test_several_workers_speak_at_once_and_a_long_message_arrives_whole(
    work: TrainingWork,
) -> None:
    got = Heard()
    failed = Failed(reason=Reason.INTERNAL_ERROR, message="x" * 3_000_000)
    with listening(work, got) as link:

        def speak(rank: int) -> None:
            with connected(link) as channel:
                channel.failed(failed.model_copy(update={"step": rank}))

        threads = [threading.Thread(target=speak, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(each.failed.step or 0 for each in got if each.failed) == [0, 1, 2, 3]
    assert all(each.failed and each.failed.message == failed.message for each in got)


def test_a_field_that_is_cleared_is_told_from_one_that_is_left_out(work: TrainingWork) -> None:
    got = Heard()
    with listening(work, got) as link, connected(link) as channel:
        channel.publish(Progress(loss=None, tokens_per_second=12.5))
    (message,) = got
    assert message.progress is not None
    assert message.progress.merge_patch() == {"loss": None, "tokensPerSecond": 12.5}


def test_a_worker_that_is_killed_within_a_message_takes_nothing_with_it(
    work: TrainingWork,
) -> None:
    got = Heard()
    with (
        listening(work, got) as link,
        Client(str(link.address)) as worker,
        connected(link) as other,
    ):
        worker.send_bytes(b'{"progress": {"step": 1}}')
        eventually(lambda: got == [WorkerMessage(progress=Progress(step=1))])
        with open(worker.fileno(), "wb", closefd=False) as raw:
            raw.write(b"\0\0\1\0half of 256 bytes")
        worker.close()
        other.publish(Progress(step=2))
    assert got[1:] == [WorkerMessage(progress=Progress(step=2))]


def test_the_worker_hears_what_the_store_has(work: TrainingWork) -> None:
    stored: list[int | None] = [None]
    with listening(work, Heard(), lambda: stored[0]) as link:
        with connected(link) as channel:
            assert channel.stored_step() is None
            for step in (5, 1_000_000):
                stored[0] = step
                link.tell_stored_step()
                assert channel.stored_step(60) == step
            assert channel.stored_step() == 1_000_000
        with connected(link) as later:
            assert later.stored_step() == 1_000_000


def test_what_is_said_is_json_and_no_pickle(work: TrainingWork) -> None:
    with listening(work, Heard()) as link, Client(str(link.address)) as worker:
        worker.send_bytes(b'{"process": 1}')
        assert json.loads(worker.recv_bytes())["maxSequenceLength"] == 64
        assert json.loads(worker.recv_bytes()) is None


def test_a_socket_fits_wherever_temporary_files_go(
    work: TrainingWork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with listening(work, Heard()) as link, connected(link) as channel:
        assert channel.work == work


def test_an_error_in_handling_is_raised_where_somebody_can_answer_for_it(
    work: TrainingWork,
) -> None:
    def handle(message: WorkerMessage) -> None:
        if message.progress:
            raise ValueError("no such field")

    with (
        pytest.raises(ValueError, match="no such field"),
        listening(work, handle) as link,
        connected(link) as channel,
    ):
        channel.publish(Progress(step=1))
