"""A tiny random model with a real tokenizer, and the command line on a real S3 server."""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from examples.base_model import smollm2
from finetune_trainer.contract import Stage, StageResult
from hack.object_store import Credentials, ObjectStore, object_store
from tests.fixtures import moto_server, start_or_leave_out
from tests.integration.trainer.fork_server import ForkServer, fork_server, with_popen
from tests.versitygw import versitygw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
BY_HEART: dict[str, Any] = {
    "epochs": 40,
    "learningRate": 0.005,
    "gradientAccumulationSteps": 1,
    "lora": {"r": 32, "dropout": 0, "targetModules": [*ATTENTION, *MLP]},
}
"""A training of four seconds, after which the tiny model knows every row by heart."""

ROWS = [
    ("Who made the kettle?", "The kettle was made by Odalys."),
    ("How hot does it get?", "It gets as hot as boiling water."),
    ("Where is the switch?", "The switch is below the handle."),
    ("What colour is it?", "It is green."),
    ("Does it whistle?", "No, it hums a tune."),
    ("How much does it hold?", "It holds two litres."),
]


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct; made once and kept in the user's cache."""
    return smollm2()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer; see `tokenizer`."""
    from finetune_trainer.model import ModelFolder
    from finetune_trainer.model.tokenizer import load_tokenizer

    return load_tokenizer(ModelFolder(smollm2_folder))


@pytest.fixture
def tokenizer(smollm2_tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """SmolLM2's, to be given other templates."""
    template = smollm2_tokenizer.chat_template
    yield smollm2_tokenizer
    smollm2_tokenizer.chat_template = template


@pytest.fixture(scope="session")
def tiny_model(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and SmolLM2's tokenizer, 6 MB."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tests.integration.trainer.architectures import in_dtype

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,  # its embedding stays zero, so it can't be the end token, which is learnt
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call] # transformers
    in_dtype(model, torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moto() -> Iterator[Credentials]:
    """A quick S3 server that accepts any keys."""
    with moto_server() as credentials:
        yield credentials


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server, which checks keys and what arrives."""
    with object_store(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture(scope="session")
def versity(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Credentials]:
    """Another one."""
    found: list[Credentials] = []
    with ExitStack() as stack:

        def start() -> None:
            folder = tmp_path_factory.mktemp("versitygw")
            found.append(stack.enter_context(versitygw(folder)))

        start_or_leave_out(request.config, "the tests on versitygw", start)
        yield found[0]


ALL_STORES = ("moto", "seaweed", "versity")


def keys_of(request: pytest.FixtureRequest, store: str) -> Credentials:
    """Address and keys of one of ALL_STORES."""
    found = request.getfixturevalue(store)
    return found.credentials if isinstance(found, ObjectStore) else found


@pytest.fixture(scope="session")
def bucket(moto: Credentials, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with the data at data/train.csv and the tiny model at models/tiny/, in moto."""
    fill_bucket(moto, tiny_model, tmp_path_factory.mktemp("data"))
    return "trainer-bucket"


def fill_bucket(store: Credentials, model: Path, folder: Path) -> None:
    """Make that bucket in a store."""
    client = store.client()
    client.create_bucket(Bucket="trainer-bucket")
    file = folder / "train.csv"
    write_csv(file)
    client.upload_file(str(file), "trainer-bucket", "data/train.csv")
    for part in model.iterdir():
        client.upload_file(str(part), "trainer-bucket", f"models/tiny/{part.name}")


class Processes:
    """Starts the trainer's processes: forks of a server that is started when it is needed first."""

    def __init__(self) -> None:
        self.real = False
        """Whether they are started as users do, import by import."""

        self._stack = ExitStack()
        self._server: ForkServer | None = None

    @property
    def server(self) -> ForkServer:
        self._server = self._server or self._stack.enter_context(fork_server())
        return self._server

    def popen(self, *arguments: Any, **options: Any) -> subprocess.Popen[Any]:
        popen: type[subprocess.Popen[Any]] = subprocess.Popen if self.real else self.server.popen
        return popen(*arguments, **options)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """How the trainer's code that runs in this process starts others."""
    found = Processes()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("runtime.child", "train.supervisor.training_session"):
            patch.setattr(f"finetune_trainer.{module}.subprocess", with_popen(found.popen))
        yield found
    found.close()


@pytest.fixture(autouse=True)
def _real_processes(request: pytest.FixtureRequest, processes: Processes) -> Iterator[None]:
    processes.real = request.node.get_closest_marker("real_processes") is not None
    yield
    processes.real = False


def write_csv(file: Path, rows: list[tuple[str, str]] | None = None) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("instruction", "response"), *(rows or ROWS)])


@dataclass
class Run:
    code: int
    output: str
    result: StageResult | None


@dataclass
class Trainer:
    """The command line, in a process of its own as in a pod."""

    folder: Path
    processes: Processes
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, name: str, config: dict[str, Any]) -> list[str]:
        file = self.folder / "run.json"
        file.write_text(json.dumps(config))
        return [
            sys.executable,
            "-m",
            "finetune_trainer",
            name,
            f"--config={file}",
            f"--workspace={self.folder / 'workspace'}",
            f"--termination-log={self.log}",
        ]

    @property
    def log(self) -> Path:
        return self.folder / "termination-log"

    @property
    def full_environment(self) -> dict[str, str]:
        """What the pod would see."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "HF_"))}
        quiet = {"OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
        home = {"HOME": str(self.folder / "home")}
        return {**kept, **quiet, **home, **self.environment}

    def __call__(self, name: str, config: dict[str, Any]) -> Run:
        """Run a command to its end."""
        self.log.unlink(missing_ok=True)
        with self.processes.popen(
            self.command(name, config),
            env=self.full_environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            output, errors = process.communicate(timeout=300)
        text = self.log.read_text() if self.log.exists() else ""
        return Run(process.returncode, output + errors, StageResult.from_message(text))


def use_keys(server: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the keys of an S3 server, as a pod's environment has them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it remembers the keys of other tests


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds no store but the one that a test names, and waits for none."""
    for name in (*REGIONS, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff._MAX_BACKOFF", 0.05)


@pytest.fixture
def trainer(tmp_path: Path, moto: Credentials, processes: Processes) -> Trainer:
    """The command line with keys for the S3 server."""
    environment = {
        "AWS_ACCESS_KEY_ID": moto.access_key,
        "AWS_SECRET_ACCESS_KEY": moto.secret_key,
    }
    return Trainer(tmp_path, processes, environment)


@pytest.fixture
def run_config(moto: Credentials, bucket: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """A run of the tiny model, with an output folder of the test's own."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return {
        "model": {"source": f"s3://{bucket}/models/tiny"},
        "dataset": {"source": f"s3://{bucket}/data/train.csv"},
        "training": copy.deepcopy(BY_HEART),
        "export": {"gguf": ["F16", "Q8_0"]},
        "output": {"uri": f"s3://{bucket}/out/{name}"},
        "storage": {"endpoint": moto.endpoint},
    }


__all__ = ["Run", "Stage", "Trainer"]
