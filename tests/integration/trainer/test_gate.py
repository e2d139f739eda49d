"""The gate: what is wrong with a GGUF file is found, and what is right passes.

One tiny tuned model, with a fault planted into its files. The figures in the comments were measured
on it: how far the clean file is from the reference, and the faulty one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import limits
from finetune_trainer.contract import (
    Export,
    FileVerdict,
    Notice,
    NoticeCode,
    Progress,
    QualityLimit,
    Quantization,
    Reason,
    RunConfig,
    Stage,
    StageError,
    TrainingMetrics,
    TrainingRecord,
)
from finetune_trainer.contract.output import NEED_IMPORTANCE
from finetune_trainer.export import gate as gate_module
from finetune_trainer.export import llama
from finetune_trainer.export.export_stage import expected_work
from finetune_trainer.export.gate import (
    DerivedGate,
    SourceGate,
    expect,
    expected,
    file_checks,
    rejects,
)
from finetune_trainer.export.gate.expected import llama_threads
from finetune_trainer.export.gate.kept import KeptFigures
from finetune_trainer.export.gate.rows import ExampleFiles
from finetune_trainer.export.gguf.header import Header
from finetune_trainer.export.inputs import ExportContext, open_tuned_model
from finetune_trainer.export.llama import CheckRequest
from finetune_trainer.export.llama.llama_worker import (
    DECODE_ROWS,
    LOGITS_BYTES,
    decodes_of,
)
from finetune_trainer.export.pipeline import make_models
from finetune_trainer.export.reference import MeasuredRow, float32
from finetune_trainer.memory.forecast import (
    Machine,
    Widths,
    forecast,
    llama_bytes,
    reference_bytes,
)
from finetune_trainer.model import ModelFolder
from finetune_trainer.model.loading import idle_cpus
from finetune_trainer.runtime import child
from finetune_trainer.runtime.reporter import Reporter
from finetune_trainer.store import LocalFolder
from tests.integration.trainer.conftest import ROWS, Processes
from tests.integration.trainer.families import WIDE
from tests.integration.trainer.faulty_gguf import (
    flip,
    overwrite,
    rename,
    set_text,
    set_value,
    set_weights,
    tensor_place,
    weights,
)
from tests.integration.trainer.tuned import EXAMPLES, Tuned, make_tuned, open_gate, write_lora

Q = Quantization
ALL = (Q.F16, *(kind for kind in Q if kind not in (Q.F16, *NEED_IMPORTANCE)))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A llama of two layers, wide enough for K quantizations, and SmolLM2's kind of tokenizer."""
    return make_tuned("smollm2", tmp_path_factory.mktemp("tuned"), torch.float16, **WIDE_SHAPE)


WIDE_SHAPE = {**WIDE, "initializer_range": 0.06}


@pytest.fixture(scope="module")
def opened(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> SourceGate:
    """A gate that knows the reference."""
    return tuned.gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def gate(tuned: Tuned, opened: SourceGate) -> DerivedGate:
    """The gate behind it, for which the clean 16-bit file was checked."""
    derived = opened.check(tuned.file(Q.F16), Q.F16)
    assert derived.source_verdict.problems == ()
    return derived


@pytest.fixture
def first(opened: SourceGate, tmp_path: Path) -> SourceGate:
    """One for a faulty 16-bit file, which leaves no trace for other tests."""
    return SourceGate(replace(opened.expected, workspace=tmp_path))


@pytest.fixture
def faulty(tuned: Tuned, tmp_path: Path) -> Callable[[Quantization], Path]:
    """A copy of a file, to be damaged."""

    return lambda kind: Path(shutil.copy(tuned.file(kind), tmp_path / f"{kind}.gguf"))


def refused(check: FileVerdict, *words: str) -> None:
    """Every word is in one of the file's problems."""
    assert not check.passed
    for word in words:
        assert any(word in problem for problem in check.problems), check.problems


LAYER = ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight")


def test_every_type_of_a_clean_model_passes(tuned: Tuned, first: SourceGate) -> None:
    """Measured: F16 4e-6, Q8_0 4e-4, Q6_K 0.003, Q4_K_M 0.023, Q3_K_M 0.058."""
    gate = first.check(tuned.file(Q.F16), Q.F16)
    others = [gate.check(tuned.file(kind), kind) for kind in ALL[1:]]
    checks = [gate.source_verdict, *others]
    assert [check.problems for check in checks] == [()] * 9
    figures = {check.quantization: check.quality for check in checks}
    assert all(figures.values())
    loss = {kind: quality.kl_divergence for kind, quality in figures.items() if quality}
    assert max(loss[Q.F32], loss[Q.F16]) < loss[Q.BF16] < loss[Q.Q8_0] < loss[Q.Q6_K]
    assert loss[Q.Q6_K] < loss[Q.Q5_K_M] < loss[Q.Q4_K_M] < loss[Q.IQ4_XS] < loss[Q.Q3_K_M]
    report = gate.report(others)
    assert report.files == tuple(checks)
    assert (report.rows, report.tokens, report.held_out) == (6, first.expected.rows.tokens, True)
    assert report.tuned_perplexity is not None
    assert report.tuned_perplexity == pytest.approx(figures[Q.F16].perplexity, rel=1e-3)  # type: ignore[union-attr]
    assert report.base_perplexity != pytest.approx(report.tuned_perplexity, rel=0.01)


@pytest.mark.parametrize("scale", [0.5, 1.2, 2.0])
def test_a_wrong_scale_is_found(
    tuned: Tuned, first: SourceGate, faulty: Callable[[Quantization], Path], scale: float
) -> None:
    """Of one kind of module alone: 0.005, 0.0008 and 0.018, where the clean file has 4e-6."""
    file = faulty(Q.F16)
    for layer in range(2):
        theirs, ours = (name.format(layer) for name in LAYER)
        base, merged = weights(tuned.base, theirs), weights(tuned.merged, theirs)
        set_weights(file, ours, base + scale * (merged - base))
    refused(first.check(file, Q.F16).source_verdict, "mean KL divergence")


def test_a_layer_without_its_delta_is_found(
    tuned: Tuned, first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    """One of fourteen: 0.005, where the clean file has 4e-6."""
    file = faulty(Q.F16)
    theirs, ours = (name.format(1) for name in LAYER)
    set_weights(file, ours, weights(tuned.base, theirs))
    refused(first.check(file, Q.F16).source_verdict, "mean KL divergence")


def test_what_was_made_of_a_refused_file_is_refused(
    tuned: Tuned, first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    file = faulty(Q.F16)
    set_value(file, "tokenizer.ggml.eos_token_id", "I", 0)
    gate = first.check(file, Q.F16)
    refused(gate.source_verdict, "end of a text")
    refused(gate.check(tuned.file(Q.Q8_0), Q.Q8_0), "made of F16.gguf, which is refused")


def test_other_merges_are_found(first: SourceGate, faulty: Callable[[Quantization], Path]) -> None:
    """Two merges that the rows don't pass through, exchanged."""
    file = faulty(Q.F16)
    with Header(file) as header:
        merges = header.strings("tokenizer.ggml.merges")
        field = header.fields["tokenizer.ggml.merges"]
        raw = header.raw("tokenizer.ggml.merges")
    assert merges is not None
    one, other = (struct.pack("<Q", len(m.encode())) + m.encode() for m in merges[-2:])
    assert raw.endswith(one + other)
    overwrite(file, field.end - len(one + other), other + one)
    refused(first.check(file, Q.F16).source_verdict, "merges")


def test_another_way_to_split_words_is_found(
    first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    """Mistral's Tekken splits brackets from words otherwise; no row has one."""
    file = faulty(Q.F16)
    set_text(file, "tokenizer.ggml.pre", b"smollm", b"tekken")
    check = first.check(file, Q.F16).source_verdict
    refused(check, "other tokens")
    assert check.quality is not None
    assert (check.quality.over_limit, check.quality.passed) == (False, False)


def test_another_vocabulary_is_found(
    first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    """One letter of a token."""
    file = faulty(Q.F16)
    set_text(file, "tokenizer.ggml.tokens", b"boiling", b"bailing")
    refused(first.check(file, Q.F16).source_verdict, "entries of its vocabulary")


def test_another_chat_template_is_found(
    first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    file = faulty(Q.F16)
    set_text(file, "tokenizer.chat_template", b"im_start", b"im_begun")
    refused(first.check(file, Q.F16).source_verdict, "chat template")


def test_a_missing_end_token_is_found(
    first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    """llama.cpp knows <|im_end|> by its text; others go by the metadata."""
    file = faulty(Q.F16)
    rename(file, "tokenizer.ggml.eos_token_id", "tokenizer.ggml.xxx_token_id")
    refused(first.check(file, Q.F16).source_verdict, "as the end of a text")


def test_tokens_that_servers_would_add_are_found(
    first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    file = faulty(Q.F16)
    set_value(file, "tokenizer.ggml.add_bos_token", "?", True)
    expected = first.expected
    assert expected.text.begins_with_bos  # as SmolLM2's template does
    text = replace(expected.text, begins_with_bos=False)
    gate = SourceGate(replace(expected, text=text))
    refused(gate.check(file, Q.F16).source_verdict, "add_bos")
    rename(file, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    refused(gate.check(file, Q.F16).source_verdict, "add_eos")


def test_an_end_of_turn_that_llama_cpp_does_not_stop_at_is_found(
    first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    """The token lost its text, by which llama.cpp knows it, and is nobody's end any more."""
    file = faulty(Q.F16)
    set_text(file, "tokenizer.ggml.tokens", b"<|im_end|>", b"<|im_stop|")
    set_value(file, "tokenizer.ggml.eos_token_id", "I", 0)
    refused(first.check(file, Q.F16).source_verdict, "would not stop")


@pytest.mark.parametrize(("kind", "name"), [(Q.Q4_K_M, Q.Q8_0), (Q.Q8_0, Q.Q4_K_M)])
def test_a_swapped_quantization_is_found(
    tuned: Tuned, gate: DerivedGate, kind: Quantization, name: Quantization, tmp_path: Path
) -> None:
    file = Path(shutil.copy(tuned.file(kind), tmp_path / f"{name}.gguf"))
    refused(gate.check(file, name), f"says that it is {kind}, and not {name}")
    set_value(file, "general.file_type", "I", {Q.Q8_0: 7, Q.Q4_K_M: 15}[name])
    refused(gate.check(file, name), "stored as")


@pytest.mark.parametrize("kept", [10, 1000, 1_000_000, -4])
def test_a_truncated_file_is_found(
    gate: DerivedGate, faulty: Callable[[Quantization], Path], kept: int
) -> None:
    file = faulty(Q.Q8_0)
    file.write_bytes(file.read_bytes()[:kept])
    refused(gate.check(file, Q.Q8_0), "")
    assert gate.check(file, Q.Q8_0).quality is None


def test_a_flipped_bit_in_the_metadata_is_found(
    tuned: Tuned, faulty: Callable[[Quantization], Path]
) -> None:
    """In any value: each is compared with that of the file that it was made of."""
    file = faulty(Q.Q8_0)
    with Header(file) as header:
        places = {key: field.end - 1 for key, field in header.fields.items()}
    for key, place in places.items():
        flip(file, place, 0)
        # Two say how it was quantized, and the first of them is looked at by itself.
        found = list(read_problems(file, tuned.file(Q.F16)))
        assert found or key == "general.quantization_version", key
        flip(file, place, 0)
    assert list(read_problems(file, tuned.file(Q.F16))) == []


def read_problems(file: Path, source: Path) -> Iterator[str]:
    with Header(file) as header, Header(source) as before:
        yield from file_checks.header_problems(header, Q.Q8_0)
        yield from file_checks.differences_from_source(header, before)


def test_a_flipped_bit_of_the_context_length_is_found(
    first: SourceGate, faulty: Callable[[Quantization], Path]
) -> None:
    """In the first file, which has none before it, and where no short row shows it."""
    file = faulty(Q.F16)
    with Header(file) as header:
        place = header.fields["llama.context_length"].start
    flip(file, place + 1, 3)
    refused(first.check(file, Q.F16).source_verdict, "llama.context_length")


def test_a_flipped_bit_of_a_norm_is_found(
    gate: DerivedGate, faulty: Callable[[Quantization], Path]
) -> None:
    """The lowest one: norms are copied as they are."""
    file = faulty(Q.Q4_K_M)
    flip(file, tensor_place(file, "blk.1.ffn_norm.weight") + 40, 0)
    refused(gate.check(file, Q.Q4_K_M), "is not the one that was copied")


def test_a_scale_that_is_no_number_is_found(
    gate: DerivedGate, faulty: Callable[[Quantization], Path]
) -> None:
    """Even of one block of a token that no row has: llama.cpp looks at all of them."""
    file = faulty(Q.Q8_0)
    place = tensor_place(file, "token_embd.weight") + 34 * 8 * 40_000
    overwrite(file, place, np.float16(np.inf).tobytes())
    refused(gate.check(file, Q.Q8_0), "llama.cpp can't load it")


def test_a_flipped_bit_of_a_scale_is_found(
    gate: DerivedGate, faulty: Callable[[Quantization], Path]
) -> None:
    """The highest one of a block's exponent, of one block: 0.9, and 4e-4 clean."""
    file = faulty(Q.Q8_0)
    flip(file, tensor_place(file, "blk.0.ffn_up.weight") + 34 * 8 * 100 + 1, 6)
    refused(gate.check(file, Q.Q8_0), "mean KL divergence")


def test_the_merged_model_is_checked_as_its_files_are(
    tuned: Tuned, opened: SourceGate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process that runs the tuned model. Clean: 2e-6; a delta left out: 0.005; where no
    GGUF file is asked for, it answers the prompts."""
    monkeypatch.setattr(float32, "measure_in_child", float32.measure_here)
    monkeypatch.setattr(gate_module, "SAMPLE_TOKENS", 4)
    faulty = Path(shutil.copytree(tuned.merged, tmp_path / "merged"))
    weights_file, name = faulty / "model.safetensors", LAYER[0].format(1)
    changed = {**load_file(weights_file), name: load_file(tuned.base / weights_file.name)[name]}
    save_file(changed, weights_file, {"format": "pt"})
    found = {}
    for folder in (tuned.merged, faulty):
        inputs = replace(tuned.inputs(gguf=()), merged=ModelFolder(folder))
        gate = open_gate(inputs, tmp_path / "gate")
        found[folder] = gate.check_merged(Q.F16)
    good, bad = found.values()
    assert good is not None
    assert (good.problems, good.file) == ((), "merged")
    assert bad is not None
    refused(bad, "mean KL divergence")
    report = gate.report(gate.merged_samples())
    assert [sample.expected for sample in report.samples] == [answer for _, answer in ROWS]
    assert report.tokens == opened.expected.rows.tokens
    assert opened.check_merged(Q.F16) is None, "it was not given"


def test_a_later_attempt_has_all_that_the_files_are_held_against(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first one ended before a file's verdict was kept."""
    monkeypatch.setattr(float32, "measure_in_child", float32.measure_here)
    output, inputs = LocalFolder(tmp_path / "output"), tuned.inputs()
    for attempt in ("first", "second"):
        kept = KeptFigures(output, "fingerprint")
        kept.expect("rows")
        gate = SourceGate.ask(expect(inputs, tmp_path / attempt), kept)
        monkeypatch.setattr(float32, "measure_in_child", None)  # the second need not ask
    assert gate.check(tuned.file(Q.F16), Q.F16).source_verdict.problems == ()


def test_a_merged_models_other_tokenizer_is_found(tuned: Tuned, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tuned.merged, tmp_path / "merged"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-2000]
    file.write_text(json.dumps(content))
    inputs = replace(tuned.inputs(), examples=[], merged=ModelFolder(folder))
    verdict = open_gate(inputs, tmp_path / "gate").check_merged(Q.F16)
    assert verdict is not None
    refused(verdict, "Its tokenizer splits")


def test_limits_of_the_spec_come_first(tuned: Tuned, gate: DerivedGate) -> None:
    limits = (QualityLimit(quantization=Q.Q8_0, max_kl_divergence=1e-6),)
    export = Export(quality_limits=limits)
    inputs = replace(gate.expected.inputs, export=export)
    limited = replace(gate, expected=replace(gate.expected, inputs=inputs))
    check = limited.check(tuned.file(Q.Q8_0), Q.Q8_0)
    refused(check, "1e-06 is the limit")
    assert check.quality is not None
    assert not check.quality.passed
    assert rejects(export, check)
    assert not rejects(Export(verify="warn", quality_limits=limits), check)


def test_a_gate_that_is_off_refuses_nothing(
    tuned: Tuned, faulty: Callable[[Quantization], Path], tmp_path: Path
) -> None:
    source_gate = tuned.gate(tmp_path / "gate", verify="off")
    assert source_gate.expected.reference is None
    file = faulty(Q.Q8_0)
    file.write_bytes(file.read_bytes()[:-4000])
    gate = source_gate.check(file, Q.F16)
    for verdict in (gate.source_verdict, gate.check(file, Q.Q8_0), gate.check_adapter(file)):
        assert (verdict.problems, verdict.quality) == ((), None)
    assert gate.samples(file) == ()
    assert gate.report().tuned_perplexity is None


def test_a_model_that_is_not_there_is_an_error(tuned: Tuned, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tuned.base, tmp_path / "base"))
    (broken / "model.safetensors").write_bytes(b"none")
    with pytest.raises(StageError) as caught:
        open_gate(replace(tuned.inputs(), base=ModelFolder(broken)), tmp_path / "gate")
    assert caught.value.reason in (Reason.MODEL_UNSUPPORTED, Reason.INTERNAL_ERROR)


@pytest.fixture(scope="module")
def adapter(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tuned, tmp_path_factory.mktemp("adapter") / "LoRA.gguf")


def test_without_the_adapter_it_is_the_base_model(gate: DerivedGate, adapter: Path) -> None:
    check = gate.check_adapter(adapter)
    assert check.problems == ()
    assert check.quality is not None
    samples = gate.samples(gate.source, adapter)
    assert [sample.expected for sample in samples] == [
        example["completion"][0]["content"] for example in EXAMPLES
    ]
    assert [sample.base for sample in samples] != [sample.tuned for sample in samples]
    assert all(sample.base is not None for sample in samples)
    assert gate.report(samples=samples).samples == samples


def test_the_adapters_file_is_measured_on_the_rows_with_the_longest_answers(
    gate: DerivedGate, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the base model's log-probabilities of these very rows."""
    rows = gate.expected.rows
    asked = list[CheckRequest]()

    def call(request: CheckRequest, *rest: Any) -> Any:
        asked.append(request)
        return llama_call(request, *rest)

    llama_call = llama.call
    monkeypatch.setattr(llama, "call", call)
    check = gate.check_adapter(adapter)
    (request,) = asked
    assert request.places == rows.few
    assert len(rows.few) == 4 < len(rows.measured)
    answers = [len(row.measured) for row in rows.measured]
    left_out = set(range(len(answers))) - set(rows.few)
    assert min(answers[place] for place in rows.few) >= max(answers[place] for place in left_out)
    assert check.quality is not None
    assert check.quality.kl_divergence < 1e-4  # with another row's reference beside it: over 1
    assert rows.tokens_at((1, 3), rows.conversations) == (1,) * answers[1] + (3,) * answers[3]


def test_a_model_without_time_for_a_prompt_is_not_asked(
    gate: DerivedGate, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the first one is read to its end, and that is said."""
    monkeypatch.setattr(gate_module, "SAMPLE_SECONDS", 0.0)
    samples = gate.samples(gate.source, adapter)
    assert [sample.expected for sample in samples] == [answer for _, answer in ROWS]
    assert {(sample.base, sample.tuned, sample.stopped) for sample in samples} == {
        (None, None, False)
    }


def test_a_merged_model_without_time_is_not_asked(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32, "measure_in_child", float32.measure_here)
    monkeypatch.setattr(gate_module, "SAMPLE_SECONDS", 0.0)
    inputs = replace(tuned.inputs(gguf=()), merged=ModelFolder(tuned.merged))
    samples = open_gate(inputs, tmp_path / "gate").merged_samples()
    assert [sample.tuned for sample in samples] == [None] * len(ROWS)


def test_a_wrong_scale_of_the_adapter_is_found(
    gate: DerivedGate, adapter: Path, tmp_path: Path
) -> None:
    """As of an rsLoRA adapter of rank 4 that is taken for a plain one: 0.16, and 4e-6 clean."""
    file = Path(shutil.copy(adapter, tmp_path))
    set_value(file, "adapter.lora.alpha", "f", 16.0)
    refused(gate.check_adapter(file), "mean KL divergence")


def test_an_adapter_has_to_be_whole(gate: DerivedGate, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "LoRA.gguf"
    file.write_bytes(adapter.read_bytes()[:-500])
    refused(gate.check_adapter(file), "was cut")


def took(processes: Processes, *arguments: object) -> int:
    """What gate_memory says of a process of its own, set up as the gate's are."""
    command = [sys.executable, "-m", f"{__package__}.gate_memory", *map(str, arguments)]
    environment = {**os.environ, **child.SETTINGS}
    with processes.popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return int(json.loads(output.splitlines()[-1])["took"])


def test_the_gates_memory_is_what_was_predicted(
    tuned: Tuned, processes: Processes, tmp_path: Path
) -> None:
    """Of llama.cpp and of the reference, beside the files that they map; each within 25%."""
    config = json.loads((tuned.base / "config.json").read_bytes())
    heads = config["hidden_size"] // config["num_attention_heads"]
    widths = Widths(
        config["vocab_size"],
        config["hidden_size"],
        config["intermediate_size"],
        heads * config["num_key_value_heads"],
        config["num_hidden_layers"],
    )

    def mapped(*files: Path) -> int:
        return sum(file.stat().st_size for file in files)

    file = tuned.file(Q.F16)
    measured = took(processes, "llama", file, tmp_path)
    measured -= mapped(file, tmp_path / "reference.npy", tmp_path / "kept.npy")
    assert llama_bytes(widths) == pytest.approx(measured, rel=0.25)
    measured = took(processes, "reference", tuned.base, tuned.adapter, tmp_path)
    weights = tuned.base / "model.safetensors"
    measured -= mapped(weights, tmp_path / "tuned.npy", tmp_path / "base.npy")
    assert reference_bytes(widths, 1024) == pytest.approx(measured, rel=0.25)


class Told(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[Notice] = []

    def notice(self, notice: Notice) -> None:
        self.said.append(notice)


def test_a_gpu_that_llama_cpp_was_not_built_for_is_said_to_be_unused(
    tuned: Tuned, opened: SourceGate, tmp_path: Path
) -> None:
    """The file is checked all the same, on the CPU; what is small enough would be put there."""
    reporter = Told()
    inputs = replace(opened.expected.inputs, reporter=reporter)
    expected = replace(opened.expected, inputs=inputs, workspace=tmp_path, gpu_memory=24 << 30)
    file = tuned.file(Q.F16)
    assert expected.fits_gpu(file)
    assert not replace(expected, gpu_memory=1 << 30).fits_gpu(file)
    assert not opened.expected.fits_gpu(file), "this machine has none"
    assert SourceGate(expected).check(file, Q.F16).source_verdict.passed
    assert [notice.code for notice in reporter.said] == [NoticeCode.GPU_UNUSED]
    assert not reporter.said[0].warning


class Whole(Reporter):
    """Keeps each change, and not only what stands when it is time for a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.percents = list[int]()
        self.total_steps = set[int | None]()
        self._kept = threading.Lock()

    def update(self, changes: Progress) -> None:
        with self._kept:
            if changes.percent is not None:
                self.percents.append(int(changes.percent.rstrip("%")))
                self.total_steps.add(changes.total_steps)


def test_percent_is_of_the_whole_export(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never goes back, moves in each part, and nothing but the upload is left at the end."""
    monkeypatch.setattr(gate_module, "SAMPLE_TOKENS", 4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    config = RunConfig.model_validate(
        {
            "model": {"source": str(tuned.base)},
            "dataset": {"source": str(rows)},
            "output": {"uri": str(tmp_path / "out")},
            "export": {"gguf": ["F16", "Q8_0"]},
        }
    )
    reporter = Whole()
    reporter.begin(Stage.EXPORT, "Exporting")
    metrics = TrainingMetrics(base_parameters=2e7)
    seconds = forecast(
        expected_work(config, TrainingRecord(metrics=metrics, hyperparameters={})), Machine(2)
    )
    reporter.expect_work(seconds)
    (tmp_path / "result").mkdir()
    context = ExportContext(
        config=config,
        model=open_tuned_model(
            config, ModelFolder(tuned.base), tuned.adapter, tmp_path / "result" / "merged"
        ),
        examples=ExampleFiles(rows, rows),
        result=tmp_path / "result",
        workspace=tmp_path,
        add_file=lambda *_, **__: None,
        reporter=reporter,
    )
    report = make_models(context)
    assert all(verdict.passed for verdict in report.files)
    assert reporter.percents == sorted(reporter.percents)
    assert len(set(reporter.percents)) >= 7, "at least each part shows"
    upload = seconds["upload"] / sum(seconds.values())
    assert reporter.percents[-1] == min(99, int(100 * (1 - upload)))
    assert reporter.total_steps == {None}


@pytest.mark.parametrize(
    ("running", "usable", "threads"),
    [(1, 8, 8), (5, 8, 4), (4, 8, 5), (99, 8, 4), (1, 1, 1), (99, 1, 1), (None, 8, 4)],
)
def test_llama_cpp_has_the_cpus_that_are_idle_and_half_of_ours_at_least(
    running: int | None, usable: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loadavg = tmp_path / "loadavg"
    if running is not None:
        loadavg.write_text(f"0.50 0.40 0.30 {running}/310 4711\n")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(expected, "available_cpus", lambda: usable)
    monkeypatch.setattr(expected, "idle_cpus", lambda: idle_cpus(loadavg))
    assert llama_threads() == threads


def test_rows_share_a_call_as_far_as_its_memory_goes() -> None:
    """Their number, tokens and logits are bounded; a row too large for that has its own."""
    many = [MeasuredRow((1, 2), (1,))] * (DECODE_ROWS + 3)
    assert [len(group) for group in decodes_of(many, 100)] == [DECODE_ROWS, 3]
    long = [MeasuredRow((1,) * size, (1,)) for size in (2000, 48, 1, 5000, 7)]
    assert [[len(row.ids) for row in group] for group in decodes_of(long, 100)] == [
        [2000, 48],
        [1],
        [5000],
        [7],
    ]
    outputs = LOGITS_BYTES // (4 * 128_256)
    answers = [MeasuredRow((1,) * (outputs // 2 + 2), tuple(range(1, outputs // 2 + 1)))] * 3
    assert [len(group) for group in decodes_of(answers, 128_256)] == [2, 1]


@pytest.mark.parametrize("more", [[], ["--blur"]])
def test_what_types_cost_any_file_is_measured_as_the_gate_does(
    more: list[str],
    tuned: Tuned,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tuned.file(Q.Q8_0)
    monkeypatch.setattr(sys, "argv", ["limits", str(file), "--types", "F16,Q8_0", *more])
    limits.main()
    assert [each.name for each in file.parent.iterdir() if each.name.startswith("limits-")] == []
    found = re.findall(r"^(\S+) +(\S+)  limit (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert [kind for kind, *_ in found] == ["F16", "Q8_0"]
    sixteen, eight = (float(off) for _, off, _ in found)
    assert sixteen < eight < float(found[1][2])
