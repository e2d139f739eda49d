"""Base and adapter to GGUF, against PEFT's own merge and llama.cpp's converter by hand."""

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

from finetune_trainer.contract import Progress, Quantization, Reason
from finetune_trainer.export.gguf.files import (
    GgufSource,
    beyond_float16,
    write_files,
    write_unquantized,
)
from finetune_trainer.export.merge.checkpoint import SINGLE
from finetune_trainer.export.merge.model_folder import write_model
from finetune_trainer.model import ModelFolder
from finetune_trainer.runtime.lifecycle import MemoryFullError
from finetune_trainer.runtime.reporter import Reporter
from tests.integration.trainer.adapters import merge_in_memory, save_adapter
from tests.integration.trainer.architectures import PACKABLE, in_dtype, random_model

KINDS = ("llama", "mistral", "phi3")  # the last two with a tokenizer of SentencePiece


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


def convert(requests: list[dict[str, str]]) -> None:
    """By llama.cpp's own program: each has a folder, a target and a type."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.trainer.convert_by_hand", json.dumps(requests)],
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
    """By architecture a folder with base, adapter, our merged model and plain-F16.gguf."""
    root = tmp_path_factory.mktemp("architectures")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    by_hand: list[dict[str, str]] = []
    for kind in KINDS:
        place = root / kind
        vocabulary = len(tokenizer) if kind == "llama" else 320
        base = save_model(place / "base", kind, vocabulary, torch.bfloat16)
        adapter = save_adapter(base, place / "adapter")
        for folder in (base, adapter):
            if kind == "llama":
                tokenizer.save_pretrained(folder)
            else:
                save_pieces(folder, pieces)
        merged = merge_in_memory(base, adapter, place / "peft")
        write_model(ModelFolder(base), adapter, place / "ours" / "tiny")
        for file in (place / "ours" / "tiny").iterdir():
            if not file.name.endswith(".safetensors"):
                shutil.copy(file, merged)
        folder = merged.rename(place / "tiny")
        target = place / "plain-F16.gguf"
        by_hand.append({"folder": str(folder), "target": str(target), "type": "f16"})
    convert(by_hand)
    return {kind: root / kind for kind in KINDS}


def model_of(place: Path, **options: Any) -> GgufSource:
    """What one of the folders holds."""
    return GgufSource(
        base=ModelFolder(place / "base"),
        adapter=place / "adapter",
        folder=ModelFolder(place / "ours" / "tiny"),
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


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_a_token_that_the_training_did_not_see_is_not_added(
    converted: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """SentencePiece's files ask for it. All else is as the plain way has it."""
    file = tmp_path / "x.gguf"
    write_unquantized(model_of(converted[kind], begins_with_bos=False), file, Quantization.F16)
    files = [converted[kind] / "plain-F16.gguf", file]
    fields = [gguf.GGUFReader(each).get_field("tokenizer.ggml.add_bos_token") for each in files]
    assert [field and field.contents() for field in fields] == [True, False]
    with_token, without = (each.read_bytes() for each in files)
    assert sum(a != b for a, b in zip(with_token, without, strict=True)) == 1


def test_values_beyond_f16_are_only_f16_s_trouble(
    converted: dict[str, Path], tmp_path: Path
) -> None:
    """And a bfloat16 model is quantized from bfloat16."""
    model = model_of(converted["llama"])
    folder = Path(shutil.copytree(model.folder.path, tmp_path / "tiny"))
    weights = load_file(folder / SINGLE)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 70_000
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    seen = []
    written = write_files(
        replace(model, folder=ModelFolder(folder)),
        tmp_path / "gguf",
        [Quantization.F16, Quantization.Q8_0],
        converted=lambda: shutil.rmtree(folder),
    )
    for kind, file in written:
        seen.append(kind)
        found = beyond_float16(file)
        assert found == ("blk.1.ffn_up.weight" if kind is Quantization.F16 else None)
        if kind is Quantization.Q8_0:
            (up,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
            assert gguf.dequantize(up.data, up.tensor_type).max() == pytest.approx(70_000, rel=0.01)
    assert seen == [Quantization.BF16, Quantization.F16, Quantization.Q8_0]
    assert not folder.exists()


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
