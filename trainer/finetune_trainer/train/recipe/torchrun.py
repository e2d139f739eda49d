"""A program: torchrun, whose exit status is here that of the worker that failed first."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from finetune_trainer.runtime.logs import set_up_libraries


def main(arguments: list[str]) -> int:
    """Run with torchrun's own arguments. A worker killed by a signal gives 128 + its number."""
    set_up_libraries()
    # The worker logs why it failed. torchrun would add a page.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        # A killed worker takes the others with it, maybe before torchrun looks.
        statuses = [failure.exitcode for failure in error.failures.values()]
        status = next((status for status in statuses if status < 0), first.exitcode)
        return status if status >= 0 else 128 - status
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
