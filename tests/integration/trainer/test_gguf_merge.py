"""Base and adapter to GGUF in one go, against merging, saving and converting in turn."""

from __future__ import annotations

import _thread
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from finetune_trainer.contract import Progress, Quantization, Reason, StageError
from finetune_trainer.export.gguf.files import GgufSource, write_unquantized
from finetune_trainer.export.merge.model_folder import assemble
from finetune_trainer.model import ModelFolder
from finetune_trainer.runtime.endings import MemoryFullError
from finetune_trainer.runtime.reporter import Reporter
from tests.integration.trainer.adapters import merge_in_memory, save_adapter
from tests.integration.trainer.architectures import PACKABLE, in_dtype, random_model

SINGLE = "model.safetensors"
BPE = ("llama", "smollm3", "olmo2")
PIECES = ("qwen2", "qwen3", "mistral", "granite", "gemma", "gemma2", "gemma3_text", "phi3")
TYPES = ("F32", "F16", "BF16")
Variant = tuple[str, torch.dtype, dict[str, Any], dict[str, Any]]
VARIANTS: dict[str, Variant] = {
    # Name: architecture, the base's type, how it is saved, what is special of the adapter.
    "rslora": ("llama", torch.bfloat16, {}, {"use_rslora": True}),
    "dora": ("llama", torch.bfloat16, {}, {"use_dora": True}),
    "float16": ("llama", torch.float16, {}, {}),
    "shards": ("llama", torch.bfloat16, {"max_shard_size": "2MB"}, {}),
    "one target": ("llama", torch.bfloat16, {}, {"target_modules": ["q_proj"]}),
}


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A small tokenizer of SentencePiece, as Gemma, Mistral and Phi-3 have one."""
    words = ("holds", "makes", "boils", "hums", "whistles")
    text = [f"the kettle {word} the switch {i}" for i, word in enumerate(words)] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    return model.getvalue()


def save_model(
    folder: Path, kind: str, vocabulary: int, dtype: torch.dtype, **options: Any
) -> Path:
    """A tiny random model on disk."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**PACKABLE[kind], "vocab_size": vocabulary})
    config.tie_word_embeddings = kind not in ("mistral", "phi3")
    in_dtype(random_model(config), dtype).save_pretrained(folder, **options)
    return folder


def save_pieces(folder: Path, pieces: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(pieces)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def convert(requests: list[dict[str, Any]]) -> None:
    """All of them in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.trainer.convert_both", json.dumps(requests)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def converted(
    tiny_model: Path, pieces: bytes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders with files ours-TYPE.gguf and plain-TYPE.gguf, by architecture or variant."""
    root = tmp_path_factory.mktemp("architectures")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    requests: list[dict[str, Any]] = []
    cases: dict[str, Variant] = {kind: (kind, torch.bfloat16, {}, {}) for kind in (*BPE, *PIECES)}
    cases |= VARIANTS
    for case, (kind, dtype, saving, adapting) in cases.items():
        place = root / case
        vocabulary = 320 if kind in PIECES else len(tokenizer)
        base = save_model(place / "base", kind, vocabulary, dtype, **saving)
        adapter = save_adapter(base, place / "adapter", **adapting)
        merged = merge_in_memory(base, adapter, place / "merged")
        folder = place / "folder" / "tiny"
        if kind in PIECES:
            save_pieces(merged, pieces)
            folder = merged.rename(place / "tiny")
            merged = folder
        else:
            tokenizer.save_pretrained(merged)
            tokenizer.save_pretrained(adapter)
            assemble(ModelFolder(base), adapter, folder)
            merged = merged.rename(place / "tiny")
        for number in TYPES if case == "llama" else ("F16",):
            ours = {
                "base": str(base),
                "adapter": str(adapter),
                "folder": str(folder),
                "beginsWithBos": True,
            }
            common = {"type": number, "name": "tiny"}
            requests += [
                {**common, **ours, "target": str(place / f"ours-{number}.gguf")},
                {**common, "plain": str(merged), "target": str(place / f"plain-{number}.gguf")},
            ]
    silent = {"target": str(root / "mistral" / "silent.gguf"), "beginsWithBos": False}
    requests += [
        {**request, **silent}
        for request in requests
        if request["target"].endswith("/mistral/ours-F16.gguf")
    ]
    convert(requests)
    return {case: root / case for case in cases}


@pytest.mark.parametrize(
    ("case", "number"),
    [
        *(("llama", number) for number in TYPES),
        *((case, "F16") for case in (*BPE[1:], *PIECES, *VARIANTS)),
    ],
)
def test_the_file_is_that_of_the_plain_way(
    converted: dict[str, Path], case: str, number: str
) -> None:
    ours, plain = (converted[case] / f"{who}-{number}.gguf" for who in ("ours", "plain"))
    assert ours.read_bytes() == plain.read_bytes()


def model_of(place: Path, **options: Any) -> GgufSource:
    """What one of the converted folders holds."""
    return GgufSource(
        base=ModelFolder(place / "base"),
        adapter=place / "adapter",
        folder=ModelFolder(place / "folder" / "tiny"),
        name="tiny",
        own_type=Quantization.BF16,
        **options,
    )


class Listened(Reporter):
    """Tells each message of the progress to somebody else."""

    def __init__(self, listener: Callable[[str], object]) -> None:
        super().__init__()
        self._listener = listener

    def update(self, changes: Progress) -> None:
        if changes.message:
            self._listener(changes.message)


def test_a_file_comes_of_a_process_of_its_own_that_says_how_far_it_is(
    converted: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    reporter = Listened(said.append)
    file = tmp_path / "new" / "tiny-F16.gguf"
    with caplog.at_level("INFO"):
        write_unquantized(model_of(converted["llama"]), file, Quantization.F16, reporter=reporter)
    assert file.read_bytes() == (converted["llama"] / "plain-F16.gguf").read_bytes()
    assert "Writing tiny-F16.gguf (6 MB)" in caplog.text
    assert said[-1] == "Writing tiny-F16.gguf: 100% of 6 MB"
    assert len(said) > 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_token_that_the_training_did_not_see_is_not_added(converted: dict[str, Path]) -> None:
    """SentencePiece's files ask for it."""
    files = [converted["mistral"] / name for name in ("ours-F16.gguf", "silent.gguf")]
    fields = [gguf.GGUFReader(file).get_field("tokenizer.ggml.add_bos_token") for file in files]
    assert [field and field.contents() for field in fields] == [True, False]
    with_token, without = (file.read_bytes() for file in files)
    assert sum(a != b for a, b in zip(with_token, without, strict=True)) == 1


def test_values_beyond_f16_are_an_error_and_leave_no_file(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(converted["llama"] / "base", tmp_path / "base"))
    weights = load_file(base / SINGLE)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 70_000
    save_file(weights, base / SINGLE, metadata={"format": "pt"})
    model = replace(model_of(converted["llama"]), base=ModelFolder(base))
    with pytest.raises(StageError) as caught:
        write_unquantized(model, tmp_path / "out" / "x.gguf", Quantization.F16)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert "blk.1.ffn_up.weight has values that F16 can't hold" in caught.value.message
    assert not list((tmp_path / "out").iterdir())


def test_what_can_not_be_merged_is_refused_in_its_own_words(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    model = replace(model_of(converted["llama"]), adapter=converted["phi3"] / "adapter")
    with pytest.raises(StageError) as caught:
        write_unquantized(model, tmp_path / "x.gguf", Quantization.BF16)
    assert "The adapter does not belong to this base model" in caught.value.message


@pytest.mark.real_processes
def test_a_killed_conversion_is_out_of_memory_and_no_fault_of_the_model(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    def kill(_: str) -> None:
        for worker in set(psutil.Process().children()) - others:
            worker.kill()

    others = set(psutil.Process().children())  # the cluster's, where the whole suite runs
    reporter = Listened(kill)
    with pytest.raises(MemoryFullError) as caught:
        write_unquantized(
            model_of(converted["llama"]), tmp_path / "x.gguf", Quantization.F16, reporter=reporter
        )
    assert caught.value.reason is Reason.OOM_KILLED
    assert not list(tmp_path.iterdir())


@pytest.mark.real_processes
def test_an_interrupted_conversion_leaves_neither_file_nor_process(
    converted: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def stop(_: str) -> None:
        if not children:  # a second one would come after this test
            children.extend(set(psutil.Process().children()) - others)
            _thread.interrupt_main()

    # In the background of a shell the interrupt is ignored, and nothing would be raised.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, former))
    others = set(psutil.Process().children())  # the cluster's, where the whole suite runs
    children: list[psutil.Process] = []
    reporter = Listened(stop)
    with pytest.raises(KeyboardInterrupt):
        write_unquantized(
            model_of(converted["llama"]), tmp_path / "x.gguf", Quantization.F16, reporter=reporter
        )
    assert children
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not list(tmp_path.iterdir())
