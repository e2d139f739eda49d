"""What the tuned model says, by transformers and PEFT in float32, before anything is merged.

The adapter's layers stand beside the base model's as they were trained, so that a mistake of the
merge or of the conversion shows. It runs in a process of its own, `python -m` this module: a JSON
request in, a JSON answer out.

    {"base": …, "adapter": …, "trust": …, "rows": [{"ids": […], "measured": […]}],
     "tunedFile": …, "baseFile": …}
        -> {"tuned": figures, "base": figures or null}

Figures are those of `logprobs.Measured`; the base model's divergence is that from the tuned one.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.reference import logprobs
from finetune_trainer.export.reference.float32_model import load_streamed
from finetune_trainer.export.reference.rows import Row
from finetune_trainer.model.loading import use_available_cpus
from finetune_trainer.runtime import child

TOKENS_OF_PASS = 1024  # with padding: what bounds the activations
ANSWERS_OF_PASS = 128  # what bounds the logits


@dataclass(frozen=True)
class Reference:
    """What the GGUF files are held against."""

    tuned: Path
    """Log-probabilities of base model and adapter, as `logprobs.create` lays them out."""

    base: Path | None
    """Those of the base model alone; None without an adapter."""

    tuned_perplexity: float
    base_perplexity: float | None
    effect: float | None
    """How far the adapter moves the base model: the mean KL divergence of the two, in nats."""


def compute(
    base: Path,
    adapter: Path | None,
    rows: Sequence[Row],
    folder: Path,
    *,
    trust_remote_code: bool = False,
) -> Reference:
    """Run the model over the rows, in a process of its own; files go to `folder`.

    Raises StageError when the model can't be loaded or computes numbers that are not finite.
    """
    tuned, alone = folder / "reference-tuned.npy", folder / "reference-base.npy"
    request = {
        "base": str(base),
        "adapter": str(adapter) if adapter else None,
        "trust": trust_remote_code,
        "rows": [{"ids": row.ids, "measured": row.measured} for row in rows],
        "tunedFile": str(tuned),
        "baseFile": str(alone),
    }
    answer = _ask(request)
    if not answer["tuned"]["finite"]:
        raise StageError(
            Reason.QUALITY_GATE_FAILED,
            "Base model and adapter compute numbers that are not finite, before anything is "
            "converted: lower spec.training.learningRate and train again.",
        )
    of_base = answer["base"]
    return Reference(
        tuned=tuned,
        base=alone if of_base else None,
        tuned_perplexity=answer["tuned"]["perplexity"],
        base_perplexity=of_base["perplexity"] if of_base else None,
        effect=of_base["klDivergence"] if of_base else None,
    )


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    done = child.run([sys.executable, "-m", __name__], json.dumps(request))
    if done.status != 0:
        raise StageError(
            Reason.INTERNAL_ERROR,
            "transformers could not run the tuned model, to hold the GGUF files against it: "
            f"{done.last_line():.300}. Give the export's pod more memory, or set "
            "spec.export.verify to off.",
        )
    answer: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    if "reason" in answer:
        raise StageError(Reason(answer["reason"]), answer["message"])
    return answer


def passes(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows in groups, each small enough for one forward pass."""
    group: list[Row] = []
    for row in rows:
        longest = max(len(item.ids) for item in [*group, row])
        answers = sum(len(item.measured) for item in [*group, row])
        too_large = longest * (len(group) + 1) > TOKENS_OF_PASS or answers > ANSWERS_OF_PASS
        if group and too_large:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel, rows: Sequence[Row]) -> torch.Tensor:
    """Logits (n, vocabulary) at the n places before the measured tokens of some rows."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
    where = [index for index, row in enumerate(rows) for _ in row.measured]
    before = [position - 1 for row in rows for position in row.measured]

    def measured_only(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][where, before].unsqueeze(0), *args[1:])

    # The head is the largest layer: it computes what is measured and no more.
    hook = model.get_output_embeddings().register_forward_pre_hook(measured_only)
    try:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        hook.remove()
    return logits[0]


def _measure(
    model: PreTrainedModel | PeftModel, rows: Sequence[Row], file: Path, against: Path | None
) -> dict[str, Any]:
    measured, done = logprobs.Measured(), 0
    total = sum(len(row.measured) for row in rows)
    reference = None if against is None else logprobs.read(against)
    target = None
    for group in passes(rows):
        logits = logits_of(model, group).numpy()
        if target is None:
            target = logprobs.create(file, total, logits.shape[1])
        targets = [row.ids[position] for row in group for position in row.measured]
        beside = None if reference is None else reference[done : done + len(targets)]
        values = measured.add(logits, targets, beside)
        if values is not None:
            logprobs.store(target, done, values)
        done += len(targets)
    return measured.figures()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    rows = [Row(tuple(row["ids"]), tuple(row["measured"])) for row in request["rows"]]
    adapter = Path(request["adapter"]) if request["adapter"] else None
    model = load_streamed(Path(request["base"]), adapter, trust_remote_code=request["trust"])
    tuned_file = Path(request["tunedFile"])
    tuned, base = _measure(model, rows, tuned_file, None), None
    if isinstance(model, PeftModel) and tuned["finite"]:
        with model.disable_adapter():
            base = _measure(model, rows, Path(request["baseFile"]), tuned_file)
    return {"tuned": tuned, "base": base}


def main() -> None:
    """Do what standard input asks for."""
    use_available_cpus()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no answer
            answer = _answer(json.load(sys.stdin))
    except StageError as error:
        answer = {"reason": error.reason, "message": error.message}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
