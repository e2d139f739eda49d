"""The script that gets llama.cpp: what it keeps, how it names a build, what it says on failure."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path

import pytest

from hack import llama_cpp

ROOT = Path(__file__).parents[2]


def make_sdist(path: Path, files: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{llama_cpp.VERSION}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_the_version_is_the_one_that_the_project_pins() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    pins = (ROOT / "constraints" / "trainer.txt").read_text()
    assert f'"llama-cpp-python=={llama_cpp.VERSION}"' in pyproject
    assert re.search(rf"^llama_cpp_python=={re.escape(llama_cpp.VERSION)}$", pins, re.MULTILINE)


def test_the_converter_is_taken_without_the_rest_of_the_tree(tmp_path: Path) -> None:
    inside = {
        "convert_hf_to_gguf.py": "convert",
        "conversion/llama.py": "llama",
        "gguf-py/gguf/__init__.py": "gguf",
        "gguf-py/gguf/scripts/gguf_dump.py": "a tool of its own",
        "gguf-py/tests/test_quants.py": "test",
        "models/templates/x.jinja": "template",
        "models/ggml-vocab-bert-bge.gguf": "vocabulary",
        "LICENSE": "MIT",
        "src/llama.cpp": "code",
    }
    files = {f"vendor/llama.cpp/{name}": text for name, text in inside.items()}
    sdist = make_sdist(tmp_path / "sdist.tar.gz", {**files, "LICENSE.md": "of the bindings"})

    llama_cpp.extract_converter(sdist, tmp_path / "converter")

    found = {
        path.relative_to(tmp_path / "converter").as_posix(): path.read_text()
        for path in (tmp_path / "converter").rglob("*")
        if path.is_file()
    }
    kept = (
        "convert_hf_to_gguf.py",
        "conversion/llama.py",
        "gguf-py/gguf/__init__.py",
        "models/templates/x.jinja",
        "LICENSE",
    )
    assert found == {name: inside[name] for name in kept}


def test_a_build_is_named_by_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    plain = llama_cpp.wheel_key(llama_cpp.cmake_flags())
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    flags = llama_cpp.cmake_flags()
    assert flags[-1] == "-DGGML_CUDA=ON"
    assert llama_cpp.wheel_key(flags) != plain
    assert plain.startswith(f"llama-cpp-python-{llama_cpp.VERSION}-")


@pytest.mark.parametrize(
    ("machine", "avx"), [("x86_64", True), ("AMD64", True), ("aarch64", False), ("arm64", False)]
)
def test_no_build_is_for_the_builders_own_processor(
    monkeypatch: pytest.MonkeyPatch, machine: str, avx: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    flags = llama_cpp.cmake_flags()
    assert "-DGGML_NATIVE=OFF" in flags
    assert ("-DGGML_AVX2=ON" in flags) is avx


def test_a_missing_compiler_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(llama_cpp.LlamaCppError, match="apt-get install build-essential"):
        llama_cpp.check_compiler()


def test_no_build_fails_where_the_cache_holds_no_wheel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"llama.cpp-{llama_cpp.VERSION}").mkdir()
    assert llama_cpp.main(["--cache", str(tmp_path), "--no-build"]) == 1
    assert "no wheel in" in capsys.readouterr().err


def test_a_cached_wheel_is_copied_and_both_places_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converter = tmp_path / f"llama.cpp-{llama_cpp.VERSION}"
    cached = tmp_path / "wheels" / llama_cpp.wheel_key(llama_cpp.cmake_flags()) / "w.whl"
    converter.mkdir()
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"wheel")

    out = tmp_path / "out"
    assert llama_cpp.main(["--cache", str(tmp_path), "--wheel-dir", str(out)]) == 0

    assert (out / "w.whl").read_bytes() == b"wheel"
    assert capsys.readouterr().out == f"converter={converter}\nwheel={out / 'w.whl'}\n"


def test_another_sdist_under_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_label: str, command: list[str]) -> None:
        folder = Path(command[command.index("--dest") + 1])
        make_sdist(folder / f"llama_cpp_python-{llama_cpp.VERSION}.tar.gz", {"LICENSE.md": "?"})

    monkeypatch.setattr(llama_cpp, "run", download)
    with pytest.raises(llama_cpp.LlamaCppError, match="has SHA-256"):
        llama_cpp.get_sdist(tmp_path)
    assert not list(tmp_path.rglob("*.tar.gz"))


def test_a_failed_command_shows_the_end_of_its_output() -> None:
    command = ["sh", "-c", "echo first; echo the reason; exit 3"]
    with pytest.raises(llama_cpp.LlamaCppError, match=r"(?s)failed with code 3.*the reason"):
        llama_cpp.run("a build", command)


def test_without_a_terminal_progress_is_plain_lines_with_the_compile_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llama_cpp.run("compiling", ["sh", "-c", "echo '  [1/2] g++ a.cpp'; echo '  [2/2] g++ b.cpp'"])
    shown = capsys.readouterr().err
    assert re.search(r"^compiling: 0m0\ds \[2/2\]\n$", shown, re.MULTILINE)
    assert "\r" not in shown


def test_the_helper_library_is_switched_off_or_the_build_stops(tmp_path: Path) -> None:
    lists = tmp_path / "CMakeLists.txt"
    lists.write_text('  set(LLAMA_BUILD_COMMON ON CACHE BOOL "x" FORCE)\n')
    llama_cpp.leave_out_helpers(lists)
    assert lists.read_text() == '  set(LLAMA_BUILD_COMMON OFF CACHE BOOL "x" FORCE)\n'
    with pytest.raises(llama_cpp.LlamaCppError, match="has changed"):
        llama_cpp.leave_out_helpers(lists)


def test_the_pinned_digest_is_a_sha256() -> None:
    assert len(bytes.fromhex(llama_cpp.SDIST_SHA256)) == hashlib.sha256().digest_size
