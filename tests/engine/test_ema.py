"""That an average follows the weights under every engine, and comes back from checkpoints."""

from functools import partial

import pytest
import torch

from megavlm.checkpoint.load import load_checkpoint
from megavlm.checkpoint.shards import whole
from megavlm.engine.ema import Ema
from megavlm.engine.start import start_engine
from megavlm.errors import ConfigError
from megavlm.files.folder import Folder
from megavlm.model.params import parameters
from tests.batches import TINY
from tests.parity.runs import CPU, LAYOUTS, SAVING, my_micro_batches, settings
from tests.ranks import run_on_ranks
from tests.runs import RUN, load_run
from tests.states import fill_from, gathered, save_checkpoint, whole_tensors

STEPS = 3
DECAY = 0.7
LAYOUT = {layout.name: layout for layout in LAYOUTS}
ENGINES = ["ZeRO-3 x2", "FSDP2 x2", "DP2"]
TRAINED = {entry.name for entry in parameters(TINY)}
# Worst measured, relative to a tensor's largest number: 1.3e-7.
BOUND = 5e-7


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def assert_averages(averages, history, trained):
    """Against the definition, in fp64, over the whole weights before and after every step."""
    assert averages.keys() == {f"ema/{name}" for name in trained}
    for name in trained:
        first, *later = [tensors[f"weights/{name}"].double() for tensors in history]
        expected = first
        for weights in later:
            expected = DECAY * expected + (1 - DECAY) * weights
        assert not torch.equal(expected, first), f"{name} does not learn"
        average = averages[f"ema/{name}"]
        assert average.dtype == torch.float32
        difference = (average.double() - expected).abs().max() / expected.abs().max()
        assert difference < BOUND, (name, float(difference))


@pytest.mark.parametrize("precision", [slow("fp32"), "bf16"])
@pytest.mark.parametrize("name", [*ENGINES, slow("TP2 SP"), slow("PP2")])
def test_the_average_follows_the_weights(name, precision):
    check_average(name, f"train.precision={precision}")


@pytest.mark.slow
def test_the_average_of_weights_in_the_hosts_memory():
    offload = ("zero3.offload_optimizer=cpu", "zero3.offload_parameters=cpu")
    check_average("ZeRO-3 x2", "train.precision=bf16", *offload)


@pytest.mark.parametrize("name", [slow("ZeRO-3 x2"), "FSDP2 x2", "DP2"])
def test_frozen_parts_have_no_average(name):
    frozen = {e.name for e in parameters(TINY) if e.setting == "encoder"}
    check_average(name, "train.frozen=[encoder]", trained=TRAINED - frozen)


def check_average(name, *overrides, trained=TRAINED):
    """Through loading, evaluation and training."""
    run = settings(LAYOUT[name], STEPS, *overrides)

    def on_rank(_):
        engine = start_engine(run, CPU)
        initial = whole_tensors(engine)
        engine.load_state(fill_from(lambda key: initial[key] + 0.01), {})
        ema = Ema(engine.state(), trained, DECAY)
        history = [whole_tensors(engine)]
        for step in range(STEPS):
            engine.step(my_micro_batches(step), 1e-2)
            ema.update()
            engine.evaluate(my_micro_batches(step))
            history.append(whole_tensors(engine))
        averages = gathered(ema.state())
        engine.close()
        return history, averages

    ranks = run_on_ranks(LAYOUT[name].ranks, on_rank, parallel=run.model_parallel)
    for history, averages in ranks:
        assert_averages(averages, history, trained)


@pytest.mark.parametrize(
    "name", ["DP2", *(slow(n) for n in ("TP2 SP", "PP2", "ZeRO-3 x2", "FSDP2 x2"))]
)
def test_an_average_comes_back_on_another_number_of_ranks(tmp_path, name):
    run = settings(LAYOUT[name], STEPS, "train.precision=bf16")
    alone = settings(None, STEPS, "train.precision=bf16", f"engine={run.engine}")

    def save(_):
        engine = start_engine(run, CPU)
        ema = Ema(engine.state(), TRAINED, DECAY)
        for step in range(STEPS):
            engine.step(my_micro_batches(step), 1e-2)
            ema.update()
        both = {**engine.state(), **ema.state()}
        checkpoint = save_checkpoint(Folder(tmp_path), STEPS, both, {}, SAVING)
        tensors = gathered(both)
        engine.close()
        return str(checkpoint), tensors

    checkpoint, saved = run_on_ranks(2, save, parallel=run.model_parallel)[0]

    def load(_):
        engine = start_engine(alone, CPU)
        ema = Ema(engine.state(), TRAINED, DECAY)
        engine.load_state(
            partial(load_checkpoint, Folder(checkpoint)), dict.fromkeys(run.trained_parts, STEPS)
        )
        load_checkpoint(Folder(checkpoint), ema.state())
        loaded = gathered({**engine.state(), **ema.state()})
        engine.step(my_micro_batches(STEPS), 1e-2)
        ema.update()
        going_on = gathered({**engine.state(), **ema.state()})
        engine.close()
        return loaded, going_on

    [(loaded, going_on)] = run_on_ranks(1, load)
    assert loaded.keys() == saved.keys()
    for key, tensor in saved.items():
        assert torch.equal(loaded[key], tensor), key
    history = [{f"weights/{key}": saved[f"ema/{key}"] for key in TRAINED}, going_on]
    averages = {key: tensor for key, tensor in going_on.items() if key.startswith("ema/")}
    assert_averages(averages, history, TRAINED)


def test_a_rank_may_hold_nothing_that_is_trained():
    ema = Ema({"weights/frozen": whole(torch.ones(2))}, {"elsewhere"}, DECAY)
    ema.update()
    assert ema.state() == {}


def test_weights_on_nvme_have_no_average():
    nvme = ["zero3.offload_optimizer=nvme", "zero3.nvme_folder=/disk", "train.ema_decay=0.9"]
    with pytest.raises(ConfigError, match=r"train.ema_decay=0.9 averages weights in memory"):
        load_run(RUN, nvme)
