"""`finetune-trainer local --set path=value`, without a training."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from finetune_trainer.__main__ import app as trainer
from finetune_trainer.contract import Reason, StageError
from finetune_trainer.local import app
from finetune_trainer.local.fields import (
    FLAGS,
    apply_settings,
    in_local_words,
    settable_fields,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("dataset.onInvalidRow=skip", {"dataset": {"onInvalidRow": "skip"}}),
        ("dataset.maxInvalidRows=5", {"dataset": {"maxInvalidRows": 5}}),
        ("dataset.maxInvalidRows=5%", {"dataset": {"maxInvalidRows": "5%"}}),
        ("dataset.systemPrompt=a=b, c", {"dataset": {"systemPrompt": "a=b, c"}}),
        ("dataset.columns.response=2024", {"dataset": {"columns": {"response": "2024"}}}),
        ("model.trustRemoteCode=true", {"model": {"trustRemoteCode": True}}),
        ("training.epochs=auto", {"training": {"epochs": "auto"}}),
        ("training.epochs=5", {"training": {"epochs": 5}}),
        ("training.learningRate=1e-3", {"training": {"learningRate": 1e-3}}),
        ("training.learning_rate=1e-3", {"training": {"learningRate": 1e-3}}),
        ("training.packing=false", {"training": {"packing": False}}),
        ("training.evalSteps=null", {"training": {"evalSteps": None}}),
        ("training.lora.r=4", {"training": {"lora": {"r": 4}}}),
        (
            "training.lora.targetModules=q_proj,v_proj",
            {"training": {"lora": {"targetModules": ["q_proj", "v_proj"]}}},
        ),
        ("training.reportTo=", {"training": {"reportTo": []}}),
        (
            "training.earlyStopping.patience=3",
            {"training": {"earlyStopping": {"patience": 3}}},
        ),
        (
            'training.earlyStopping={"patience": 3}',
            {"training": {"earlyStopping": {"patience": 3}}},
        ),
        (
            'export.qualityLimits=[{"quantization": "Q8_0", "maxKLDivergence": 0.1}]',
            {"export": {"qualityLimits": [{"quantization": "Q8_0", "maxKLDivergence": 0.1}]}},
        ),
    ],
)
def test_a_value_is_read_by_the_fields_type(setting: str, expected: dict[str, Any]) -> None:
    assert apply_settings({}, [setting]) == expected


def test_settings_keep_what_is_there_and_the_last_one_wins() -> None:
    fields = {"dataset": {"source": "a.csv"}, "training": {"earlyStopping": None}}
    given = ["training.seed=1", "training.earlyStopping.patience=3", "training.seed=2"]
    assert apply_settings(fields, given) == {
        "dataset": {"source": "a.csv"},
        "training": {"earlyStopping": {"patience": 3}, "seed": 2},
    }


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.packing", "write path=value, e.g. training.packing=false"),
        ("training.learningrate=1", "--set training.learningrate=1: there is no such field"),
        ("training.learningrate=1", "the nearest is --set training.learningRate."),
        ("learningRate=1", "the nearest is --set training.learningRate."),
        ("training.lora.rank=4", "the nearest is --set training.lora"),
        ("training.=1", "there is no such field"),
        ("output.uri=/x", "there is no such field"),
        ("job.name=x", "there is no such field"),
        ("--epochs=x", "--epochs: Input should be a valid integer"),
        ("--gguf=Q9", "--gguf: "),
        ("training.epochs=x", "--set training.epochs: Input should be a valid integer"),
        ("training.epochs=0", "training.epochs: must be a whole number from 1 to 1000, or auto"),
        ("training.learningRate=2", "training.learningRate: Input should be less than or equal"),
        ("training.learningRate=2", "(got 2). Peak learning rate of AdamW, above 0 and up to 1."),
        ("training.learningRate=fast", "should be a valid number"),
        ("training.scheduler=step", "'linear', 'cosine', 'constant' or 'constant_with_warmup'"),
        ("training.gpuMemory=24", "match pattern"),
        ("training.lora.targetModules=q-proj", "match pattern"),
        ("training.lora.targetModules=q_proj,all-linear", "must be all-linear alone, or names"),
        ('training.earlyStopping={"patience": 0}', "greater than or equal to 1"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(setting: str, said: str) -> None:
    with pytest.raises(StageError) as caught:
        apply_settings({}, [setting])
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert said in caught.value.message
    assert in_local_words(caught.value.message).startswith(caught.value.message.split(" ")[0])
    assert said in in_local_words(caught.value.message), "as it was given"


def test_only_the_parts_that_are_asked_for_can_be_set() -> None:
    assert apply_settings({}, ["export.gguf=Q8_0"], ["export"]) == {"export": {"gguf": ["Q8_0"]}}
    with pytest.raises(StageError, match=r"training\.seed=1: there is no such field"):
        apply_settings({}, ["training.seed=1"], ["export"])


def test_every_field_says_what_it_means() -> None:
    known = settable_fields()
    assert {"model.source", "dataset.columns.input", "training.lora.r", "hardware.gpus"} <= set(
        known
    )
    assert [path for path, field in known.items() if not field.description] == []
    assert known["training.loggingSteps"].default == "10"
    assert known["model.source"].default == ""


def test_a_field_that_needs_another_is_read_by_itself() -> None:
    """What both mean together shows when all settings are there."""
    given = ["training.lora.targetParameters=mlp.experts.down_proj", "training.lora.dropout=0"]
    lora = apply_settings({}, given)["training"]["lora"]
    assert lora == {"targetParameters": ["mlp.experts.down_proj"], "dropout": 0}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "base model and adapter diverge: lower spec.training.learningRate and train again.",
            "base model and adapter diverge: lower --learning-rate and train again.",
        ),
        (
            "The base model a/b (main) does not exist on the Hub, or it is private: correct "
            "spec.model.source, or name a Secret with a token that may read it in "
            "spec.model.tokenSecretRef.",
            "The base model a/b (main) does not exist on the Hub, or it is private: correct "
            "--base-model, or set HF_TOKEN to a token that may read it.",
        ),
        (
            "spec.training.parallelism: fsdp can't spread a model with it. Set it to ddp.",
            "training.parallelism: fsdp can't spread a model with it. Set it to ddp. (--set "
            "training.parallelism=… sets that field)",
        ),
        (
            "There are no credentials for s3://a/b: name a Secret with AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in spec.storage.secretRef, or use workload identity "
            "(spec.serviceAccountName).",
            "There are no credentials for s3://a/b: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY.",
        ),
        (
            "set stages.train.resources.limits.memory to at least 17Gi",
            "free 17Gi at least",
        ),
        (
            "The export needs 9Gi of memory, and there are 2Gi: set "
            "spec.stages.export.resources.limits.memory to at least 9Gi.",
            "The export needs 9Gi of memory, and there are 2Gi: free 9Gi at least.",
        ),
        (
            "there are 2Gi: set stages.export.resources.limits.ephemeral-storage (or the volume) "
            "to at least 9Gi.",
            "there are 2Gi: free at least 9Gi.",
        ),
        (
            "can't be written. Give the training's pod more ephemeral storage: three checkpoints",
            "can't be written. Free some disk: three checkpoints",
        ),
        (
            "The store refuses access to s3://a/b (AccessDenied): check that "
            "spec.serviceAccountName's identity (there is no spec.storage.secretRef) may read",
            "The store refuses access to s3://a/b (AccessDenied): check that the account of your "
            "AWS profile may read",
        ),
        (
            "did not pass the GPU on. Set spec.stages.train.runtimeClassName to the node's class "
            "for NVIDIA GPUs (usually nvidia), or make that the node's default runtime.",
            "did not pass the GPU on. Start the container with its GPUs (docker run --gpus all).",
        ),
        (
            "There is no model in /a/b: upload config.json",
            "There is no model in /a/b: put config.json",
        ),
        ("would do: a memory limit of 2Gi.", "would do: 2Gi of free memory."),
        ("There is no model in s3://a/b: upload config.json",) * 2,
        ("spec.training: must leave out lora", "training: must leave out lora"),
        ("step 10/120  epoch 3.33  loss 0.5", "step 10/120  epoch 3.33  loss 0.5"),
        ("/data/model.source.csv has 3 rows", "/data/model.source.csv has 3 rows"),
    ],
)
def test_messages_speak_of_flags_and_variables(message: str, said: str) -> None:
    assert in_local_words(message) == said


WORDS_OF_A_CLUSTER = re.compile(
    r"\bpods?\b|Secret|[Ee]phemeral|[sS]erviceAccount|\bstages\.|runtimeClass|\bnodes?\b"
)
NOT_HERE = (
    "export/publish/",  # nothing is pushed or signed
    "contract/output.py",
    "local/fields.py",
    "prepare/stored.py",  # no version is rolled back to
)


def test_no_message_of_the_trainer_speaks_of_a_cluster_here() -> None:
    """All text of its code, with X in place of what is filled in."""
    seen = 0
    for file in sorted((ROOT / "trainer" / "finetune_trainer").rglob("*.py")):
        if any(part in file.as_posix() for part in NOT_HERE):
            continue
        for line, text in _messages(file):
            seen += bool(WORDS_OF_A_CLUSTER.search(text))
            found = WORDS_OF_A_CLUSTER.search(in_local_words(text))
            assert found is None, f"{file}:{line}: {in_local_words(text)}"
    assert seen > 20, "the search finds them"


def _messages(file: Path) -> Iterator[tuple[int, str]]:
    """The sentences in a file that are no docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    passed_over = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    passed_over |= {id(part) for n in nodes if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in nodes:
        if id(node) in passed_over or not isinstance(node, ast.expr):
            continue
        text = ""
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        if " " in text:
            yield node.lineno, text


def test_every_flag_is_of_a_field_and_of_a_command() -> None:
    commands = {name: get_command(app).commands[name] for name in ("train", "gguf")}  # type: ignore[attr-defined]
    flags = {flag for command in commands.values() for each in command.params for flag in each.opts}
    assert set(FLAGS.values()) <= flags
    assert set(FLAGS) <= set(settable_fields())


@pytest.mark.parametrize(
    "words", [[], ["local"], ["local", "train"], ["local", "merge"], ["local", "gguf"], ["run"]]
)
def test_help_fits_a_screen(words: list[str]) -> None:
    shown = CliRunner().invoke(trainer, [*words, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) <= 40


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("gguf GGUF=Q4_K_M,Q8_0", 'local gguf --output "models" --gguf "Q4_K_M,Q8_0"'),
        ("train METHOD=qlora EPOCHS=3", '--epochs "3" --method "qlora"'),
    ],
)
def test_make_passes_its_variables_on(target: str, command: str) -> None:
    """`make --dry-run` prints what it would run."""
    made = subprocess.run(
        ["make", "--dry-run", *target.split()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = " ".join(made.stdout.replace("\\\n", " ").split())
    assert command in said
