"""What surrounds Unsloth, which itself needs a GPU: a stand-in computes as transformers does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import Notice, Reason, StageError
from finetune_trainer.model.adapter import lora_config
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import TrainingWork
from finetune_trainer.train.recipe import sft, unsloth_engine
from finetune_trainer.train.recipe.unsloth_engine import (
    UnslothFailedError,
    or_transformers,
    restart_with_transformers,
    row_lengths,
    sequence_limit,
    until_first_step,
)
from tests.integration.trainer.recipe import make_work
from tests.integration.trainer.test_distributed import make_rows

CRASH = RuntimeError("PassManager::run failed")  # as Triton's compiler says


def work_of(model: Path, workdir: Path, **training: Any) -> TrainingWork:
    workdir.mkdir(exist_ok=True)
    settings = {"epochs": 1, "gradientAccumulationSteps": 1, **training}
    work = make_work(model, workdir, make_rows(6, 1), **settings)
    return work.model_copy(update={"engine": "unsloth"})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Loads as the transformers engine does; its kernel fails at the passes that are listed."""
    failing, passes = [1], iter(range(1, 1000))

    def load(work: TrainingWork, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(work.model.path, dtype=dtype)
        return get_peft_model(model, lora_config(work.config.training.lora, model))

    def loss(model: torch.nn.Module, batch: Any, _: Any) -> torch.Tensor:
        if next(passes) in failing:
            raise CRASH
        found: torch.Tensor = model(**batch, use_cache=False).loss
        return found

    monkeypatch.setattr(unsloth_engine, "load", load)
    monkeypatch.setattr(unsloth_engine, "loss", loss)
    return failing


def test_its_failure_in_the_first_step_is_a_reason_to_start_over(
    stand_in: list[int], tiny_model: Path, tmp_path: Path
) -> None:
    assert stand_in
    with pytest.raises(UnslothFailedError, match="train the model: RuntimeError: PassManager"):
        sft.fine_tune(work_of(tiny_model, tmp_path), Reporter())


def test_its_failure_later_is_the_trainings(
    stand_in: list[int], tiny_model: Path, tmp_path: Path
) -> None:
    """A training that has begun is not begun anew by another engine; a retry goes on with it."""
    stand_in[:] = [2]
    with pytest.raises(RuntimeError, match="PassManager"):
        sft.fine_tune(work_of(tiny_model, tmp_path), Reporter())


def test_its_failure_while_the_trainer_is_built_is_one_as_well(
    stand_in: list[int],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in.clear()
    monkeypatch.setattr(sft, "arguments", lambda *_, **__: exec("raise TypeError('no such')"))  # noqa: S102
    with pytest.raises(UnslothFailedError, match="TypeError: no such"):
        sft.fine_tune(work_of(tiny_model, tmp_path), Reporter())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        StageError(Reason.STOPPED, "Stopped by a signal."),
        StageError(Reason.TRAINING_DIVERGED, "The loss became nan."),
    ],
)
def test_what_is_not_its_fault_stays_what_it_is(
    error: Exception, tiny_model: Path, tmp_path: Path
) -> None:
    work = work_of(tiny_model, tmp_path)
    with pytest.raises(type(error)) as caught, until_first_step(work, lambda: 0):
        raise error
    assert caught.value is error


def test_steps_before_a_resume_do_not_count_as_its_own(tiny_model: Path, tmp_path: Path) -> None:
    work = work_of(tiny_model, tmp_path).model_copy(update={"resume_from": tmp_path})
    (tmp_path / "trainer_state.json").write_text('{"global_step": 4}')
    with pytest.raises(UnslothFailedError), until_first_step(work, lambda: 4):
        raise CRASH
    with pytest.raises(RuntimeError, match="PassManager"), until_first_step(work, lambda: 5):
        raise CRASH


@pytest.mark.parametrize(("longest", "expected"), [(256, 256), (2048, 2048), (1 << 20, 2048)])
def test_it_never_stretches_the_models_positions(
    longest: int, expected: int, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    work = work_of(folder, tmp_path / "work", maxSequenceLength=longest)
    assert sequence_limit(work) == expected


@pytest.mark.parametrize(("engine", "told"), [("auto", False), ("unsloth", True)])
def test_only_who_named_it_is_told_that_it_failed(
    engine: str,
    told: bool,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notices: list[Notice] = []
    work = work_of(tiny_model, tmp_path, engine=engine)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    started: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))

    class Heard:
        def alive(self) -> None:
            """The worker's channel."""

        def notice(self, notice: Notice) -> None:
            notices.append(notice)

    cause = UnslothFailedError("train the model: RuntimeError: PassManager::run failed")
    assert or_transformers(work).engine == "unsloth"
    restart_with_transformers(work, cause, Heard())  # type: ignore[arg-type]
    assert len(started) == 1
    assert or_transformers(work).engine == "transformers"
    assert bool(notices) == told


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        ([[0, 1, 2, 0, 1, 0]], [3, 2, 1]),
        ([[0, 1, 2]], [3]),
        ([[0, 0]], [1, 1]),
        ([[1, 2, 0]], None),  # a part of a row
        ([[1, 2, 3]], None),
        ([[0, 1], [0, 1]], None),  # padded, not packed
        ([0, 1], None),
    ],
)
def test_its_attention_is_told_the_lengths_of_packed_rows(
    positions: Any, lengths: list[int] | None
) -> None:
    given = torch.tensor(positions)
    found = row_lengths(given)
    assert (None if found is None else found.tolist()) == lengths
    seen = dict[str, Any]()

    class Model(torch.nn.Module):
        def forward(self, **options: Any) -> None:
            seen.update(options)

    model = Model()
    model.register_forward_pre_hook(unsloth_engine._pass_row_lengths, with_kwargs=True)
    model(position_ids=given)
    assert seen["position_ids"] is given
    assert ("packed_seq_lengths" in seen) is (lengths is not None)
    if lengths:
        assert seen["packed_seq_lengths"].dtype == torch.int32
