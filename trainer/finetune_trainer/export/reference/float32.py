"""What the tuned model predicts, by transformers and PEFT in float32, before anything is merged.

The adapter's layers stand beside the base model's, as they were trained. So a mistake of the merge
or of the conversion shows. The model runs in a process of its own, `python -m` this module,
which reads a ReferenceRequest and writes a ReferenceAnswer or a Refusal.

transformers maps safetensors into memory, and a 16-bit model takes no memory of its own until it is
converted. Here it never is: each weight is a `MappedWeight` (model/loading). So a forward pass
takes the memory of its activations, whatever the model's size. The modules are those of
transformers and PEFT, so hooks work on them as on any model.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter
from torch.nn.modules.module import register_module_forward_pre_hook

from finetune_trainer.contract import Reason, StageError
from finetune_trainer.export.merge.deltas import is_whole_model
from finetune_trainer.export.reference import (
    Generated,
    MeasuredRow,
    Measurement,
    Meter,
    Reference,
    ReferenceAnswer,
    ReferenceRequest,
    Refusal,
    create_logprobs,
    passes,
    read_logprobs,
    store_logprobs,
)
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import compute_in_float32, load_model, use_available_cpus
from finetune_trainer.model.tokenizer import load_tokenizer
from finetune_trainer.runtime import child

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BASE_ALONE = "__base__"  # PEFT's name for no adapter
UNMIXED = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")


def compute_reference(
    request: ReferenceRequest, on_progress: child.OnProgress | None = None
) -> Reference:
    """Run the model over the rows, in a process of its own.

    Raises StageError when the model can't be loaded or computes numbers that are not finite.
    """
    answer = measure_in_child(request, on_progress)
    if not answer.tuned.finite:
        raise StageError(
            Reason.QUALITY_GATE_FAILED,
            "Base model and adapter compute numbers that are not finite, before anything is "
            "converted: lower spec.training.learningRate and train again.",
        )
    return Reference.of(request, answer)


def measure_in_child(
    request: ReferenceRequest, on_progress: child.OnProgress | None = None
) -> ReferenceAnswer:
    done = child.run(
        [sys.executable, "-m", __name__], request.model_dump_json(), on_progress=on_progress
    )
    if done.status != 0:
        raise StageError(
            Reason.INTERNAL_ERROR,
            "transformers could not run the tuned model, to hold the files against it: "
            f"{done.last_line():.300}. Give the export's pod more memory, or set "
            "spec.export.verify to off.",
        )
    line = done.output.splitlines()[-1]
    answer: ReferenceAnswer | Refusal = TypeAdapter(ReferenceAnswer | Refusal).validate_json(line)
    if isinstance(answer, Refusal):
        raise StageError(answer.reason, answer.message)
    return answer


def measure_here(
    request: ReferenceRequest, on_progress: child.OnProgress | None = None
) -> ReferenceAnswer:
    """What the child process does."""
    groups = list(passes(request.rows))
    total = len(groups) * (1 if request.merged is None else 2) + bool(request.prompts)
    counter = count()

    def step() -> None:
        if on_progress:
            on_progress(next(counter) + 1, total)

    tuned, base = _measure_tuned(request, groups, step)
    merged: Measurement | None = None
    answers: tuple[Generated, ...] = ()
    if request.merged and tuned.finite:
        model = load_streamed(request.merged, None)
        if groups:
            against = read_logprobs(request.tuned_file)
            (merged,) = _measure(partial(logits_of, model), groups, [None], against, step)
        if request.prompts:
            answers = answer_prompts(model, request)
            step()
    return ReferenceAnswer(tuned=tuned, base=base, merged=merged, answers=answers)


def _measure_tuned(
    request: ReferenceRequest, groups: Sequence[Sequence[MeasuredRow]], step: Callable[[], None]
) -> tuple[Measurement, Measurement | None]:
    """Base model and adapter, and the base model alone, in passes that both share."""
    from peft import PeftModel  # noqa: PLC0415 - slow to import, and only the child needs it

    if not groups:
        return Measurement(()), None
    model = load_streamed(request.base, request.adapter)
    files = [request.tuned_file, request.base_file]
    if isinstance(model, PeftModel):
        logits_of_group = partial(logits_of_both, model)
    elif request.adapter is not None:  # a whole model, beside its base
        logits_of_group = partial(logits_of_two, model, load_streamed(request.base, None))
    else:
        (tuned,) = _measure(partial(logits_of, model), groups, files[:1], None, step)
        return tuned, None
    tuned, base = _measure(logits_of_group, groups, files, None, step)
    return tuned, base


def _measure(
    logits_of_group: Callable[[Sequence[MeasuredRow]], torch.Tensor],
    groups: Sequence[Sequence[MeasuredRow]],
    files: Sequence[Path | None],
    against: npt.NDArray[np.float16] | None,
    step: Callable[[], None],
) -> list[Measurement]:
    """Measure as many models as there are `files`, which get their log-probabilities.

    All are held against `against`, or else all but the first against the first.
    """
    meters = [Meter() for _ in files]
    total, done = sum(len(row.measured) for group in groups for row in group), 0
    targets: list[npt.NDArray[np.float16] | None] = [None] * len(files)
    beside: npt.NDArray[Any] | None
    for group in groups:
        logits = logits_of_group(group).cpu().numpy()
        found = logits.reshape(len(files), -1, logits.shape[-1])
        tokens = [row.ids[position] for row in group for position in row.measured]
        beside = None if against is None else against[done : done + len(tokens)]
        for index, (meter, file) in enumerate(zip(meters, files, strict=True)):
            values = meter.add(found[index], tokens, beside)
            if values is None:
                continue
            if beside is None:
                beside = values.copy()  # of the first, which the others are held against
            if file is not None:
                kept = targets[index]
                if kept is None:
                    kept = targets[index] = create_logprobs(file, total, values.shape[1])
                store_logprobs(kept, done, values)
        done += len(tokens)
        step()
    return [meter.measurement() for meter in meters]


@torch.no_grad()
def logits_of(
    model: PreTrainedModel | PeftModel, rows: Sequence[MeasuredRow], **options: Any
) -> torch.Tensor:
    """Logits (n, vocabulary) at the n places before the measured tokens of some rows.

    `options` are passed on to the model.
    """
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
        logits: torch.Tensor = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
            **options,
        ).logits
    finally:
        hook.remove()
    return logits[0]


def logits_of_both(model: PeftModel, rows: Sequence[MeasuredRow]) -> torch.Tensor:
    """Logits (2n, vocabulary): those of base model and adapter, then of the base model alone.

    Both share a pass, so that weights are read once. Where PEFT can't mix them (DoRA, whole modules
    that were trained, experts, which get tokens in another order), each has its own.
    """
    names = [*[model.active_adapter] * len(rows), *[BASE_ALONE] * len(rows)]
    config = model.active_peft_config
    if not any(getattr(config, name, None) for name in UNMIXED):
        with contextlib.suppress(ValueError):
            return logits_of(model, [*rows, *rows], adapter_names=names)
    tuned = logits_of(model, rows)
    with model.disable_adapter():
        return torch.cat([tuned, logits_of(model, rows)])


def logits_of_two(
    tuned: PreTrainedModel, base: PreTrainedModel | PeftModel, rows: Sequence[MeasuredRow]
) -> torch.Tensor:
    """The same of two models, whose weights both stay in their files."""
    return torch.cat([logits_of(tuned, rows), logits_of(base, rows)])


@torch.no_grad()
def answer_prompts(
    model: PreTrainedModel | PeftModel, request: ReferenceRequest
) -> tuple[Generated, ...]:
    """Answer the prompts greedily, as transformers does with the folder's own settings.

    None is answered where the time is up before all are read.
    """
    until = time.monotonic() + request.answer_seconds
    tokenizer = load_tokenizer(cast("ModelFolder", request.merged))
    width = max(len(prompt) for prompt in request.prompts)
    shape, padding = (len(request.prompts), width), int(tokenizer.pad_token_id)
    ids = torch.full(shape, padding)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(request.prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    eos = cast("Any", model).generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    reading = register_module_forward_pre_hook(partial(_look_at_clock, until))
    read = model.register_forward_hook(lambda *_: reading.remove())
    try:
        found = cast("Any", model).generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=request.answer_tokens,
            max_time=request.answer_seconds,
            pad_token_id=tokenizer.pad_token_id,
        )
    except TimeoutError:
        return ()
    finally:
        reading.remove()
        read.remove()
    return tuple(Generated.of(tokenizer, answer[width:].tolist(), ends) for answer in found)


def _look_at_clock(until: float, *_: object) -> None:
    if time.monotonic() >= until:
        raise TimeoutError


def best_device() -> torch.device:
    """Where the model is computed: on a GPU, if torch can use one. Its weights come there block by
    block, so that it needs no room for them."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_streamed(base: ModelFolder, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """The base model, with the adapter beside it unmerged if there is one, ready to evaluate.

    Of a full training, `adapter` is the whole model that it left in float32.

    Raises StageError(ModelUnsupported) when transformers can't load the base model.
    """
    if adapter is not None and is_whole_model(adapter):
        base, adapter = replace(base, path=adapter), None
    model = load_model(base, "auto", "cpu")
    device = best_device()
    compute_in_float32(model, device)
    tuned: PreTrainedModel | PeftModel = model
    if adapter is not None:
        from peft import PeftModel  # noqa: PLC0415 - slow, and not for each model

        tuned = PeftModel.from_pretrained(model, adapter)
    for parameter in tuned.parameters():
        if parameter.device != device:  # of the adapter
            parameter.data = parameter.data.to(device)
    tuned.train(False)
    return tuned


def main() -> None:
    request = ReferenceRequest.model_validate_json(sys.stdin.read())
    use_available_cpus()
    answer: ReferenceAnswer | Refusal
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a library prints is no answer
            answer = measure_here(request, child.say_progress)
    except StageError as error:
        answer = Refusal(reason=error.reason, message=error.message)
    sys.stdout.write(answer.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
