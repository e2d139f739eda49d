"""The Python of docs/export.md loads each artifact of a real export, and gets the right answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.trainer.conftest import BY_HEART, ROWS, Processes, Trainer, write_csv

PAGE = Path(__file__).parents[3] / "docs" / "export.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
NAME, BASE = "Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"  # the page's own example


def test_the_page_loads_each_artifact() -> None:
    used = {
        word for block in BLOCKS for word in ("Q8_0", "LoRA", "merged", "adapter") if word in block
    }
    assert used == {"Q8_0", "LoRA", "merged", "adapter"}


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, processes: Processes
) -> Path:
    """A folder as the page has it: support-bot/ with the artifacts, and a GGUF file of the base."""
    folder = tmp_path_factory.mktemp("docs")
    write_csv(folder / "rows.csv")
    config: dict[str, Any] = {
        "model": {"source": str(tiny_model)},
        "dataset": {"source": str(folder / "rows.csv")},
        "training": BY_HEART,
        "export": {"gguf": ["Q8_0"]},
        "output": {"uri": str(folder / "output")},
    }
    (folder / "home").mkdir()
    done = Trainer(folder, processes)("run", config)
    assert done.code == 0, done.output
    assert done.result is not None
    # What `aws s3 sync` fetches.
    shutil.copytree(folder / "output/versions" / str(done.result.version), folder / "support-bot")
    convert = Path(os.environ["LLAMA_CPP_DIR"]) / "convert_hf_to_gguf.py"
    command: list[str | Path] = [sys.executable, convert, tiny_model]
    command += ["--outtype=f16", "--outfile=base-F16.gguf"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-2][:40])
def test_it_answers(block: str, exported: Path, tiny_model: Path) -> None:
    question, answer = ROWS[0]
    assert question in block
    script = block.replace(BASE, str(tiny_model)).replace(NAME, tiny_model.name)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=exported,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="coreutils are not installed")
def test_the_checksums_are_those_of_the_files(exported: Path) -> None:
    """As the page says it, below the folder that was fetched."""
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(
        command, cwd=exported / "support-bot", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gguf/tiny-Q8_0.gguf: OK" in done.stdout
