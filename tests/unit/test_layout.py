"""The folders are what the documentation says, and no name in the trainer stands for two things."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATOR = ROOT / "operator" / "finetune_operator"
TRAINER = ROOT / "trainer" / "finetune_trainer"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [file for file in TRAINER.rglob("*.py") if file.name != "__init__.py"]
PACKAGES = [file.parent for file in TRAINER.rglob("__init__.py")]


def repeated(names: list[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def test_no_module_or_package_of_the_trainer_has_the_name_of_another() -> None:
    assert repeated([file.stem for file in MODULES] + [folder.name for folder in PACKAGES]) == []


def test_no_class_of_the_trainer_has_the_name_of_another() -> None:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in TRAINER.rglob("*.py")]
    classes = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert repeated([name for name in classes if not name.startswith("_")]) == []


def layout() -> dict[Path, list[str]]:
    """Each folder of the architecture's layout, with the names that are listed in it."""
    text = ARCHITECTURE.partition("\n## Layout\n")[2].partition("\nImports go")[0]
    found: dict[Path, list[str]] = {}
    parents: list[tuple[int, Path]] = []
    for line in text.splitlines():
        if not line.startswith("    "):
            continue
        depth = len(line) - len(line.lstrip())
        while parents and parents[-1][0] >= depth:
            parents.pop()
        folder = parents[-1][1] if parents else ROOT
        # Several names stand beside each other where none needs a description.
        words = re.split(r" {2,}", line.strip())
        names = [words[0], *(word for word in words[1:] if re.fullmatch(r"[a-z0-9_]+/?", word))]
        for name in names:
            found.setdefault(folder, []).append(name.rstrip("/"))
        if names[0].endswith("/"):
            parents.append((depth, folder / names[0]))
    return found


def is_there(path: Path) -> bool:
    return path.exists() or path.with_name(f"{path.name}.py").exists()


def test_every_name_in_the_layout_is_there() -> None:
    listed = [folder / name for folder, names in layout().items() for name in names]
    assert len(listed) > 50
    spelled = [Path(str(path).replace("{unit,integration,e2e,data}", "unit")) for path in listed]
    assert [str(path) for path in spelled if not is_there(path)] == []


@pytest.mark.parametrize(
    "folder", [OPERATOR, TRAINER, TRAINER / "train", TRAINER / "export"], ids=lambda path: path.name
)
def test_the_layout_leaves_no_module_out(folder: Path) -> None:
    modules = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    packages = {file.parent.name for file in folder.glob("*/__init__.py")}
    assert set(layout()[folder]) == modules | packages


def test_the_architecture_names_modules_that_are_there() -> None:
    packages = "|".join(["operator/…", *(folder.name for folder in TRAINER.iterdir())])
    named = re.findall(rf"`((?:{packages})/[a-z_0-9/.]+)`", ARCHITECTURE)
    assert len(named) > 30
    missing = [
        path
        for path in named
        if not is_there(TRAINER / path) and not is_there(ROOT / path.replace("…", OPERATOR.name))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    top = "operator|trainer|tests|hack|docs|charts|crds|images|examples|benchmarks|constraints"
    named = re.findall(rf"(?<![\w/.:-])((?:{top})/[\w./-]*\w)", text)
    missing = [path for path in named if not is_there(ROOT / path)]
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        if not (page.parent / link).exists():
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_module_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = []
    for package, root in (("finetune_operator", OPERATOR), ("finetune_trainer", TRAINER)):
        for dotted in re.findall(rf"\b{package}\.([a-z_.]+[a-z_])", text):
            if not is_there(root / dotted.replace(".", "/")):
                missing.append(f"{package}.{dotted}")
    assert missing == []
