"""The split of a step into passes: always the same effective batch, always within the memory."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.contract import Hardware, Reason, StageError, Training, TrainingPlan
from finetune_trainer.memory.plan import GPU_USEFUL, HOST_PROCESS, Lengths, plan
from finetune_trainer.memory.predict import Recipe, kept_by_layer, predict
from finetune_trainer.memory.remedies import Attempt
from finetune_trainer.model.shape import Shape
from tests.unit.trainer.test_memory_shape import shape

GIB = 2**30
EIGHT = "llama-3.1-8b"


def gpus(gib: float | None, count: int = 1) -> Hardware:
    memory = None if gib is None else round(gib * GIB)
    return Hardware(gpus=count, gpu_memory_bytes=memory)


def cpu(gib: float | None) -> Hardware:
    return Hardware(memory_bytes=None if gib is None else round(gib * GIB))


def brief(made: TrainingPlan) -> tuple[int, int, bool, str]:
    return (
        made.batch_size,
        made.gradient_accumulation_steps,
        made.gradient_checkpointing,
        made.parallelism,
    )


CHOICES = {
    # model, training, longest example, hardware -> micro-batch, accumulation, recomputed, how
    "an 8B model on 80 GiB keeps everything": (
        (EIGHT, {}, 512, gpus(80)),
        (8, 1, False, "none"),
    ),
    "on 24 GiB it computes again": ((EIGHT, {}, 512, gpus(24)), (8, 1, True, "none")),
    "on 20 GiB in smaller passes": ((EIGHT, {}, 2048, gpus(20.5)), (1, 8, True, "none")),
    "long examples make small passes": ((EIGHT, {}, 8192, gpus(48)), (1, 8, True, "none")),
    "a large effective batch is split": (
        (EIGHT, {"gradient_accumulation_steps": 64}, 512, gpus(80)),
        (16, 8, False, "none"),
    ),
    "a larger one makes larger passes where nothing is computed again": (
        ("llama-3.2-1b", {"gradient_accumulation_steps": 64}, 512, gpus(80)),
        (32, 4, False, "none"),
    ),
    "always computes again though there is room": (
        ("llama-3.2-1b", {"gradient_checkpointing": "always"}, 512, gpus(80)),
        (8, 1, True, "none"),
    ),
    "never keeps everything in smaller passes": (
        (EIGHT, {"gradient_checkpointing": "never"}, 512, gpus(22.5)),
        (1, 8, False, "none"),
    ),
    "qlora needs far less": ((EIGHT, {"method": "qlora"}, 512, gpus(12)), (8, 1, True, "none")),
    "each of two GPUs gets half the step": (
        ("llama-3.2-1b", {}, 512, gpus(80, 2)),
        (4, 1, False, "ddp"),
    ),
    "a model that one GPU does not hold is shared": (
        ("llama-3.3-70b", {}, 512, gpus(64, 4)),
        (2, 1, True, "fsdp"),
    ),
    "fsdp where it is asked for": (
        ("llama-3.2-1b", {"parallelism": "fsdp"}, 512, gpus(80, 2)),
        (4, 1, False, "fsdp"),
    ),
    "an unknown GPU: the spec's split, computed again": (
        (EIGHT, {}, 512, gpus(None)),
        (2, 4, True, "none"),
    ),
    "an unknown GPU, unless never": (
        (EIGHT, {"gradient_checkpointing": "never"}, 512, gpus(None)),
        (2, 4, False, "none"),
    ),
    "two unknown GPUs share the spec's step": (
        (EIGHT, {}, 512, gpus(None, 2)),
        (2, 2, True, "ddp"),
    ),
    "a CPU with room makes passes of 2,048 tokens": (
        ("smollm2-135m", {}, 256, cpu(16)),
        (8, 1, False, "none"),
    ),
    "a CPU with long examples": (("smollm2-135m", {}, 1024, cpu(16)), (2, 4, False, "none")),
    "a CPU with little memory": (("smollm2-135m", {}, 1024, cpu(3)), (1, 8, True, "none")),
    "a CPU of unknown memory: the spec's split": (
        ("smollm2-135m", {}, 256, cpu(None)),
        (2, 4, False, "none"),
    ),
}


@pytest.mark.parametrize("case", CHOICES.values(), ids=list(CHOICES))
def test_the_choice(case: tuple[tuple[str, dict[str, object], int, Hardware], object]) -> None:
    (model, training, longest, hardware), expected = case
    made = plan(Training.model_validate(training), shape(model), Lengths(longest), hardware)
    assert brief(made) == expected
    assert made.device_bytes


@pytest.mark.parametrize(("devices", "fewer"), [(3, 2), (5, 4), (16, 8)])
def test_gpus_that_can_not_share_a_step_evenly(devices: int, fewer: int) -> None:
    with pytest.raises(StageError) as raised:
        plan(Training(), shape(EIGHT), Lengths(512), gpus(80, devices))
    assert raised.value.reason is Reason.INVALID_CONFIG
    assert "8 examples (batchSize 2 x gradientAccumulationSteps 4)" in raised.value.message
    assert f"ask for {fewer} GPUs." in raised.value.message
    for number in re.findall(r"make it (\d+)(?: or (\d+))?", raised.value.message)[0]:
        assert not number or int(number) % devices == 0


trainings = st.builds(
    Training,
    method=st.sampled_from(["lora", "qlora", "full"]),
    batch_size=st.integers(1, 12),
    gradient_accumulation_steps=st.integers(1, 12),
    gradient_checkpointing=st.sampled_from(["auto", "always", "never"]),
    packing=st.booleans(),
)
models = st.sampled_from(["smollm2-135m", "llama-3.2-1b", EIGHT, "gemma-2-2b", "llama-3.3-70b"])
lengths = st.integers(16, 32_768)
sizes = st.floats(0.5, 200)


@settings(max_examples=150)
@given(trainings, models, lengths, sizes, st.sampled_from([0, 1, 2, 4]))
def test_a_plan_keeps_the_effective_batch_and_fits(
    training: Training, model: str, longest: int, gib: float, devices: int
) -> None:
    hardware = gpus(gib, devices) if devices else cpu(gib)
    refused: Reason | None = None
    try:
        made = plan(training, shape(model), Lengths(longest), hardware)
    except StageError as error:
        refused = error.reason
    if refused:
        full = Reason.OUT_OF_GPU_MEMORY if devices else Reason.OUT_OF_MEMORY
        assert refused in {full, Reason.INVALID_CONFIG}
        return
    batch = training.batch_size * training.gradient_accumulation_steps
    assert made.batch_size * made.gradient_accumulation_steps * max(devices, 1) == batch
    assert made.device_bytes is not None
    assert made.device_bytes <= gib * GIB
    assert made.batch_size == 1 or made.batch_size * longest <= GPU_USEFUL
    if training.gradient_checkpointing != "auto":
        assert made.gradient_checkpointing == (training.gradient_checkpointing == "always")


@settings(max_examples=150)
@given(trainings, models, lengths, st.tuples(sizes, sizes), st.booleans())
def test_more_memory_never_makes_a_pass_smaller(
    training: Training, model: str, longest: int, two: tuple[float, float], gpu: bool
) -> None:
    chosen = []
    for gib in sorted(two):
        try:
            hardware = gpus(gib) if gpu else cpu(gib)
            chosen.append(plan(training, shape(model), Lengths(longest), hardware).batch_size)
        except StageError:
            chosen.append(0)
    assert chosen[0] <= chosen[1]


@settings(max_examples=100)
@given(trainings, models, lengths, st.integers(1, 32), st.booleans())
def test_the_prediction_grows_with_passes_and_lengths(
    training: Training, model: str, longest: int, size: int, checkpointing: bool
) -> None:
    attempt = Attempt(training, shape(model), longest)
    assert attempt.needs(size, checkpointing) < attempt.needs(size + 1, checkpointing)
    longer = Attempt(training, shape(model), longest + 1)
    assert attempt.needs(size, checkpointing) < longer.needs(size, checkpointing)


def test_no_more_layers_are_computed_again_than_memory_asks_for() -> None:
    found = [plan(Training(), shape(EIGHT), Lengths(2048), gpus(gib)) for gib in range(24, 81, 4)]
    shares = [1 / each.recompute_every if each.gradient_checkpointing else 0 for each in found]
    assert len(set(shares)) > 3
    # As large as passes may be with recomputation, more memory goes to the layers.
    full = [share for share, made in zip(shares, found, strict=True) if made.pass_tokens == 8192]
    assert full == sorted(full, reverse=True)
    assert 0 < min(full) < 1
    always = Training(gradient_checkpointing="always")
    assert plan(always, shape(EIGHT), Lengths(2048), gpus(48)).recompute_every == 1


def test_a_layer_that_is_not_computed_again_counts_as_a_whole() -> None:
    eight, lora = shape(EIGHT), Training()
    kept, again = (Recipe.on_gpu(lora, checkpointing=on) for on in (False, True))
    needs = [
        predict(eight, replace(again, recompute_every=every), 2048).activations
        for every in (1, 2, 4, 8)
    ]
    assert needs == sorted(needs)
    assert needs[-1] < predict(eight, kept, 2048).activations
    # Of 32 layers 16 keep what they computed; each of those keeps its input as a part of that.
    layer = 2048 * (kept_by_layer(eight, kept) - 2 * eight.hidden)
    assert needs[1] - needs[0] == pytest.approx(16 * layer, rel=1e-6)


GEMMA2_9B = Shape(
    "gemma2", 42, 3584, 4096, 2048, 14_336, 256_000, tied=True, head=256, norms=4, capped=True
)


def refusal(training: Training, model: str, longest: int, hardware: Hardware) -> StageError:
    with pytest.raises(StageError) as raised:
        plan(training, shape(model), Lengths(longest), hardware)
    return raised.value


def test_a_training_that_does_not_fit_says_what_would() -> None:
    error = refusal(Training(), EIGHT, 2048, gpus(12))
    assert error.reason is Reason.OUT_OF_GPU_MEMORY
    assert error.message == (
        "The training needs 17.0 GiB of GPU memory with one example of 2048 tokens a pass, and the "
        "GPU has 12.0 GiB. Any of these would do: method: qlora (7.5 GiB); 4 such GPUs, which "
        "share the model (fsdp, 8.4 GiB each); a GPU with 24 GiB; a model of at most 4 billion "
        "parameters."
    )


def test_all_weights_take_18_bytes_each_and_are_shared_by_gpus() -> None:
    """4 + 2 of the weights, 4 of the gradients, 8 of AdamW: as transformers' documentation counts
    mixed precision (Model memory anatomy)."""
    full, eight = Training(method="full"), shape(EIGHT)
    alone = predict(eight, Recipe.on_gpu(full, checkpointing=True), 1)
    assert (alone.weights + alone.adapter) / eight.parameters == pytest.approx(18, abs=0.3)
    shared = predict(eight, Recipe.on_gpu(full, checkpointing=True, shards=8), 1)
    assert alone.weights + alone.adapter > 5 * (shared.weights + shared.adapter)
    together = predict(eight, Recipe.on_gpu(full, checkpointing=True, buckets=True), 1)
    more = 4 * (eight.parameters - eight.vocabulary * eight.hidden)
    assert together.adapter - alone.adapter == pytest.approx(more)
    assert brief(plan(full, shape("llama-3.2-1b"), Lengths(2048), gpus(40)))[3] == "none"
    assert brief(plan(full, eight, Lengths(2048), gpus(80, 4)))[3] == "fsdp"


def test_what_all_weights_do_not_fit_says_that_an_adapter_would() -> None:
    error = refusal(Training(method="full"), EIGHT, 2048, gpus(40))
    assert "method: lora (17.0 GiB)" in error.message
    assert "8 such GPUs, which share the model" in error.message
    error = refusal(Training(method="full"), EIGHT, 2048, gpus(12))
    assert "method: qlora" in error.message


@pytest.mark.parametrize(
    ("stopping", "count", "numbers"), [({}, 1, 4), ({"early_stopping": {}}, 1, 8), ({}, 4, 8)]
)
def test_all_weights_pass_through_the_pods_memory(
    stopping: dict[str, Any], count: int, numbers: int
) -> None:
    """When they are saved; with fsdp AdamW's moments as well, which are twice as large."""
    full = Training.model_validate({"method": "full", **stopping})
    name = EIGHT if count > 1 else "llama-3.2-1b"
    need = count * HOST_PROCESS + numbers * shape(name).parameters
    enough = Hardware(gpus=count, gpu_memory_bytes=80 * GIB, memory_bytes=need)
    plan(full, shape(name), Lengths(512), enough)
    with pytest.raises(StageError, match="memory beside that of the GPUs"):
        plan(full, shape(name), Lengths(512), enough.model_copy(update={"memory_bytes": need - 1}))


def test_a_shorter_sequence_is_named_where_it_helps() -> None:
    error = refusal(Training(method="qlora"), EIGHT, 65_536, gpus(24))
    length = re.search(r"maxSequenceLength: (\d+)", error.message)
    assert length is not None
    made = plan(Training(method="qlora"), shape(EIGHT), Lengths(int(length[1])), gpus(24))
    assert made.batch_size == 1
    assert "method:" not in error.message


def test_recomputation_is_named_where_the_spec_forbids_it() -> None:
    never = Training(gradient_checkpointing="never")
    error = refusal(never, EIGHT, 4096, gpus(24))
    assert "gradientCheckpointing: auto" in error.message


def test_what_would_not_help_is_not_named() -> None:
    error = refusal(Training(parallelism="ddp"), "llama-3.3-70b", 2048, gpus(0.5))
    assert "method" not in error.message
    assert "maxSequenceLength" not in error.message


def test_a_pod_without_gpu_is_told_its_limit() -> None:
    error = refusal(Training(), EIGHT, 1024, cpu(8))
    assert error.reason is Reason.OUT_OF_MEMORY
    limit = re.search(r"a memory limit of (\d+)Gi", error.message)
    assert limit is not None
    assert plan(Training(), shape(EIGHT), Lengths(1024), cpu(int(limit[1]))).batch_size == 1


def test_what_only_a_cpu_with_bfloat16_can_train_is_not_refused() -> None:
    made = plan(Training(), shape(EIGHT), Lengths(512), cpu(24))
    assert brief(made) == (1, 8, True, "none")


@pytest.mark.parametrize(
    ("training", "gib", "need"), [({}, 1, "2Gi"), ({"parallelism": "fsdp"}, 16, "17Gi")]
)
def test_a_pod_with_gpus_needs_memory_of_its_own(
    training: dict[str, str], gib: int, need: str
) -> None:
    hardware = gpus(80, 2).model_copy(update={"memory_bytes": gib * GIB})
    error = refusal(Training.model_validate(training), EIGHT, 512, hardware)
    assert error.reason is Reason.OUT_OF_MEMORY
    assert f"limits.memory to at least {need}" in error.message


def test_a_model_that_auto_spreads_over_gpus_passes_through_the_pods_memory() -> None:
    """As where fsdp is asked for by name."""
    enough = gpus(80, 8).model_copy(update={"memory_bytes": 200 * GIB})
    assert plan(Training(), shape("llama-3.3-70b"), Lengths(2048), enough).parallelism == "fsdp"
    short = enough.model_copy(update={"memory_bytes": 64 * GIB})
    error = refusal(Training(), "llama-3.3-70b", 2048, short)
    assert error.reason is Reason.OUT_OF_MEMORY
    assert "limits.memory to at least 140Gi" in error.message


def test_a_model_in_4_bits_is_spread_over_small_gpus() -> None:
    """Each process reads all of it into the pod's memory, for itself: 4 times 37 GiB and more."""
    spec, four = Training(method="qlora"), gpus(24, 4)
    made = plan(spec, shape("llama-3.3-70b"), Lengths(1024), four)
    assert made.parallelism == "fsdp"
    assert 15 * GIB < (made.device_bytes or 0) < 24 * GIB
    short = four.model_copy(update={"memory_bytes": 128 * GIB})
    error = refusal(spec, "llama-3.3-70b", 1024, short)
    assert error.reason is Reason.OUT_OF_MEMORY
    assert "limits.memory to at least 152Gi" in error.message


def test_modules_that_are_trained_as_a_whole_count_and_stay_on_each_gpu() -> None:
    """An embedding: weights, gradients and two moments in float32, and a copy in 16 bits."""
    training = Training.model_validate({"lora": {"modulesToSave": ["embed_tokens"]}})
    plain, whole = (
        plan(each, shape(EIGHT), Lengths(512), gpus(80, 2)) for each in (Training(), training)
    )
    assert whole.parallelism == "ddp"
    more = (whole.device_bytes or 0) - (plain.device_bytes or 0)
    assert (plain.batch_size, plain.gradient_checkpointing) == (
        whole.batch_size,
        whole.gradient_checkpointing,
    )
    assert more == pytest.approx(18 * 128_256 * 4096, rel=0.01)


def test_scores_that_are_capped_make_passes_smaller() -> None:
    """9 billion parameters by qlora in 24 GiB."""
    spec = Training.model_validate({"method": "qlora", "batchSize": 4})
    free = replace(GEMMA2_9B, capped=False)
    assert plan(spec, free, Lengths(2048), gpus(24)).batch_size == 4
    # Laid end to end, each row would be scored against all others as well.
    assert plan(spec, GEMMA2_9B, Lengths(2048), gpus(24)).batch_size == 2
    padded = spec.model_copy(update={"packing": False})
    needs = [
        plan(padded, each, Lengths(2048), gpus(24)).device_bytes or 0 for each in (free, GEMMA2_9B)
    ]
    assert needs[1] > needs[0] + 4 * GIB * 0.9


@settings(max_examples=150)
@given(trainings, models, lengths, sizes)
def test_every_suggestion_fits(training: Training, model: str, longest: int, gib: float) -> None:
    try:
        plan(training, shape(model), Lengths(longest), gpus(gib))
    except StageError as error:
        said = error.message
    else:
        return
    other = training.model_copy(update={"batch_size": 8, "gradient_accumulation_steps": 1})
    if "method: qlora" in said:
        changed = other.model_copy(update={"method": "qlora"})
        assert plan(changed, shape(model), Lengths(longest), gpus(gib))
    if "gradientCheckpointing: auto" in said:
        changed = other.model_copy(update={"gradient_checkpointing": "auto"})
        assert plan(changed, shape(model), Lengths(longest), gpus(gib))
    if found := re.search(r"maxSequenceLength: (\d+)", said):
        assert plan(other, shape(model), Lengths(int(found[1])), gpus(gib))
    if found := re.search(r"(\d) such GPUs", said):
        assert plan(other, shape(model), Lengths(longest), gpus(gib, int(found[1])))
    if found := re.search(r"a GPU with (\d+) GiB", said):
        assert plan(other, shape(model), Lengths(longest), gpus(int(found[1])))


def test_the_answers_alone_decide_on_the_logits_where_rows_are_packed() -> None:
    many = Lengths(1024, longest_answer=1024)
    few = Lengths(1024, longest_answer=10)
    packed, padded = Training(), Training(packing=False)
    one = shape("smollm2-135m")
    assert (plan(packed, one, few, cpu(64)).device_bytes or 0) < (
        plan(packed, one, many, cpu(64)).device_bytes or 0
    )
    assert plan(padded, one, few, cpu(64)) == plan(padded, one, many, cpu(64))


@pytest.mark.parametrize("hardware", [gpus(80), cpu(100)], ids=["a GPU", "a CPU"])
def test_a_pair_of_answers_takes_what_two_rows_take(hardware: Hardware) -> None:
    """Of dpo and orpo; with kto a row is one answer, and the reference keeps nothing."""
    attempt = Attempt(Training(), shape(EIGHT), 1024, cpu=not hardware.gpus)
    for objective, rows in (("dpo", 2), ("orpo", 2), ("kto", 1)):
        other = attempt.changed(objective=objective)
        assert other.needs(1, checkpointing=True) == attempt.needs(rows, checkpointing=True)
        of_answers = plan(Training(), shape(EIGHT), Lengths(1024), hardware)
        chosen = plan(Training(objective=objective), shape(EIGHT), Lengths(1024), hardware)
        assert chosen.batch_size * rows <= max(of_answers.batch_size, rows)
        assert chosen.batch_size * chosen.gradient_accumulation_steps == 8


@settings(max_examples=100)
@given(trainings, models, lengths, sizes, st.booleans())
def test_the_tokens_of_a_pass_fit_as_its_examples_do(
    training: Training, model: str, longest: int, gib: float, gpu: bool
) -> None:
    hardware = gpus(gib) if gpu else cpu(gib)
    try:
        made = plan(training, shape(model), Lengths(longest), hardware)
    except StageError:
        return
    if made.gradient_accumulation_steps == 1:
        assert made.pass_tokens is None
    if made.pass_tokens is None:
        return
    assert made.pass_tokens <= max(GPU_USEFUL, longest)
    every = made.recompute_every
    assert every == 1 or (made.gradient_checkpointing and training.gradient_checkpointing == "auto")
    attempt = Attempt(training, shape(model), longest, recompute_every=every)
    # Of a CPU, what fits at least in one type: all weights take less in float32, without a copy.
    kinds = [attempt] if gpu else [attempt.on_cpu(half=half) for half in (True, False)]
    needs = min(each.needs_for(made.pass_tokens, made.gradient_checkpointing) for each in kinds)
    assert needs <= (made.device_bytes or 0) <= gib * GIB


def test_a_pass_has_tokens_between_two_numbers_of_examples() -> None:
    """Three of the longest would fit, and 3 does not divide the step."""
    made = plan(Training(), shape(EIGHT), Lengths(2048), gpus(22.5))
    assert made.batch_size < 4
    assert made.pass_tokens is not None
    assert made.pass_tokens > made.batch_size * 2048
