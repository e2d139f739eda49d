"""A training that goes on from an adapter (training.initFrom)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune_trainer.contract import (
    Fingerprints,
    GateReport,
    Lineage,
    Lora,
    Manifest,
    PreparedRunConfig,
    Reason,
    RunConfig,
    StageError,
)
from finetune_trainer.model import ModelFolder, initial_adapter
from finetune_trainer.model.adapter import AdapterOutline, OutlineRequest, outline_here
from finetune_trainer.model.initial_adapter import InitialAdapter
from finetune_trainer.model.tokenizer import message_pair
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.train.link import Trained, TrainingWork
from finetune_trainer.train.recipe import sft
from hack.object_store import Credentials
from tests.integration.trainer.conftest import ROWS
from tests.integration.trainer.hub_server import COMMIT, hub_server
from tests.integration.trainer.recipe import make_work

EXAMPLES = [message_pair(*row) for row in ROWS]
LORA: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REVISION = "sha256:of-the-base"


@dataclass
class Earlier:
    """A training that is over."""

    work: TrainingWork
    trained: Trained


def work_of(model: Path, folder: Path) -> TrainingWork:
    folder.mkdir()
    return make_work(
        model,
        folder,
        EXAMPLES[:4],
        EXAMPLES[4:6],
        epochs=3,
        learningRate=0.01,
        gradientAccumulationSteps=1,
        lora=LORA,
    )


@pytest.fixture(scope="module")
def earlier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    work = work_of(tiny_model, tmp_path_factory.mktemp("earlier") / "first")
    return Earlier(work, sft.fine_tune(work, Reporter()))


@pytest.fixture
def adapter(earlier: Earlier, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(earlier.work.adapter, tmp_path / "adapter"))


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def outline(model: ModelFolder, lora: Lora) -> AdapterOutline:
        return outline_here(OutlineRequest(model=model, lora=lora))

    monkeypatch.setattr(initial_adapter, "outline_adapter", outline)


def run_config(
    model: Path, source: str | Path, lora: dict[str, Any] = LORA, **changes: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": str(model)},
            "dataset": {"source": "/data/train.csv"},
            "output": {"uri": "/out"},
            "training": {"lora": lora, "initFrom": {"source": str(source)}},
            **changes,
        }
    )


def check(config: RunConfig, model: Path) -> None:
    initial_adapter.check(config, ModelFolder(model), REVISION)


def found(config: RunConfig) -> InitialAdapter:
    adapter = initial_adapter.find(config)
    assert adapter is not None
    return adapter


def edit(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **fields}))


def test_a_training_begins_with_the_loss_that_the_earlier_one_ended_with(
    earlier: Earlier, tiny_model: Path, tmp_path: Path
) -> None:
    first = [each.eval_loss for each in earlier.trained.history if each.eval_loss is not None]
    assert first[-1] < first[0] - 0.1, "it learnt"
    later = work_of(tiny_model, tmp_path / "later")
    later = later.model_copy(update={"initial_adapter": earlier.work.adapter})
    trained = sft.fine_tune(later, Reporter())

    second = [each.eval_loss for each in trained.history if each.eval_loss is not None]
    assert second[0] == pytest.approx(first[-1], abs=1e-5)
    assert trained.metrics.base_eval_loss is None, "that was not the base model's"
    assert trained.metrics.eval_loss == pytest.approx(second[-1], abs=1e-5)
    before, after = (load_file(each.adapter / WEIGHTS) for each in (earlier.work, later))
    assert before.keys() == after.keys()
    assert not any(before[name].equal(after[name]) for name in after)


def test_a_good_adapter_is_found_and_fetched(adapter: Path, tiny_model: Path) -> None:
    config = run_config(tiny_model, adapter)
    check(config, tiny_model)
    first = found(config)
    edit(adapter, inference_mode=False)
    assert found(config).revision != first.revision, "what is in it counts"
    assert (
        initial_adapter.find(RunConfig.model_validate({**config.model_dump(), "training": {}}))
        is None
    )


def wrong_base(folder: Path) -> None:
    edit(folder, base_model_name_or_path="meta-llama/Llama-3.2-1B")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def no_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("spoil", "lora", "reason", "words"),
    [
        pytest.param(
            None,
            {**LORA, "r": 8, "useRslora": True},
            Reason.INVALID_CONFIG,
            "has r 4, useRslora false, and the spec r 8, useRslora true.",
            id="rank",
        ),
        pytest.param(
            None,
            {**LORA, "targetModules": ["q_proj", "down_proj"]},
            Reason.INVALID_CONFIG,
            "adapts k_proj, o_proj, q_proj, v_proj, and the spec down_proj, q_proj: set "
            'targetModules to ["k_proj", "o_proj", "q_proj", "v_proj"]',
            id="targets",
        ),
        pytest.param(
            wrong_base,
            LORA,
            Reason.INVALID_CONFIG,
            "is of another base model: it was trained on meta-llama/Llama-3.2-1B",
            id="base",
        ),
        pytest.param(
            lambda folder: edit(folder, rank_pattern={"q_proj": 2}),
            LORA,
            Reason.MODEL_UNSUPPORTED,
            "sets rank_pattern",
            id="ranks of single layers",
        ),
        pytest.param(
            lambda folder: edit(folder, peft_type="IA3"),
            LORA,
            Reason.MODEL_UNSUPPORTED,
            "sets peft_type IA3",
            id="no LoRA",
        ),
        pytest.param(
            pickled,
            LORA,
            Reason.MODEL_UNSUPPORTED,
            f"holds no {WEIGHTS} (weights: adapter_model.bin; pickled ones",
            id="pickled",
        ),
        pytest.param(
            no_safetensors,
            LORA,
            Reason.MODEL_UNSUPPORTED,
            "is no safetensors file",
            id="no weights",
        ),
        pytest.param(
            lambda folder: (folder / CONFIG).unlink(),
            LORA,
            Reason.MODEL_NOT_FOUND,
            f"there is no {CONFIG} in",
            id="nothing",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    spoil: Callable[[Path], object] | None,
    lora: dict[str, Any],
    reason: Reason,
    words: str,
    request: pytest.FixtureRequest,
) -> None:
    adapter, tiny_model = map(request.getfixturevalue, ("adapter", "tiny_model"))
    if spoil:
        spoil(adapter)
    with pytest.raises(StageError) as caught:
        check(run_config(tiny_model, adapter, lora), tiny_model)
    assert caught.value.reason is reason
    assert words in caught.value.message
    assert "spec.training." in caught.value.message


def test_a_base_model_of_the_same_name_and_another_shape_is_another(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / tiny_model.name
    other.mkdir(parents=True)
    settings = json.loads((tiny_model / "config.json").read_bytes())
    (other / "config.json").write_text(json.dumps({**settings, "hidden_size": 128}))
    with pytest.raises(StageError, match=r"another base model: its .* has shape \(4, 64\)"):
        check(run_config(other, adapter), other)


def manifest(base: str, revision: str) -> Manifest:
    lineage = Lineage(
        dataset="s3://data/faq.csv",
        dataset_etag="e",
        dataset_rows=4,
        columns={},
        model=base,
        model_revision=revision,
        hyperparameters={},
        fingerprints=Fingerprints(prepare="p", train="t", export="e"),
        versions={},
    )
    return Manifest(
        fingerprint="f",
        version="0123456789ab",
        files=(),
        created="2026-01-01T00:00:00Z",
        lineage=lineage,
        metrics={},
        gate=GateReport(),
    )


def test_a_version_in_a_bucket_says_what_its_base_was(
    bucket: str, moto: Credentials, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its name is the folder of the version, or of the adapter in it."""
    adapter, tiny_model = map(request.getfixturevalue, ("adapter", "tiny_model"))
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto.secret_key)
    client, version = moto.client(), "models/faq/versions/0123456789ab"
    wrong_base(adapter)
    for name in (CONFIG, WEIGHTS):
        client.upload_file(str(adapter / name), bucket, f"{version}/adapter/{name}")

    def publish(base: str, revision: str) -> None:
        body = manifest(base, revision).model_dump_json().encode()
        client.put_object(Bucket=bucket, Key=f"{version}/manifest.json", Body=body)

    uri, store = f"s3://{bucket}/{version}", {"endpoint": moto.endpoint}
    config = run_config(tiny_model, uri, storage=store)
    publish("meta-llama/Llama-3.2-1B", REVISION)
    check(config, tiny_model)  # the same files under another name
    publish("meta-llama/Llama-3.2-1B", "sha256:another")
    with pytest.raises(StageError, match="of another base model"):
        check(config, tiny_model)
    publish(str(tiny_model), "sha256:another")
    check(config, tiny_model)  # another tokenizer, say

    adapters = run_config(tiny_model, f"{uri}/adapter", storage=store)
    assert found(adapters).revision == found(config).revision
    resolved = {
        "fingerprints": {"prepare": "p", "train": "t", "export": "e"},
        "datasetETag": "etag",
        "datasetRows": 1,
        "modelRevision": REVISION,
        "initRevision": found(config).revision,
    }
    prepared = PreparedRunConfig.model_validate({**config.model_dump(), "resolved": resolved})
    folder = initial_adapter.fetch_resolved(prepared, tmp_path / "fetched")
    assert folder
    assert (folder / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    client.put_object(Bucket=bucket, Key=f"{version}/adapter/{WEIGHTS}", Body=b"another")
    with pytest.raises(StageError, match="somebody replaced it meanwhile"):
        initial_adapter.fetch_resolved(prepared, tmp_path / "again")


def test_an_adapter_on_the_hub(
    adapter: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server(adapter) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        config = run_config(tiny_model, "public/tiny")
        check(config, tiny_model)
        assert found(config).commit == COMMIT
        folder = found(config).fetch(tmp_path / "unused")
        assert (folder / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
        with pytest.raises(StageError, match=r"correct spec\.training\.initFrom\.source"):
            check(run_config(tiny_model, "public/another"), tiny_model)
