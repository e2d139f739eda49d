"""What the worker says reaches the stage, also when it is killed in the middle of a line."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from finetune_trainer.contract import Notice, NoticeCode, Progress
from finetune_trainer.train.link.channel import (
    FIFO,
    Channel,
    CheckpointOnDisk,
    WorkerMessage,
    listening,
)


def test_all_that_was_sent_is_handled_when_the_block_ends(tmp_path: Path) -> None:
    got: list[WorkerMessage] = []
    notice = Notice(code=NoticeCode.OVERFITTING, evidence="loss 1", remedy="Stop.")
    with listening(tmp_path, got.append):
        with closing(Channel(tmp_path)) as channel:
            channel.publish(Progress(step=1))
            channel.checkpoint(5, Path("/work/checkpoint-5"))
        with closing(Channel(tmp_path)) as channel:  # another worker
            channel.publish(Progress(step=2))
            channel.notice(notice)
    assert got == [
        WorkerMessage(progress=Progress(step=1)),
        WorkerMessage(checkpoint=CheckpointOnDisk(step=5, folder=Path("/work/checkpoint-5"))),
        WorkerMessage(progress=Progress(step=2)),
        WorkerMessage(notice=notice),
    ]


def test_a_field_that_is_cleared_is_told_from_one_that_is_left_out(tmp_path: Path) -> None:
    got: list[WorkerMessage] = []
    with listening(tmp_path, got.append), closing(Channel(tmp_path)) as channel:
        channel.publish(Progress(loss=None, tokens_per_second=12.5))
    (message,) = got
    assert message.progress is not None
    fields = message.progress.merge_patch()
    assert fields == {"loss": None, "tokensPerSecond": 12.5}


def test_draining_waits_for_what_was_sent_so_far_also_after_half_a_line(tmp_path: Path) -> None:
    got: list[WorkerMessage] = []
    with listening(tmp_path, got.append) as drain:
        with (tmp_path / FIFO).open("w") as worker:
            worker.write('{"progress": {"step": 1}}\n{"progress": {"st')
        drain()
        assert got == [WorkerMessage(progress=Progress(step=1))]
        with closing(Channel(tmp_path)) as channel:
            channel.publish(Progress(step=2))
        drain()
        assert got[1:] == [WorkerMessage(progress=Progress(step=2))]
    drain()  # nobody listens any more, which is no error


def test_an_error_in_handling_is_raised_where_somebody_can_answer_for_it(tmp_path: Path) -> None:
    def handle(message: WorkerMessage) -> None:
        if message.progress:
            raise ValueError("no such field")

    with (
        pytest.raises(ValueError, match="no such field"),
        listening(tmp_path, handle),
        closing(Channel(tmp_path)) as channel,
    ):
        channel.publish(Progress(step=1))
