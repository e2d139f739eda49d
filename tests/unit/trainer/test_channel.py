"""What the worker says reaches the stage, also when it is killed in the middle of a line."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.contract import Progress
from finetune_trainer.train.link.channel import NAME, Channel, listening


def test_all_that_was_sent_is_handled_when_the_block_ends(tmp_path: Path) -> None:
    got: list[dict[str, Any]] = []
    with listening(tmp_path, got.append):
        with closing(Channel(tmp_path)) as channel:
            channel.publish(Progress(step=1))
            channel.checkpoint(5, Path("/room/checkpoint-5"))
        with closing(Channel(tmp_path)) as channel:  # another worker
            channel.publish(Progress(step=2))
    assert [message for message in got if "nothing" not in message] == [
        {"progress": {"step": 1}},
        {"checkpoint": {"step": 5, "folder": "/room/checkpoint-5"}},
        {"progress": {"step": 2}},
    ]


def test_draining_waits_for_what_was_sent_so_far_also_after_half_a_line(tmp_path: Path) -> None:
    got: list[dict[str, Any]] = []
    with listening(tmp_path, got.append) as drain:
        with (tmp_path / NAME).open("w") as worker:
            worker.write('{"progress": {"step": 1}}\n{"progress": {"st')
        drain()
        assert {"progress": {"step": 1}} in got
        with closing(Channel(tmp_path)) as channel:
            channel.publish(Progress(step=2))
        drain()
        assert {"progress": {"step": 2}} in got
    drain()  # nobody listens any more, which is no error


def test_an_error_in_handling_is_raised_where_somebody_can_answer_for_it(tmp_path: Path) -> None:
    def handle(message: dict[str, Any]) -> None:
        if "progress" in message:
            raise ValueError("no such field")

    with (
        pytest.raises(ValueError, match="no such field"),
        listening(tmp_path, handle),
        closing(Channel(tmp_path)) as channel,
    ):
        channel.publish(Progress(step=1))
