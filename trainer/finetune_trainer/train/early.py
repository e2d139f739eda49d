"""Stop when the held-out rows are no longer learnt better, and go back to the best adapter."""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune_trainer.config import EarlyStopping
from finetune_trainer.outcome import Notice, NoticeCode

BEST = "best_adapter.safetensors"  # in a checkpoint's folder

log = logging.getLogger(__name__)


class BestAdapter(TrainerCallback, ExportableState):
    """Keeps the adapter of the evaluation with the lowest loss.

    The base model (step 0) is no candidate: an adapter that changes nothing is none. The weights
    are held in memory (on the CPU) and go into every checkpoint. With fsdp each process keeps its
    own part in memory only; after a resume the search for the best begins anew there.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: EarlyStopping,
        notify: Callable[[Notice], None] | None,
        resume_from: Path | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._notify = notify
        self._resume_from = resume_from
        self._weights: dict[str, torch.Tensor] = {}
        self.best_loss, self.best_step, self.without_gain = math.inf, 0, 0

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, from where it comes back after a resume."""
        names = ("best_loss", "best_step", "without_gain")
        found = {name: getattr(self, name) for name in names}
        # JSON has no infinity.
        return {"args": {}, "attributes": found if self.best_step else {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fetch the best weights so far."""
        file = self._resume_from / BEST if self._resume_from else None
        if file and file.exists():
            self._weights = load_file(file)

    def on_evaluate(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """Compare, and stop after as many evaluations without gain as the spec allows."""
        step, loss = state.global_step, float(values["metrics"]["eval_loss"])
        if step in (0, self.best_step):
            return
        if self.best_step and not self._weights:
            self.best_loss, self.best_step = math.inf, 0  # resumed without them
        gained = loss < self.best_loss - self._settings.min_delta
        self.without_gain = 0 if gained else self.without_gain + 1
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            self._weights = {name: _copy(p) for name, p in self._trained()}
        if self.without_gain >= self._settings.patience and step < state.max_steps:
            control.should_training_stop = True
            self._say(step, state.max_steps, loss)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the best weights to the checkpoint."""
        whole = all(type(value) is torch.Tensor for value in self._weights.values())
        if self._weights and whole and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file(self._weights, folder / BEST)

    def restore(self, last_step: int) -> None:
        """Put the best weights back into the model."""
        if not self._weights or self.best_step == last_step:
            return
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._weights[name])
        log.info("The adapter of step %d is kept (loss %.4f)", self.best_step, self.best_loss)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]

    def _say(self, step: int, steps: int, loss: float) -> None:
        if self._notify is None:
            return
        self._notify(
            Notice(
                code=NoticeCode.EARLY_STOPPED,
                step=step,
                evidence=f"the loss on the held-out rows is {loss:.4f} at step {step} of {steps}, "
                f"and was {self.best_loss:.4f} at step {self.best_step}: "
                f"{self.without_gain} evaluations without a gain",
                remedy=f"The training stopped, and the adapter of step {self.best_step} is kept.",
            )
        )


def _copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.detach().to("cpu", copy=True)
