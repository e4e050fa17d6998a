"""Copies of a run in the memory of its hosts: where they lie, and going on from them."""

import time

from megavlm.checkpoint.copies import Copies
from megavlm.checkpoint.damage import leave_damaged
from megavlm.checkpoint.recovery import recover, step_on_disk
from megavlm.checkpoint.state import checkpoint_bytes, checkpoint_root
from megavlm.config.plan import Plan
from megavlm.dist import groups
from megavlm.terminal import warn
from megavlm.train.events import Events
from megavlm.train.preflight import check_newest


def pass_damaged(plan: Plan, events: Events, copies: Copies | None) -> None:
    """Leave out checkpoints that are not as they were written, if they are not to stop the run.

    After `open_copies`, which may have made a newer one. Collective. Raises CheckpointError where
    none is left.
    """
    run = plan.first
    if run.checkpoint.on_damage == "stop":
        return
    root = checkpoint_root(run)
    told = leave_damaged(root)
    for line in told:
        events.write("damaged", message=line)
        if groups.rank() == 0:
            warn(f"going on from an earlier checkpoint: {line}")
    if told:
        check_newest(plan)
        if copies is not None:
            copies.on_disk = step_on_disk(root)


def open_copies(plan: Plan, events: Events) -> Copies | None:
    """Where a run keeps copies, if it does; collective.

    What they have beyond the newest checkpoint is a checkpoint then. Raises CheckpointError, on all
    ranks, where a host has no room for copies, and what `check_plan` raises of a checkpoint.
    """
    settings, started = plan.first.checkpoint, time.perf_counter()
    if settings.memory_every is None:
        return None
    root = checkpoint_root(plan.first)
    copies = Copies(root, settings)
    recovered = recover(root, copies)
    if recovered is not None:
        seconds = time.perf_counter() - started
        events.write("recovered", **recovered._asdict(), seconds=seconds)
        if groups.rank() == 0:
            print(
                f"recovered step {recovered.step} from copies in memory; the newest checkpoint "
                f"was of step {recovered.on_disk}",
                flush=True,
            )
        check_newest(plan)
    copies.check_room(max(checkpoint_bytes(stage.run) for stage in plan.stages))
    return copies
