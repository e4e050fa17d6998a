"""Calls of functions on all cores of a machine or of a cluster, by Ray Data."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from megavlm.config.filters import FilterSettings
from megavlm.errors import ConfigError, DataError, MegavlmError
from megavlm.files.folder import Folder
from megavlm.filters.output import WORK
from megavlm.terminal import with_progress

OBJECT_STORE_BYTES = 256 * 2**20
"""Of an embedded Ray; only names and counts pass through it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all workers are told."""

    rules: FilterSettings
    source: str
    target: str
    part_samples: int
    """About as many are in a group of shards, and in a part of a band."""

    @property
    def work(self) -> Folder:
        """For what is not training data, within the new folder."""
        return Folder(self.target) / WORK

    @property
    def verdicts(self) -> Folder:
        """What was found about each sample."""
        return self.work / "verdicts"


InParallel = Callable[..., Iterator[tuple[Any, float]]]
"""(what is shown, function, arguments of each call, GPUs of each): calls function(job, *arguments),
and yields what it returns, JSON-safe, with the seconds it took; in any order."""


@contextmanager
def ray_workers(job: Job, address: str | None, workers: int | None) -> Iterator[InParallel]:
    """Start Ray, or connect to a cluster, as long as it is needed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",  # not one that an environment variable names
                num_cpus=workers or os.cpu_count(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
    except Exception as error:  # it says so by a plain one that 30 seconds were too few to start
        said = " ".join(str(error).split())
        if address is not None:
            raise ConfigError(
                f"cannot reach a Ray cluster at {address}: {said}; see `ray status` there"
            ) from error
        raise ConfigError(
            f"cannot start Ray on this machine: {said}; run again when the machine is less busy"
        ) from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if job.rules.gpus_per_worker > gpus:  # it would wait for one for ever
            raise ConfigError(
                f"gpus_per_worker={job.rules.gpus_per_worker:g}, but Ray has {gpus:g} GPUs; set it "
                "to 0 to run checkpoints on CPUs"
            )
        settings = ray.data.DataContext.get_current()
        settings.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        yield partial(_in_parallel, job, workers)
    finally:
        ray.shutdown()


def _in_parallel(
    job: Job,
    workers: int | None,
    shown: str,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    gpus: float = 0,
) -> Iterator[tuple[Any, float]]:
    if not calls:
        return
    import ray.data

    rows = [{"arguments": json.dumps(call)} for call in calls]
    call: Any = _call  # the other arguments come with it
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        call,
        fn_kwargs={"function": function, "job": job},
        num_cpus=1,
        num_gpus=gpus,
        compute=ray.data.TaskPoolStrategy(size=workers),
    )
    for row in with_progress(results.iter_rows(), shown, len(rows)):
        if row["error"]:
            raise DataError(row["error"])
        yield json.loads(row["result"]), row["seconds"]


def _call(row: dict[str, Any], function: Callable[..., Any], job: Job) -> dict[str, Any]:
    """In a worker: what a function returns, or the user's mistake that it meets."""
    start, result, error = time.perf_counter(), None, ""
    try:
        result = function(job, *json.loads(row["arguments"]))
    except MegavlmError as mistake:
        error = str(mistake)
    return {
        "result": json.dumps(result),
        "error": error,
        "seconds": time.perf_counter() - start,
    }
