"""A command as several processes of this machine, under the agent that torchrun starts."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opt_common.frameworks import LAUNCHED


def launch(command: list[str], processes: int) -> None:
    """Run `python COMMAND` as so many processes. What the first one writes is seen.

    Raises ChildProcessError, which says which and why, if one fails or is killed: all of them end then; and
    InterruptedError if this process is told to end.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it reports a death in fifty lines
    with TemporaryDirectory() as folder:
        logs = DefaultLogsSpecs(folder, redirects={rank: Std.ALL for rank in range(1, processes)})
        config = LaunchConfig(
            1, 1, processes, logs_specs=logs, run_id=LAUNCHED, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            max_restarts=0,
        )  # fmt: skip
        config.shutdown_timeout = 5  # seconds; an older PyTorch does not know it, and waits for longer
        try:
            elastic_launch(config, sys.executable)(*command)
        except SignalException as end:
            raise InterruptedError(f"stopped ({signal.Signals(end.sigval).name})") from end
        except ChildFailedError as error:
            raise ChildProcessError(_reason(error.failures, processes, Path(folder))) from error


def _reason(failures: dict[int, ProcessFailure], processes: int, logs: Path) -> str:
    """Why processes failed: what one was killed by, what one said, or the end of what one wrote."""
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # by which the others are ended
            memory = ". If you did not kill it, the host has run out of memory" * (-failure.exitcode == signal.SIGKILL)
            return (
                f"process {rank} of {processes} was killed ({failure.signal_name()}), and the others ended with it"
                f"{memory or _last(rank, logs)}. Start the command again: with --output it goes on where it was"
            )
    for rank, failure in sorted(failures.items()):
        if Path(failure.error_file).is_file():
            return f"process {rank} of {processes}: {failure.message}" if rank else failure.message
    rank = min(failures)
    return f"process {rank} of {processes} failed{_last(rank, logs)}"


def _last(rank: int, logs: Path) -> str:
    """The last line that a process wrote to stderr, after a colon, if that was not seen."""
    written = [line for path in logs.glob(f"**/{rank}/stderr.log") for line in path.read_text().splitlines()]
    return f": {written[-1]}" if written else ""
