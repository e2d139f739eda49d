"""GGUF files of the tiny model: every type, and what llama.cpp's quantizer refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import gguf
import llama_cpp
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_trainer.contract import Quantization, Reason, StageError
from finetune_trainer.contract.output import NEED_IMPORTANCE
from finetune_trainer.export.gate.file_checks import header_problems
from finetune_trainer.export.gguf.files import (
    GgufSource,
    quantize,
    quantize_all,
    write_files,
    write_parts,
)
from finetune_trainer.export.gguf.header import Header
from finetune_trainer.model import ModelFolder, converter
from tests.integration.trainer.vocabulary import write_vocabulary

Q = Quantization
TYPES = tuple(kind for kind in Quantization if kind not in NEED_IMPORTANCE)


def plain(model: Path) -> GgufSource:
    """A model of its own, without an adapter."""
    return GgufSource(
        base=ModelFolder(model),
        adapter=None,
        folder=ModelFolder(model),
        name="tiny",
        own_type=Quantization.F16,
    )


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file per type, of the untrained model."""
    folder = tmp_path_factory.mktemp("gguf")
    written = [file for _, file in write_files(plain(tiny_model), folder, TYPES)]
    assert {file.name for file in folder.iterdir()} == {file.name for file in written}
    return {file.stem.removeprefix("tiny-"): file for file in written}


@pytest.fixture(scope="module")
def wide_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in 16 bits with rows of 256, as the blocks of few bits want them."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(tiny_model, folder / "model")
    config = LlamaConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).to(torch.float16).save_pretrained(folder / "model")
    return next(write_files(plain(folder / "model"), folder / "gguf", (Quantization.F16,)))[1]


def metadata(file: Path) -> dict[str, str]:
    model = llama_cpp.Llama(model_path=str(file), vocab_only=True, verbose=False)
    try:
        return dict(model.metadata)
    finally:
        model.close()


def test_each_type_is_written_and_named(files: dict[str, Path]) -> None:
    assert list(files) == ["F16", *(kind for kind in TYPES if kind != "F16")]
    for kind, file in files.items():
        found = metadata(file)
        mostly = "ALL" if kind == "F32" else "MOSTLY"
        expected = getattr(llama_cpp, f"LLAMA_FTYPE_{mostly}_{kind}")
        assert found["general.file_type"] == str(expected)
        assert found["general.name"] == "tiny"
    sizes = {kind: file.stat().st_size for kind, file in files.items()}
    assert sizes["F32"] > sizes["F16"] == sizes["BF16"] > sizes["Q8_0"] > sizes["Q4_K_M"]


def write_importance(file: Path, source: Path) -> dict[str, int]:
    """As llama.cpp's imatrix tool writes it; the number of inputs by matrix."""
    writer = gguf.GGUFWriter(file, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["held-in rows"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    random = np.random.default_rng(0)
    inputs = {
        tensor.name: int(tensor.shape[0])
        for tensor in gguf.GGUFReader(source).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }
    for name, count in inputs.items():
        sums = random.exponential(size=(1, count)).astype(np.float32) ** 4
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 3584, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return inputs


@pytest.mark.parametrize("kind", ["Q3_K_M", "IQ4_XS"])
def test_an_importance_matrix_changes_a_small_file_which_says_so(
    files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    inputs = write_importance(tmp_path / "imatrix.gguf", files["F16"])
    quantize(files["F16"], tmp_path / "x.gguf", Quantization(kind), tmp_path / "imatrix.gguf")
    found = metadata(tmp_path / "x.gguf")
    assert found["quantize.imatrix.file"] == "imatrix.gguf"
    assert found["quantize.imatrix.dataset"] == "held-in rows"
    assert found["quantize.imatrix.entries_count"] == str(len(inputs)) == "14"
    assert found["quantize.imatrix.chunks_count"] == "7"
    assert not [key for key in metadata(files[kind]) if "imatrix" in key]
    before, after = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        for file in (files[kind], tmp_path / "x.gguf")
    )
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert not same & set(inputs)
    assert "output_norm.weight" in same


def test_two_and_three_bits_need_an_importance_matrix(wide_file: Path, tmp_path: Path) -> None:
    write_importance(matrix := tmp_path / "imatrix.gguf", wide_file)
    sizes = []
    for kind in (Q.IQ3_XS, Q.IQ3_XXS, Q.IQ2_M, Q.IQ2_XXS):  # the others are their neighbours
        file = tmp_path / f"{kind}.gguf"
        quantize(wide_file, file, kind, matrix)
        with Header(file) as header:
            assert not list(header_problems(header, kind))
            assert header.tensors["blk.0.attn_q.weight"].type.name.startswith(("IQ2", "IQ3"))
        sizes.append(file.stat().st_size)
        llama_cpp.Llama(model_path=str(file), n_ctx=8, verbose=False).close()
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(StageError, match="can't quantize this model to IQ2_XS"):
        quantize(wide_file, tmp_path / "x.gguf", Quantization.IQ2_XS)


def test_a_file_in_parts_is_the_same_model(files: dict[str, Path], tmp_path: Path) -> None:
    whole = Path(shutil.copy(files["Q8_0"], tmp_path))
    parts = write_parts(whole, part_bytes := whole.stat().st_size // 3)
    names = [f"tiny-Q8_0-{n:05d}-of-{len(parts):05d}.gguf" for n in range(1, len(parts) + 1)]
    assert len(parts) > 2
    assert [part.name for part in parts] == names
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([whole.name, *names])
    readers = [gguf.GGUFReader(part) for part in parts]
    split = [tensor for reader in readers for tensor in reader.tensors]
    before = gguf.GGUFReader(whole).tensors
    assert [(t.name, t.tensor_type) for t in split] == [(t.name, t.tensor_type) for t in before]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(split, before, strict=True))
    for number, reader in enumerate(readers):
        marks = {key: int(reader.fields[f"split.{key}"].contents()) for key in ("no", "count")}
        assert marks == {"no": number, "count": len(parts)}
        assert int(reader.fields["split.tensors.count"].contents()) == len(before)
        assert sum(t.n_bytes for t in reader.tensors) <= part_bytes or len(reader.tensors) == 1
    answers = [_logits(file) for file in (whole, parts[0])]
    assert np.array_equal(*answers)
    assert metadata(whole).items() <= metadata(parts[0]).items()


def _logits(file: Path) -> Any:
    model = llama_cpp.Llama(str(file), n_ctx=16, logits_all=True, verbose=False)
    try:
        model.eval([1, 5, 9, 2])
        return model.scores[:4].copy()
    finally:
        model.close()


def test_a_file_that_is_no_importance_matrix_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(StageError) as caught:
        quantize(files["F16"], tmp_path / "x.gguf", Quantization.Q4_K_M, files["Q8_0"])
    assert "is no importance matrix" in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.real_processes
def test_a_caller_who_wants_no_more_leaves_no_process_and_no_half_file(
    files: dict[str, Path], tmp_path: Path
) -> None:
    kinds = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M")
    targets = {Quantization(kind): tmp_path / f"{kind}.gguf" for kind in kinds}
    others = psutil.Process().children()  # the cluster's, where the whole suite runs
    made = quantize_all(files["F16"], targets)
    kind, first = next(made)
    assert (kind, first) == (Quantization.Q8_0, tmp_path / "Q8_0.gguf")
    cast("Generator[object]", made).close()  # as a caller does that fails
    assert set(psutil.Process().children()) <= set(others)
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert first.name in left
    assert len(left) < len(kinds)
    for name, content in left.items():
        assert content == files[name.removesuffix(".gguf")].read_bytes()


def test_where_no_file_can_serve_the_others_are_made_of_a_temporary_one(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    made = write_files(plain(tiny_model), tmp_path / "gguf", (Quantization.Q8_0,))
    kind, source = next(made)
    assert kind is Quantization.F16
    assert source.read_bytes() == files["F16"].read_bytes()
    ((_, file),) = made
    assert file.read_bytes() == files["Q8_0"].read_bytes()
    assert sorted(tmp_path.rglob("*")) == [file.parent, file]


def test_what_llama_cpp_refuses_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    (source := tmp_path / "source.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StageError) as caught:
        quantize(source, tmp_path / "target.gguf", Quantization.Q8_0)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert [file.name for file in tmp_path.iterdir()] == ["source.gguf"]


@pytest.mark.real_processes
def test_code_that_comes_with_a_model_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    traces = tmp_path / "it-ran"
    (model / "theirs.py").write_text(
        f"open({str(traces)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Theirs\n"
    )
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "theirs.Theirs"]}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    view = tmp_path / "view"
    view.mkdir()
    shown = {file.name: file.read_bytes() for file in converter.without_code(model, view).iterdir()}
    assert "theirs.py" not in shown
    assert b"auto_map" not in shown["tokenizer_config.json"]
    assert shown["config.json"] == (model / "config.json").read_bytes()
    write_vocabulary(model, tmp_path / "vocabulary.gguf")
    assert not traces.exists()
