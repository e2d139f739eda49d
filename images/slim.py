#!/usr/bin/env python3
"""Take out of an installed environment what a container never runs, then compile the rest.

`slim.py FOLDER` removes the packages' own tests, C++ headers, type stubs and, beside a CPU build
of torch, the CUDA libraries of bitsandbytes. Bytecode is written here, at build time, because the
container's root is read-only; it is checked by no timestamp, since layers may change those.
"""

from __future__ import annotations

import compileall
import py_compile
import re
import shutil
import sys
from pathlib import Path

# Named one by one: some packages import a folder called `testing`, and a few even one called
# `tests`. Headers serve torch.compile's C++ code, which needs a compiler that isn't there anyway.
UNNEEDED = (
    "networkx/**/tests",
    "numpy/**/tests",
    "pandas/tests",
    "pyarrow/include",
    "pyarrow/src",
    "pyarrow/tests",
    "sympy/**/tests",
    "torch/bin/*Test",
    "torch/bin/protoc*",
    "torch/bin/test_*",
    "torch/include",
    "torch/share",
    "studio",  # Unsloth's web interface
    "torch/test",
    "**/*.a",
    "**/*.pyi",
)
CUDA_ONLY = tuple(f"bitsandbytes/libbitsandbytes_{kind}*" for kind in ("cuda", "rocm", "xpu"))


def main(folder: Path) -> None:
    """Slim every site-packages below the folder and compile it."""
    for site in sorted(folder.glob("lib/python3*/site-packages")) or [folder]:
        freed = remove(site, UNNEEDED)
        if not has_cuda(site):
            freed += remove(site, CUDA_ONLY)
        print(f"{site}: {freed / 1e6:.0f} MB left out")
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(folder, quiet=2, workers=0, invalidation_mode=mode)


def remove(site: Path, patterns: tuple[str, ...]) -> int:
    """Delete what matches and return how many bytes that was."""
    freed = 0
    for pattern in patterns:
        for path in sorted(site.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                freed += sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
                shutil.rmtree(path)
            elif path.exists():
                freed += path.lstat().st_size
                path.unlink()
    return freed


def has_cuda(site: Path) -> bool:
    """Tell a CUDA build of torch from a CPU one without importing it."""
    version = site / "torch" / "version.py"
    if not version.is_file():
        return False
    return not re.search(r"^cuda\b.*= None$", version.read_text(), re.MULTILINE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
