"""A run of several stages builds an engine for each; the memory of those that are done is free."""

import gc
from functools import partial

import pytest

from megavlm.checkpoint.load import load_checkpoint
from megavlm.engine.start import start_engine
from megavlm.files.folder import Folder
from tests.memory import live_bytes
from tests.parity.runs import CPU, LAYOUTS, SAVING, my_micro_batches, settings
from tests.ranks import run_on_ranks
from tests.states import save_checkpoint

LAYOUT = {layout.name: layout for layout in LAYOUTS}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ZeRO-3 x2", "FSDP2 x2", "DP2"])
def test_a_closed_engine_keeps_nothing(name, precision, tmp_path):
    """Each goes on from the checkpoint of the one before it, as stages do."""
    layout = LAYOUT[name]
    run = settings(layout, 3, f"train.precision={precision}")

    def one_after_the_other(_):
        sizes, checkpoint = [live_bytes()], None
        for step in (1, 2, 3):
            engine = start_engine(run, CPU)
            if checkpoint is not None:
                engine.load_state(partial(load_checkpoint, checkpoint), {})
            engine.step(my_micro_batches(0), 1e-3)
            checkpoint = save_checkpoint(Folder(str(tmp_path)), step, engine.state(), {}, SAVING)
            while_open = live_bytes()
            engine.close()
            del engine
            gc.collect()
            sizes.append(live_bytes())
        return while_open, sizes

    for while_open, (at_first, *after) in run_on_ranks(
        layout.ranks, one_after_the_other, parallel=run.model_parallel
    ):
        # At most 0.9 kB by engine, of 1.2 to 2.4 MB; also after those that have read a checkpoint.
        assert max(after) - at_first < 0.01 * while_open, (while_open, at_first, after)
