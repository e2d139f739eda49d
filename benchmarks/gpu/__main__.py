"""python -m benchmarks.gpu: says what is missing, or runs the program."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu import needs
from benchmarks.gpu.cases import CASES, select


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25, help="budget for everything")
    parser.add_argument("--cases", default="", help="only those with one of these words in them")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    parser.add_argument("--folder", type=Path, help="for models and trainings, some 25 GB")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install from beforehand")
    parser.add_argument("--tiny", action="store_true", help="run every line on a CPU")
    options = parser.parse_args()
    words = [word for word in options.cases.split(",") if word]
    if not select(words):
        names = ", ".join(case.name for case in CASES)
        parser.error(
            f"--cases: no case has one of these words: {options.cases}. There are: {names}"
        )
    if missing := needs.prepare(options.wheels, tiny=options.tiny):
        sys.exit(missing)
    from benchmarks.gpu import program  # noqa: PLC0415 - what it imports may be missing

    return program.run(
        program.Options(
            minutes=options.minutes,
            cases=words,
            output=options.output,
            folder=options.folder,
            tiny=options.tiny,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
