"""Command line: python -m hack.chaos --jobs 200 --faults 300 --seed 7"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hack import REPOSITORY
from hack.chaos.course import Outcome, Run
from hack.chaos.promises import PROMISES
from hack.kwok.cluster import KwokCluster
from hack.operator_process import install
from hack.process import ClusterError

INTERRUPTED = 130


def main() -> int:
    """Run it; 0 if every promise was kept, 1 if one was broken, 2 if it couldn't run."""
    options = _parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has them ignored
        signal.signal(number, signal.default_int_handler)
    seed = options.seed if options.seed is not None else random.SystemRandom().randint(1, 99999)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"chaos with seed {seed}: {options.jobs} FineTuneJobs, {options.faults} faults")
    code = 2
    try:
        with KwokCluster(folder) as cluster:
            cluster.add_node("fake-1")
            install(cluster.plane, options.checkout)
            run = Run(
                cluster,
                folder,
                jobs=options.jobs,
                faults=options.faults,
                seed=seed,
                checkout=options.checkout,
                say=lambda words: print(words, flush=True),
            )
            outcome = run()
        print(figures(outcome))
        code = 1 if outcome.findings.broken else 0
    except ClusterError as error:
        print(f"chaos: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("chaos: interrupted; nothing was checked", file=sys.stderr)
        code = INTERRUPTED
    if code in (0, INTERRUPTED):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"the logs are in {folder}", file=sys.stderr)
    return code


def figures(outcome: Outcome) -> str:
    """The table of a run, and each promise that was broken."""
    courses = Counter(str(subject.course) for subject in outcome.subjects)
    rows = [
        f"Kubernetes {outcome.version}, seed {outcome.seed}, {outcome.seconds:.0f} s, of which "
        f"{outcome.rest_seconds:.0f} s after the last fault",
        "",
        _table("FineTuneJobs", courses),
        _table("faults", outcome.faults),
        _table("requests and events that met one", outcome.met),
        *_promises(outcome),
    ]
    if outcome.ended_by_itself:
        rows.append(f"The operator has ended by itself {outcome.ended_by_itself} times.")
    if outcome.gaps:
        rows.append(f"The recorder's watches began anew {outcome.gaps} times.")
    rows += [f"ran again, since {each}" for each in outcome.findings.excused]
    rows += [f"BROKEN {e.promise}: {e.job}: {e.words}" for e in outcome.findings.broken]
    return "\n".join(rows)


def _table(title: str, counts: Counter[str]) -> str:
    lines = [f"{counts.total():>6}  {title}"]
    lines += [f"{count:>6}    {name}" for name, count in counts.most_common()]
    return "\n".join([*lines, ""])


def _promises(outcome: Outcome) -> list[str]:
    broken = Counter(each.promise for each in outcome.findings.broken)
    lines = [f"{'promise':<28} {'checked on':<22} broken"]
    for promise in PROMISES:
        lines.append(f"{promise:<28} {outcome.findings.checked[promise]:<22} {broken[promise]}")
    return [*lines, ""]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hack.chaos", description=main.__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="FineTuneJobs (default 200)")
    parser.add_argument("--faults", type=int, default=300, help="faults (default 300)")
    parser.add_argument("--seed", type=int, help="of the same jobs and order of faults")
    parser.add_argument(
        "--checkout", type=Path, default=REPOSITORY, help="try the operator of another checkout"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
