"""The arithmetic of `make gpu`, its order and its table; integration tests run its cases."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.gpu import needs
from benchmarks.gpu.cases import CASES, select
from benchmarks.gpu.flops import Work, mfu, model_flops, peak_flops
from benchmarks.gpu.models import SHAPES, Scale, even_lengths, make_tokenizer, mixed_lengths, row
from benchmarks.gpu.outcome import Outcome, Verdict
from benchmarks.gpu.program import Report
from benchmarks.gpu.table import ratios, summary
from finetune_trainer.contract import Lora
from finetune_trainer.model.shape import Shape
from finetune_trainer.model.tokenizer import encode

ROOT = Path(__file__).parents[2]


def shape(name: str) -> Shape:
    found = Shape.from_config({"model_type": "llama", **SHAPES[name]})
    assert found is not None
    return found


def test_the_models_are_as_large_as_the_llamas_that_they_are_named_after() -> None:
    assert shape("1b").parameters == 1_235_814_400
    assert shape("8b").parameters == 8_030_261_248


def test_flops_of_a_model_counted_by_hand() -> None:
    tiny = Shape("llama", 2, 4, 4, 2, 8, 16, tied=True)
    # q, k, v, o and the MLP: 2 (4x4) + 2 (4x2) + 3 (4x8) = 144 weights in each of 2 layers.
    lora = Lora(r=1)  # A and B: (4 + 4) + 2 (4 + 2) + (4 + 4) = 28 in each layer
    work = Work.of([3, 5], [1, 2])
    linear, head, adapter = 4 * 288 * 8, 4 * 16 * 4 * 3, 6 * 56 * 8
    attention = 6 * 2 * 4 * (9 + 25)
    assert model_flops(tiny, lora, work) == linear + head + adapter + attention


def test_flops_of_a_token_of_an_8b_model_are_four_times_its_weights() -> None:
    work = Work.of([2048], [2048])
    found = model_flops(shape("8b"), Lora(), work) / work.tokens
    assert found / (4 * shape("8b").parameters) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", 65.0),
    ],
)
def test_a_device_is_found_by_the_name_that_torch_gives_it(name: str, teraflops: float) -> None:
    assert peak_flops(name) == teraflops * 1e12


def test_without_a_known_peak_there_is_no_mfu() -> None:
    assert mfu(1e15, 2.0, peak_flops("CPU")) is None
    assert mfu(4.947e14, 1.0, peak_flops("NVIDIA H200")) == pytest.approx(0.5)


def test_every_case_has_a_name_of_its_own_and_can_be_chosen_by_a_word_of_it() -> None:
    assert len({each.name for each in CASES}) == len(CASES)
    assert [each.name for each in select(["packed", "device"])][:2] == ["device", "packed = alone"]


def test_the_part_of_eight_minutes_proves_what_is_right_and_compares_with_trl() -> None:
    left, begun = 8 * 60, []
    for each in CASES:
        left -= each.seconds
        if left > 0:
            begun.append(each.name)
    assert {"packed = alone", "resumed = straight", "out of memory", "8b long: ours"} <= {*begun}
    assert {"8b mixed: ours", "8b mixed: TRL"} <= {*begun}
    assert sum(each.seconds for each in CASES) <= 25 * 60


@pytest.mark.parametrize("tokens", [40, 600, 2048])
def test_a_row_has_as_many_tokens_as_it_was_asked_for(tokens: int) -> None:
    assert len(encode(make_tokenizer(), row(tokens, 0))[0]) == tokens


def test_rows_are_of_the_lengths_that_the_page_says() -> None:
    found = sorted(mixed_lengths(1280, Scale.full().longest))
    assert found[640] == pytest.approx(128, abs=2)
    assert sum(found) / len(found) == pytest.approx(251, abs=3)
    assert found[-1] == 2048
    # No two of these may share a pass of the longest row, however passes are planned.
    even = even_lengths(8, 2048)
    assert even[0] == 2048
    assert min(even) * 2 > 2048


def rate(tokens: float) -> dict[str, object]:
    return Outcome(Verdict.MEASURED, "", {"tokens_per_second": tokens}).as_json()


def test_ours_is_compared_with_the_others_on_the_same_rows() -> None:
    cases = {"8b long: ours": rate(300), "8b mixed: ours": rate(200), "8b mixed: TRL": rate(100)}
    assert ratios(cases) == ["8b mixed: ours / TRL = 2.00 in tokens/s"]


def test_the_tiny_form_shows_no_figure_of_a_device(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", tiny=True, minutes=1)
    report.add("8b mixed: ours", {**rate(1234.5), "words": "1,234 tokens/s"})
    report.add("8b mixed: TRL", rate(100))
    written = json.loads(report.file.read_text())
    assert written["cases"]["8b mixed: TRL"]["verdict"] == "measured"
    assert "1,234" not in summary(report.as_json("complete"))
    report.tiny = False
    assert "1,234" in summary(report.as_json("complete"))


def test_without_a_gpu_one_line_says_what_it_needs_and_how_to_run_the_tiny_form() -> None:
    found = needs.prepare(None, tiny=False)
    assert found is not None
    assert len(found.splitlines()) == 1
    assert "NVIDIA GPU" in found
    assert "make gpu TINY=1" in found
    assert "TINY" in (ROOT / "Makefile").read_text()


def test_what_is_not_installed_is_named_with_the_way_to_bring_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name == "trl" else object())
    found = needs.prepare(None, tiny=True)
    assert found is not None
    assert found.startswith("Not installed: trl.")
    assert "--wheels FOLDER" in found


def make_wheel(folder: Path, module: str, text: str = "") -> Path:
    """A wheel of one module, that pip accepts."""
    wheel, metadata = folder / "brought-1.0-py3-none-any.whl", "brought-1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(module, text)
        archive.writestr(
            f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{metadata}/RECORD", "")
    return wheel


def test_it_starts_over_once_with_the_wheels_that_were_brought(tmp_path: Path) -> None:
    make_wheel(tmp_path, "sitecustomize.py", "print('brought')")  # Python imports it as it starts
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--cases=device", "--minutes=0"]
    command += [f"--wheels={tmp_path}", f"--output={tmp_path / 'gpu.json'}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("brought") == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["ended"] == "complete"


def test_a_case_that_is_not_there_is_no_success() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--cases", "no such case"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "no case has one of these words: no such case. There are: device, " in done.stderr


def test_a_folder_without_a_wheel_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no wheel in"):
        needs.start_over(tmp_path)


@pytest.mark.parametrize("by_pip", [True, False])
def test_wheels_are_installed_with_and_without_pip(
    by_pip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, metadata = make_wheel(tmp_path, "brought/__init__.py"), "brought-1.0.dist-info"
    if not by_pip:
        monkeypatch.setattr(needs, "find_spec", lambda _: None)
    elif find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    needs.install([str(wheel)], str(tmp_path / "target"))
    assert (tmp_path / "target" / "brought" / "__init__.py").is_file()
    assert (tmp_path / "target" / metadata / "METADATA").is_file()
