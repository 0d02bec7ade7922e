"""`anyflow sweep cluster=slurm`: one SLURM job per run, through submitit."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import SweepOptions
from anyflow_train.errors import UserError, reason_of, requires_extra
from anyflow_train.sweep.combinations import Combination

POLL_SECONDS = 5.0


class Training:
    """One run inside of its job. If the job's time ends, the run saves, and the job is queued again.

    Args:
        arguments: arguments of `anyflow`.
        spent: CPU seconds of earlier starts.
    """

    def __init__(self, arguments: Sequence[str], spent: float = 0.0) -> None:
        self.arguments, self.spent = list(arguments), spent

    def __call__(self) -> tuple[int, float]:
        """Train to the end. Returns the exit code, and the CPU seconds of all starts."""
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        command = [sys.executable, "-m", "anyflow_train", *self.arguments]
        # SLURM sends submitit's signal to all processes of the job, and it would end the run at once.
        ignored = partial(signal.signal, signal.SIGUSR2, signal.SIG_IGN)
        with subprocess.Popen(command, env=own, preexec_fn=ignored) as process:
            self.pid = process.pid
            code = process.wait()
        return code, self._spent()

    def checkpoint(self, *_: Any) -> Any:
        """Stop the run cleanly. Returns what submitit queues again; it resumes from the run's checkpoint."""
        import submitit

        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)
        return submitit.helpers.DelayedSubmission(Training(self.arguments, self._spent()))

    def _spent(self) -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return self.spent + used.ru_utime + used.ru_stime


def finish_all(
    combinations: Sequence[Combination], options: SweepOptions, more: Sequence[str], report: Callable[[], object]
) -> None:
    """Submit one job per run that is not finished, and wait for all of them.

    Args:
        options: `cluster` (slurm, or local for processes of this machine) and `slurm`, parameters of submitit, such as
            `timeout_min`, `gpus_per_node` and `slurm_partition`.
        more: additional options of every run.
        report: called while jobs end.

    Raises:
        UserError: the extra `slurm` is not installed, or submitit refuses the parameters.
    """
    with requires_extra("cluster", "slurm"):
        import submitit
    waiting = [one for one in combinations if one.state != "finished"]
    if not waiting:
        return
    try:
        executor = submitit.AutoExecutor(waiting[0].folder.parent / "jobs", cluster=options.cluster)
        executor.update_parameters(**options.slurm)
    except (RuntimeError, NameError, AssertionError, TypeError, ValueError) as error:
        raise UserError("slurm", f"submitit refuses it: {reason_of(error)}") from error
    with executor.batch():
        jobs = [executor.submit(Training(["train", *one.overrides, *more])) for one in waiting]
    for one, job in zip(waiting, jobs, strict=True):
        print(f"== {one.label}: job {job.job_id}, output in {Path(job.paths.stdout).parent}", flush=True)
    left = dict(zip(map(id, jobs), zip(waiting, jobs, strict=True), strict=True))
    while left:
        for key, (one, job) in list(left.items()):
            if job.done():
                del left[key]
                code, seconds = (1, 0.0) if job.exception() else job.result()
                one.cpu_seconds += seconds
                one.update("stopped" if code == 0 else "failed")
                report()
        time.sleep(POLL_SECONDS * bool(left))
