"""The plain TRL script that ours is compared with: what a guide would have you write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import Trainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


class UnfusedTrainer(SFTTrainer):
    """With the model's own loss, and so without TRL's kernel, which needs a GPU."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The Trainer's own way."""
        return Trainer.compute_loss(self, *arguments, **options)


def guide_arguments(folder: Path, **changes: Any) -> SFTConfig:
    """The guide's hyperparameters; gradient checkpointing, TRL's default, is off: it is slower."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.03,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SFTConfig(**(given | changes))


def guide_lora() -> LoraConfig:
    """An adapter on attention."""
    return LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
