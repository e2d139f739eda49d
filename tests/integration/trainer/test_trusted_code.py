"""A model with code of its own, which looks for the keys of store and Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.model import ModelFolder
from finetune_trainer.model.tokenizer import load_tokenizer
from tests.integration.trainer.conftest import Trainer

KEYS = {
    "FINETUNE_HUB_TOKEN": "hf_a_token_for_pushing",
    "FINETUNE_MODEL_AWS_SECRET_ACCESS_KEY": "a-key-of-another-store",
    "HF_TOKEN": "hf_a_token_of_the_hub",
    "WANDB_API_KEY": "a-key-of-a-tracker",
}
CODE = """
import json, os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig

class TheirTokenizer(PreTrainedTokenizerFast):
    pass

with open({seen!r}, "a") as file:
    print(json.dumps(dict(os.environ)), file=file)
"""


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """What the model's code has seen: a line for each time that it was run."""
    return tmp_path / "seen.jsonl"


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path, seen: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / "theirs.py").write_text(CODE.format(seen=str(seen)))
    update(
        folder / "config.json",
        model_type="theirs",
        architectures=["TheirModel"],
        auto_map={
            "AutoConfig": "theirs.TheirConfig",
            "AutoModelForCausalLM": "theirs.TheirModel",
        },
    )
    return folder


def update(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_no_process_that_runs_it_has_a_key(
    trainer: Trainer, run_config: dict[str, Any], base: Path, seen: Path
) -> None:
    spec = run_config | {
        "model": {"source": str(base), "trustRemoteCode": True},
        "training": run_config["training"] | {"epochs": 1},
        "export": {"gguf": [], "merged": True},
    }
    trainer.environment |= KEYS
    for stage in ("prepare", "train", "export"):
        done = trainer(stage, spec)
        assert done.code == 0, done.output
        assert done.result is not None
        if done.result.resolved:
            spec["resolved"] = done.result.resolved.model_dump(mode="json")

    environments = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(environments) == 3, "the training, the reference and the samples"
    keys = {trainer.environment["AWS_SECRET_ACCESS_KEY"], *KEYS.values()}
    assert [name for found in environments for name in found if found[name] in keys] == []


# Root may read every environment, by any of these; without them it is like any other user.
READING = "-sys_ptrace,-perfmon,-sys_admin"
LIKE_A_USER = ["setpriv", f"--bounding-set={READING}", f"--inh-caps={READING}"]
LOOK = """
def environment_of(process):
    try:
        with open(f"/proc/{{process}}/environ") as file:
            return file.read()
    except OSError:
        return None

found = {{process: environment_of(process) for process in os.listdir("/proc") if process.isdigit()}}
with open({found!r}, "w") as file:
    json.dump(
        {{
            "parent": str(os.getppid()),
            "read": [process for process, text in found.items() if text is not None],
            "keys": [process for process, text in found.items() if text and {key!r} in text],
            "own": str(os.getpid()),
        }},
        file,
    )
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_the_training_finds_no_key_in_the_environment_of_any_process(
    trainer: Trainer, run_config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    key = uuid.uuid4().hex  # in no other process of this machine
    trainer.environment |= dict.fromkeys(KEYS, key)
    found = tmp_path / "found.json"
    with (base / "theirs.py").open("a") as file:
        file.write(LOOK.format(found=str(found), key=key))
    spec = run_config | {
        "model": {"source": str(base), "trustRemoteCode": True},
        "training": run_config["training"] | {"epochs": 1},
        "export": {"gguf": [], "merged": True},
    }
    prepared = trainer("prepare", spec)
    assert prepared.result is not None, prepared.output
    assert prepared.result.resolved is not None, prepared.output
    spec["resolved"] = prepared.result.resolved.model_dump(mode="json")
    # Not a fork: what /proc shows is what a process was started with.
    done = subprocess.run(
        [*(LIKE_A_USER if os.geteuid() == 0 else []), *trainer.command("train", spec)],
        env=trainer.full_environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(found.read_text())
    assert seen["own"] in seen["read"]
    assert seen["parent"] not in seen["read"]
    assert seen["keys"] == []


def test_a_tokenizer_runs_it_only_where_it_is_made_of_it(base: Path, seen: Path) -> None:
    tokenizer = load_tokenizer(ModelFolder(base, trust_remote_code=True))
    assert tokenizer("kettle")["input_ids"]
    assert not seen.exists()
    update(
        base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "theirs.TheirTokenizer"]}
    )
    tokenizer = load_tokenizer(ModelFolder(base, trust_remote_code=True))
    assert type(tokenizer).__name__ == "TheirTokenizer"
    assert seen.exists()


STEAL = """
try:
    print("read:", open({token!r}).read())
except PermissionError:
    print("refused")
"""
LOAD = """
import sys, torch
from pathlib import Path
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.{module} import {function}
from finetune_trainer.runtime import child
child.SECRETS = Path(sys.argv[2])
{function}(ModelFolder(Path(sys.argv[1]), trust_remote_code=True){rest})
"""


@pytest.mark.parametrize(
    ("module", "function", "rest"),
    [("loading", "load_model", ", torch.float32, 'cpu'"), ("adapter", "build_empty", "")],
)
def test_it_can_not_read_the_tokens_of_the_pod_s_identity(
    module: str, function: str, rest: str, base: Path, tmp_path: Path
) -> None:
    token = tmp_path / "secrets" / "eks.amazonaws.com" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("of the pod")
    hub = tmp_path / "hub"
    hub.mkdir()
    with (base / "theirs.py").open("a") as file:
        file.write(STEAL.format(token=str(token)))
    code = LOAD.format(module=module, function=function, rest=rest)
    done = subprocess.run(
        [sys.executable, "-c", code, str(base), str(tmp_path / "secrets")],
        env={**os.environ, "HF_HOME": str(hub)},
        capture_output=True,
        check=False,
        text=True,
    )
    if "no Landlock" in done.stderr:
        pytest.skip("this kernel has no Landlock")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"]
