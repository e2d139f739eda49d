"""The image's layer with Unsloth, as far as a machine without a GPU builds it.

pip resolves the layer by the Dockerfile's own arguments, and Unsloth's own source is held against
what the engine passes to it. Importing it takes a GPU.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from finetune_trainer.train.recipe import unsloth_engine
from hack import REPOSITORY, cache_dir
from hack.constraints import FOLDER
from images.requirements import requirements

DOCKERFILE = REPOSITORY / "images" / "trainer" / "Dockerfile"
EXTRAS = "trainer,gguf,trackers,signing,liger,unsloth"
FILES = ("trainer.txt", "unsloth.txt")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def pins() -> dict[str, str]:
    lines = [line for name in FILES for line in (FOLDER / name).read_text().splitlines()]
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_dockerfile_takes_these_files() -> None:
    text = DOCKERFILE.read_text()
    assert f"EXTRAS={EXTRAS.removeprefix('trainer,gguf,')}" in text
    assert " ".join(f"-c /build/{name}" for name in FILES) in text


def test_pip_resolves_the_layer_to_its_pins(tmp_path: Path) -> None:
    needed, report = tmp_path / "requirements.txt", tmp_path / "report.json"
    needed.write_text("\n".join(requirements(REPOSITORY / "pyproject.toml", EXTRAS)))
    command = [*PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--report"]
    command += [str(report), "--find-links", str(cache_dir() / "wheels")]
    for name in FILES:
        command += ["-c", str(FOLDER / name)]
    done = subprocess.run(
        [*command, "-r", str(needed)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    found = {
        canonicalize_name(each["metadata"]["name"]): each["metadata"]["version"].partition("+")[0]
        for each in json.loads(report.read_text())["install"]
    }
    del found[canonicalize_name("triton")]  # CUDA builds of torch bring theirs
    known = pins()
    assert {"unsloth", "unsloth-zoo", "xformers", "liger-kernel"} < found.keys()
    assert {name: version for name, version in found.items() if known.get(name) != version} == {}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Unsloth's wheel, of the pinned version."""
    folder = tmp_path_factory.mktemp("unsloth")
    command = [*PIP, "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, f"unsloth=={pins()['unsloth']}"], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def parameters_of(source: zipfile.ZipFile, file: str, name: str) -> list[set[str]]:
    """The names of the parameters of each function of this name."""
    found = []
    for node in ast.walk(ast.parse(source.read(file))):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            given = node.args
            found.append({each.arg for each in (*given.args, *given.kwonlyargs)})
    return found


def test_unsloth_knows_all_that_the_engine_passes(source: zipfile.ZipFile) -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(unsloth_engine.load)))
    passed: dict[str, Any] = {
        node.func.attr: {each.arg for each in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "FastLanguageModel"
    }
    assert passed.keys() == {"from_pretrained", "get_peft_model"}
    loading = parameters_of(source, "unsloth/models/loader.py", "from_pretrained")[0]
    # It hands this one on to transformers, among its **kwargs.
    assert passed["from_pretrained"] - loading == {"local_files_only"}
    adapting = parameters_of(source, "unsloth/models/llama.py", "get_peft_model")
    # And this one to PEFT.
    assert [passed["get_peft_model"] - each for each in adapting] == [{"use_dora"}]


def test_unsloth_reads_what_it_is_told_otherwise(source: zipfile.ZipFile) -> None:
    """Lengths of packed rows among the forward pass's arguments, and variables."""
    code = b"".join(source.read(name) for name in source.namelist() if name.endswith(".py"))
    text = code.decode()
    assert re.search(r"kwargs(\.get\(|\.pop\(|\[)\s*[\"']packed_seq_lengths[\"']", text)
    assert "UNSLOTH_DISABLE_STATISTICS" in text
