"""Cases that say right or wrong: what must be equal is equal, what must work works.

What is compared are the gradients of one step, or the adapters of whole trainings. The difference
of two is the norm of what differs, as a share of the norm of the second. In 16 bits it is never
zero, since sums come in another order: TOLERANCE says what counts as equal, and the difference
that a real fault makes stands beside it (`control`), where one can be provoked.
"""

# ruff: noqa: ARG002 - the arguments are transformers'

from __future__ import annotations

import signal
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu.models import even_lengths
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.trainings import (
    ALL_LINEAR,
    Ask,
    Bench,
    OnTrainer,
    attention_of,
    fine_tune,
    make_work,
    missing_for_qlora,
    model_of,
    on_step_end,
    optimizer_of,
    read_adapter,
    switched,
    unfuse,
)
from finetune_trainer.model.loading import compute_dtype
from finetune_trainer.train.link import InterruptedTrainingError
from finetune_trainer.train.recipe import lora, packing, sft
from finetune_trainer.train.recipe.trainer import RecipeTrainer

TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 1e-3}
PLAIN, FUSED = "adamw_torch", "adamw_torch_fused"
LEARNT = 0.5  # nats that the loss of a row learnt by heart has to fall by
ROWS = 8

Tensors = dict[str, torch.Tensor]


@dataclass
class Step:
    """One optimizer step."""

    loss: float = 0.0
    gradients: Tensors | None = None
    grad_norm: float = 0.0
    attention: str = ""
    """By its name in transformers."""

    evaluations: list[float] = field(default_factory=list)
    """Losses on the held-out rows, before and after."""

    def attach(self, trainer: RecipeTrainer) -> None:
        """Take the gradients when the step's last pass is through."""
        step = self
        step.attention = attention_of(trainer)

        class Take(TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                step.gradients = {
                    name: weight.grad.detach().float().cpu().clone()
                    for name, weight in model_of(trainer).named_parameters()
                    if weight.grad is not None
                }

        trainer.add_callback(Take())


def waken_adapter(trainer: RecipeTrainer) -> None:
    """Give the adapter's zeros a value; else half of the gradients are zero in the first step."""
    dice = torch.Generator().manual_seed(1)
    for name, weight in model_of(trainer).named_parameters():
        if weight.requires_grad and "lora_B" in name:
            with torch.no_grad():
                weight.copy_(0.02 * torch.randn(weight.shape, generator=dice))


def one_step(bench: Bench, ask: Ask, *on_trainer: OnTrainer, interpret: bool = False) -> Step:
    """The gradients of a step on all rows."""
    step = Step()
    fixed = {"lora": {"dropout": ask.dropout, "targetModules": ALL_LINEAR}, "warmupRatio": 0}
    work = make_work(bench, ask.but(settings=fixed), "step")
    trained = fine_tune(work, waken_adapter, step.attach, *on_trainer, interpret=interpret)
    last = next(line for line in trained.history if line.loss is not None)
    step.loss, step.grad_norm = last.loss or 0.0, last.grad_norm or 0.0
    step.evaluations = [line.eval_loss for line in trained.history if line.eval_loss is not None]
    return step


def difference(one: Tensors, other: Tensors) -> float:
    """Norm of what differs, as a share of the other's."""
    if one.keys() != other.keys():
        raise AssertionError("other weights were trained")
    between = sum(float((one[name] - other[name]).double().pow(2).sum()) for name in other)
    whole = sum(float(value.double().pow(2).sum()) for value in other.values())
    return float((between / whole) ** 0.5) if whole else float(between > 0)


def same(one: Step, other: Step, *, control: Step | None = None, **figures: Any) -> Outcome:
    """Whether two steps are equal within rounding, and clearly unlike the control."""
    tolerance = TOLERANCE[compute_dtype()]
    found = difference(one.gradients or {}, other.gradients or {})
    figures |= {
        "difference": found,
        "tolerance": tolerance,
        "losses": [one.loss, other.loss],
        "grad_norms": [one.grad_norm, other.grad_norm],
    }
    right = bool(other.gradients) and found <= tolerance
    for one_loss, other_loss in zip(one.evaluations, other.evaluations, strict=True):
        right = right and abs(one_loss - other_loss) <= tolerance * other_loss
    if control is not None:
        figures["control"] = difference(control.gradients or {}, other.gradients or {})
        right = right and figures["control"] > 2 * tolerance
    return Outcome.of_check(right, f"{found:.2g} of {tolerance:g}", figures)


def _rows(bench: Bench) -> Ask:
    return Ask(lengths=tuple(even_lengths(ROWS, bench.scale.longest)))


def _alone(bench: Bench) -> Step:
    """Each row in a pass of its own."""
    ask = _rows(bench).but(split=(1, ROWS), settings={"packing": False})
    found: Step = bench.once("alone", lambda: one_step(bench, ask))
    return found


def _packed(bench: Bench) -> Step:
    """All rows end to end in one pass, by the attention that packing chooses here."""
    found: Step = bench.once("packed", lambda: one_step(bench, _rows(bench).but(split=(ROWS, 1))))
    return found


def packed_as_alone(bench: Bench) -> Outcome:
    """Eight rows end to end in a pass, and each in a pass of its own.

    The control: the same pass with its rows taken for one.
    """
    leaking = one_step(bench, _rows(bench).but(split=(ROWS, 1)), forget_bounds)
    return same(_packed(bench), _alone(bench), control=leaking, attention=_packed(bench).attention)


def forget_bounds(trainer: RecipeTrainer) -> None:
    """Let packed rows see those before them."""
    collate = trainer.data_collator

    def collate_as_one(rows: Any) -> Any:
        batch = collate(rows)
        for each in batch if isinstance(batch, list) else [batch]:
            length = each["input_ids"].shape[1]
            each["position_ids"] = torch.arange(length)[None]
            bounds = torch.tensor([0, length], dtype=torch.int32)
            each |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            each |= {"max_length_q": length, "max_length_k": length}
        return batch

    trainer.data_collator = collate_as_one


def each_attention(bench: Bench) -> Outcome:
    """Every other attention that packing could choose here, each by its name."""
    choose, names = packing._candidates, list[str]()

    def remember(*arguments: Any) -> list[str]:
        names[:] = choose(*arguments)
        return names[-1:]

    rows = _rows(bench).but(split=(ROWS, 1))
    with switched(packing, _candidates=remember):
        steps = {"": one_step(bench, rows)}
    steps = {steps[""].attention: steps[""]}
    for name in names[:-1]:
        if name != _packed(bench).attention:
            with switched(packing, _candidates=lambda *_, name=name: [name]):
                steps[name] = one_step(bench, rows)
    alone, tolerance = _alone(bench).gradients or {}, TOLERANCE[compute_dtype()]
    off = {name: difference(step.gradients or {}, alone) for name, step in steps.items()}
    words = ", ".join(f"{name} {value:.2g}" for name, value in off.items())
    return Outcome.of_check(max(off.values()) <= tolerance, words, {"differences": off})


def checkpointing_as_none(bench: Bench) -> Outcome:
    """Activations computed again in the backward pass, and kept."""
    rows = _rows(bench).but(split=(ROWS, 1), checkpointing=True)
    return same(one_step(bench, rows), _packed(bench))


def one_pass_as_eight(bench: Bench) -> Outcome:
    """A step of one pass of eight padded rows, and of eight passes of one."""
    rows = _rows(bench).but(split=(ROWS, 1), settings={"packing": False})
    return same(one_step(bench, rows), _alone(bench))


def fused_as_unfused(bench: Bench) -> Outcome:
    """TRL's output layer and loss, in tiles by Triton, and PyTorch's cross entropy.

    With rows held out, so that an evaluation takes both ways as well.
    """
    rows = replace(_rows(bench), lengths=_rows(bench).lengths[-4:]).but(split=(2, 2), held_out=1)
    fused: list[bool] = []
    one = one_step(bench, rows, lambda t: fused.append(t.fused_head), interpret=True)
    if not fused[0]:
        return Outcome.left_out("Triton runs here neither on a GPU nor interpreted")
    other = one_step(bench, rows, unfuse)
    return same(one, other, evaluations=[one.evaluations, other.evaluations])


def adapters_as_plain(bench: Bench) -> Outcome:
    """The adapter of a layer as one operation, which a GPU's training takes, and PEFT's own.

    With dropout, whose numbers the backward pass has to draw again.
    """
    fused: list[bool] = []
    rows = _rows(bench).but(split=(ROWS, 1), dropout=0.05)

    def fuse(trainer: RecipeTrainer) -> None:
        fused.append(lora.fuse_adapters(model_of(trainer), bench.device))

    with switched(sft, fuse_adapters=lambda *_: False):
        plain = one_step(bench, rows)
        one = one_step(bench, rows, fuse)
    return same(one, plain, fused=fused) if fused[0] else Outcome.of_check(False, "left out", {})


def optimizer_as_plain(bench: Bench) -> Outcome:
    """The recipe's AdamW, and PyTorch's other one: the adapters after some steps."""
    first = _straight(bench)
    other = FUSED if first.optimizer == PLAIN else PLAIN
    arguments = sft.arguments

    def changed(*given: Any, **options: Any) -> Any:
        made = arguments(*given, **options)
        made.optim = other
        return made

    with switched(sft, arguments=changed):
        second = _train(bench, _trained(bench), "other-optimizer")
    names = {"optimizers": [first.optimizer, second.optimizer]}
    return same_adapters(first.adapter, second.adapter, **names)


def resumed_as_straight(bench: Bench) -> Outcome:
    """A training that is told to stop in between and goes on, and one that isn't."""
    straight = _straight(bench).adapter
    work = make_work(bench, _trained(bench), "resumed")

    def stop(state: Any, _: Any) -> None:
        if state.global_step == bench.scale.check_steps // 2:
            signal.raise_signal(signal.SIGTERM)

    try:
        fine_tune(work, lambda trainer: trainer.add_callback(on_step_end(stop)))
    except InterruptedTrainingError as stopped:
        work = work.model_copy(update={"resume_from": stopped.checkpoint})
        step = stopped.step
    else:
        return Outcome.of_check(False, "it did not stop", {})
    fine_tune(work)
    return same_adapters(read_adapter(work), straight, stopped_at=step)


def qlora_trains(bench: Bench) -> Outcome:
    """In 4 bits, a row is learnt by heart."""
    if missing := missing_for_qlora():
        return Outcome.left_out(missing)
    steps = 20
    ask = Ask(
        lengths=(bench.scale.longest // 2,) * (2 * steps),
        settings={
            "method": "qlora",
            "learningRate": 0.01,
            "loggingSteps": 1,
            "batchSize": 2,
            "gradientAccumulationSteps": 1,
            "lora": {"dropout": 0, "targetModules": ALL_LINEAR},
        },
        split=(2, 1),
        same_row=True,
    )
    held: list[str] = []

    def look(trainer: RecipeTrainer) -> None:
        weights = list(model_of(trainer).parameters())
        held.append(str({str(w.dtype) for w in weights if w.requires_grad}))
        held.append(str(sum(type(w).__name__ == "Params4bit" for w in weights)))

    trained = fine_tune(make_work(bench, ask, "qlora"), look)
    losses = [entry.loss for entry in trained.history if entry.loss is not None]
    fallen = losses[0] - losses[-1]
    figures = {"losses": losses, "adapter": held[0], "weights_in_4_bits": int(held[1])}
    return Outcome.of_check(
        fallen >= LEARNT and int(held[1]) > 0,
        f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps",
        figures,
    )


def _trained(bench: Bench) -> Ask:
    """A training of some steps, with dropout, whose random numbers a resume has to bring back."""
    batch = 2
    return Ask(
        lengths=tuple(even_lengths(batch * bench.scale.check_steps, bench.scale.longest)),
        settings={
            "batchSize": batch,
            "gradientAccumulationSteps": 1,
            "learningRate": 1e-3,
            "loggingSteps": 1,
        },
        split=(batch, 1),
    )


@dataclass
class Whole:
    """A whole training."""

    adapter: Tensors
    optimizer: str


def _straight(bench: Bench) -> Whole:
    found: Whole = bench.once("straight", lambda: _train(bench, _trained(bench), "straight"))
    return found


def _train(bench: Bench, ask: Ask, name: str) -> Whole:
    work, optimizers = make_work(bench, ask, name), list[str]()
    fine_tune(work, lambda trainer: optimizers.append(optimizer_of(trainer)))
    return Whole(read_adapter(work), optimizers[0])


def same_adapters(one: Tensors, other: Tensors, **figures: Any) -> Outcome:
    tolerance = TOLERANCE[compute_dtype()]
    equal = all(torch.equal(one[name], other[name]) for name in other)
    found = difference(one, other)
    words = "bit for bit" if equal else f"{found:.2g} of {tolerance:g}"
    figures |= {"bit_for_bit": equal, "difference": found, "tolerance": tolerance}
    return Outcome.of_check(found <= tolerance and _moved(other), words, figures)


def _moved(adapter: Tensors) -> bool:
    """Whether it was trained at all: the second matrices begin as zeros."""
    return any(bool(value.any()) for name, value in adapter.items() if "lora_B" in name)
