"""The header of a GGUF file: what gguf-py writes is read, and damage is found."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.contract import Quantization
from finetune_trainer.export.gate import file_checks
from finetune_trainer.export.gguf.header import Header, HeaderError

ROWS, COLUMNS = 4, 512


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", gguf.GGMLQuantizationType.Q8_0)


def write(
    path: Path,
    kind: gguf.GGMLQuantizationType,
    file_type: gguf.LlamaFileType = gguf.LlamaFileType.MOSTLY_Q8_0,
) -> Path:
    """A file with one matrix and one vector."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_file_type(file_type)
    writer.add_token_list(["a", "Ġb", "ü"])
    writer.add_token_types([1, 1, 3])
    matrix = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(COLUMNS, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_says_what_was_written(file: Path) -> None:
    with Header(file) as header:
        assert header.value("general.architecture") == "llama"
        assert header.value("llama.context_length") == 512
        assert header.value("tokenizer.ggml.tokens") is None
        assert header.strings("tokenizer.ggml.tokens") == ["a", "Ġb", "ü"]
        assert header.numbers("tokenizer.ggml.token_type") == [1, 1, 3]
        assert header.strings("tokenizer.ggml.token_type") is None
        tensor = header.tensors["blk.0.ffn_up.weight"]
        assert (tensor.shape, tensor.bytes) == ((COLUMNS, ROWS), ROWS * COLUMNS // 32 * 34)
        reader = gguf.GGUFReader(file)
        assert {t.name: t.data_offset for t in reader.tensors} == {
            name: t.offset for name, t in header.tensors.items()
        }
        assert header.contents("blk.0.ffn_norm.weight") == np.ones(COLUMNS, np.float32).tobytes()
        assert list(file_checks.header_problems(header, Quantization.Q8_0)) == []
        assert file_checks.parameter_count(header) == (ROWS + 1) * COLUMNS


@pytest.mark.parametrize("kind", list(file_checks.MAIN_TYPES))
def test_each_kind_has_types_of_its_own(kind: Quantization, tmp_path: Path) -> None:
    """What Q8_0 files hold, under each name."""
    content = gguf.GGMLQuantizationType.Q8_0
    with Header(write(tmp_path / "x.gguf", content, file_checks.FILE_TYPES[kind])) as header:
        problems = list(file_checks.header_problems(header, kind))
    assert bool(problems) is (kind is not Quantization.Q8_0)
    assert all("stored as Q8_0" in problem for problem in problems)


def test_every_shorter_file_is_cut(file: Path, tmp_path: Path) -> None:
    data, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for length in range(0, len(data), 7):
        cut.write_bytes(data[:length])
        assert damage(cut), length
    cut.write_bytes(data + bytes(10_000))
    assert damage(cut) == ["10,000 bytes follow its last tensor"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 700), value=st.binary(min_size=1, max_size=8))
def test_damage_is_a_problem_and_never_a_crash(
    file: Path, tmp_path: Path, place: int, value: bytes
) -> None:
    data = bytearray(file.read_bytes())
    data[place : place + len(value)] = value
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    damage(broken)


def damage(file: Path) -> list[str]:
    try:
        with Header(file) as header:
            return list(file_checks.header_problems(header, Quantization.Q8_0))
    except HeaderError as error:
        return [str(error)]
