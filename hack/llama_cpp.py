#!/usr/bin/env python3
"""Get llama.cpp's converter and quantizer from one pinned source.

The sdist of llama-cpp-python carries the whole of llama.cpp, so one download gives both
halves of the export stage in versions that belong together:

- the converter (`convert_hf_to_gguf.py` with its `conversion` and `gguf` packages), which is
  plain Python and is laid out as `DEST/llama.cpp-VERSION`; the trainer finds it by the
  environment variable LLAMA_CPP_DIR;
- the wheel, which quantizes a GGUF and loads it. It is compiled once and kept in the cache.

The image's build and a developer's machine both run this script, so both get the same.
It needs Python, pip and a C++ compiler; CMake and Ninja come from pip.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

# What the converter needs of the 200 MB tree.
CONVERTER_PARTS = (
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "conversion/",
    "gguf-py/gguf/",
    "gguf-py/LICENSE",
    "models/templates/",
    "models/ggml-vocab-gpt-neox.gguf",
    "models/ggml-vocab-llama-spm.gguf",
    "LICENSE",
)

# GGML_NATIVE would compile for the builder's own processor, and crash on an older one. The
# x86-64-v3 level (AVX2, FMA, F16C: Intel since 2013, AMD since 2015) is what its fast paths
# are written for. GGML_BACKEND_DL with all variants would choose at run time, but it looks for
# its libraries beside the executable, which is python, and compiles the CPU code ten times.
# Without OpenMP the library needs no libgomp and shares none with torch's own copy.
CMAKE_FLAGS = ("-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF", "-DGGML_CCACHE=OFF", "-DLLAVA_BUILD=OFF")
CMAKE_FLAGS_X86 = tuple(
    f"-DGGML_{feature}=ON" for feature in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
)
# llama.cpp's own install rules add headers and a second copy of each library, and a wheel holds
# no links, so each library comes three times more: as .so, .so.0 and .so.0.5.0 (not needed).
WHEEL_EXCLUDES = "/lib/**;/include/**;/bin/**;/llama_cpp/lib/*.so.*.*"
# The command-line tools' helper library is much to compile, and nothing here loads it.
HELPERS_ON = "set(LLAMA_BUILD_COMMON ON CACHE"


TOOL_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


class LlamaCppError(Exception):
    """Something a person has to put right; the message says what."""


def main(argv: list[str] | None = None) -> int:
    """Lay out the converter and build the wheel; print where both are."""
    args = parse_args(argv)
    try:
        converter = get_converter(args.cache, args.dest or args.cache)
        wheel = get_wheel(args.cache, build=not args.no_build)
        if args.wheel_dir:
            args.wheel_dir.mkdir(parents=True, exist_ok=True)
            wheel = Path(shutil.copy2(wheel, args.wheel_dir))
    except (LlamaCppError, OSError) as error:
        print(f"llama_cpp.py: {error}", file=sys.stderr)
        return 1
    print(f"converter={converter}\nwheel={wheel}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"
    parser = argparse.ArgumentParser(description="Get llama.cpp's converter and quantizer.")
    parser.add_argument("--cache", type=Path, default=cache, help=f"default: {cache}")
    parser.add_argument("--dest", type=Path, help="folder for the converter (default: the cache)")
    parser.add_argument("--wheel-dir", type=Path, help="folder that gets a copy of the wheel")
    parser.add_argument("--no-build", action="store_true", help="fail if no wheel is in the cache")
    return parser.parse_args(argv)


def get_converter(cache: Path, dest: Path) -> Path:
    """Return the folder of the converter, extracting it on first use."""
    folder = dest / f"llama.cpp-{VERSION}"
    with locked(cache):
        if not folder.is_dir():
            extract_converter(get_sdist(cache), folder)
    return folder


def get_wheel(cache: Path, *, build: bool = True) -> Path:
    """Return the wheel for this machine's architecture and C library, building it on first use."""
    flags = cmake_flags()
    folder = cache / "wheels" / wheel_key(flags)
    with locked(cache):
        found = sorted(folder.glob("*.whl"))
        if not found and not build:
            raise LlamaCppError(f"no wheel in {folder}")
        return found[0] if found else build_wheel(get_sdist(cache), folder, flags)


def cmake_flags() -> list[str]:
    """List the build's flags; CMAKE_ARGS adds to them, such as -DGGML_CUDA=ON."""
    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    extra = os.environ.get("CMAKE_ARGS", "").split()
    return [*CMAKE_FLAGS, *(CMAKE_FLAGS_X86 if x86 else ()), *extra]


def wheel_key(flags: list[str]) -> str:
    """Name a build by all that can change its result. The Python version can't: it uses ctypes."""
    libc = "".join(platform.libc_ver()) or platform.system().lower()
    recipe = hashlib.sha256(" ".join([*flags, WHEEL_EXCLUDES, SDIST_SHA256]).encode()).hexdigest()
    return f"llama-cpp-python-{VERSION}-{platform.machine()}-{libc}-{recipe[:8]}"


def get_sdist(cache: Path) -> Path:
    """Return the checked sdist, downloading it on first use."""
    sdist = cache / "sdists" / f"llama_cpp_python-{VERSION}.tar.gz"
    if sdist.is_file():
        return sdist
    sdist.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=sdist.parent) as temporary:
        # Not `--no-binary :all:`, which would compile CMake, a build requirement, as well.
        command = [*PIP, "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        command += ["--dest", temporary, f"llama-cpp-python=={VERSION}"]
        run(f"downloading llama-cpp-python {VERSION}", command)
        got = next(Path(temporary).glob("*.tar.gz"))
        digest = hashlib.sha256(got.read_bytes()).hexdigest()
        if digest != SDIST_SHA256:
            raise LlamaCppError(f"{got.name} has SHA-256 {digest}, not {SDIST_SHA256}")
        got.replace(sdist)
    return sdist


def extract_converter(sdist: Path, folder: Path) -> None:
    """Copy the converter's files out of the sdist, all or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tarfile.open(sdist) as tar:
        work = Path(temporary) / "converter"
        for member in tar:
            name = PurePosixPath(member.name)
            inside = "/".join(name.parts[3:])  # below llama_cpp_python-VERSION/vendor/llama.cpp
            wanted = inside.startswith(CONVERTER_PARTS) and "/scripts/" not in inside
            source = tar.extractfile(member) if wanted and member.isfile() else None
            if source:
                target = work / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
        work.replace(folder)


def build_wheel(sdist: Path, folder: Path, flags: list[str]) -> Path:
    """Compile the wheel; it appears in the cache when it is whole."""
    check_compiler()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        shutil.unpack_archive(sdist, work)
        source = work / f"llama_cpp_python-{VERSION}"
        leave_out_helpers(source / "CMakeLists.txt")
        command = [*PIP, "wheel", "--no-deps", "--verbose", "--wheel-dir", str(work / "out")]
        command += ["--config-settings", f"wheel.exclude={WHEEL_EXCLUDES}", str(source)]
        label = "compiling llama.cpp (once, about 5 minutes on 2 cores)"
        run(label, command, CMAKE_ARGS=" ".join(flags))
        (work / "out").replace(folder)
    return next(folder.glob("*.whl"))


def get_tool(cache: Path, name: str) -> Path:
    """Return a program of llama.cpp, such as llama-perplexity, compiling it on first use.

    Only benchmarks need one: with the wheel's flags, which they compare with the wheel. It needs
    CMake and Ninja, and takes about 10 minutes on 2 cores.
    """
    flags = cmake_flags()
    file = cache / "tools" / wheel_key(flags) / name
    with locked(cache):
        if not file.is_file():
            build_tool(get_sdist(cache), file, flags)
    return file


def build_tool(sdist: Path, file: Path, flags: list[str]) -> None:
    """Compile one program; it appears in the cache when it is whole."""
    check_compiler()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        shutil.unpack_archive(sdist, temporary)
        source = Path(temporary, f"llama_cpp_python-{VERSION}", "vendor", "llama.cpp")
        build = str(Path(temporary, "build"))
        command = ["cmake", "-S", str(source), "-B", build, "-G", "Ninja", *flags, *TOOL_FLAGS]
        run(f"configuring {file.name}", command)
        run(f"compiling {file.name} (once, about 10 minutes)", ["ninja", "-C", build, file.name])
        Path(build, "bin", file.name).replace(file)


def leave_out_helpers(cmake_lists: Path) -> None:
    """Switch off the helper library, which this file forces on for every build."""
    text = cmake_lists.read_text()
    if HELPERS_ON not in text:
        raise LlamaCppError(f"{cmake_lists.name} has changed: {HELPERS_ON!r} isn't there")
    cmake_lists.write_text(text.replace(HELPERS_ON, HELPERS_ON.replace(" ON ", " OFF ")))


def check_compiler() -> None:
    """Say what to install before minutes are spent on finding out."""
    candidates = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in candidates if name):
        raise LlamaCppError(
            "llama.cpp has to be compiled and there is no C++ compiler. Install one: "
            "`apt-get install build-essential` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora), "
            "`xcode-select --install` (macOS)."
        )


def run(label: str, command: list[str], **env: str) -> None:
    """Run a long command with its time and compile steps shown; on failure show its last lines."""
    with tempfile.NamedTemporaryFile("w+", errors="replace") as log:
        command = [*(["nice"] if shutil.which("nice") else []), *command]
        env = {**os.environ, **env}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            follow(process, label, Path(log.name))
        finally:
            if process.poll() is None:
                process.terminate()
        if process.returncode:
            tail = "\n".join(Path(log.name).read_text(errors="replace").splitlines()[-30:])
            raise LlamaCppError(f"{label} failed with code {process.returncode}:\n{tail}")


def follow(process: subprocess.Popen[bytes], label: str, log: Path) -> None:
    """Show progress until the process ends: a line that changes, or plain lines without a tty."""
    tty = sys.stderr.isatty()
    started, shown = time.monotonic(), -30.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        elapsed = time.monotonic() - started
        ended = process.returncode is not None
        if tty or ended or elapsed - shown >= 30:
            steps = re.findall(r"^\s*(\[\d+/\d+\])", log.read_text(errors="replace"), re.MULTILINE)
            text = f"{label}: {int(elapsed // 60)}m{int(elapsed % 60):02}s {''.join(steps[-1:])}"
            print(
                text.rstrip(), end="\r" if tty and not ended else "\n", file=sys.stderr, flush=True
            )
            shown = elapsed
        if ended:
            return


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Let one process at a time fill the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "llama-cpp.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
