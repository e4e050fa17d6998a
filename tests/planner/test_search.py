from collections import Counter
from dataclasses import replace

import pytest

from megavlm.config.load import load_plan
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import data_parallel_ranks, samples_per_micro_batch
from megavlm.errors import ConfigError
from megavlm.planner.choice import layout_name
from megavlm.planner.hardware import cluster_of
from megavlm.planner.search import (
    FILLED,
    Found,
    candidate_of,
    fastest_in,
    planned_stage,
    search,
)
from tests.planner import recipe
from tests.runs import RUN, load_run

TINY = ("model={preset: vlm-tiny}", "data.row_tokens=32", "train.micro_batches=4")
CLUSTER = cluster_of("h100-80", 2, 4)
TEXT = 20
HOST = ("none", "cpu")


def tiny(*overrides):
    return load_run(RUN, [*TINY, *overrides])


def stage(*overrides):
    return Stage("other", tiny(*overrides), 0)


def smaller_gpus(memory_bytes):
    return replace(CLUSTER, gpu=replace(CLUSTER.gpu, memory_bytes=int(memory_bytes)))


@pytest.fixture(scope="module")
def found():
    return search(tiny(), CLUSTER, TEXT)


def test_every_engine_and_layout_is_compared(found):
    """Of 6 decoder layers, 2 key/value heads and 32 samples on 2 hosts of 4."""
    tensor_by_pipeline = {(t, p) for t in (1, 2) for p in (1, 2, 4)}  # 8 exceeds the layers
    names = {f"Megatron TP{t} x PP{p}" for t, p in tensor_by_pipeline}
    names |= {f"Megatron TP{t} x PP2 x VP{v}" for t in (1, 2) for v in (2, 3)}  # up to 6 chunks
    names |= {"FSDP2", "FSDP2 hybrid 4", "ZeRO-3", "ZeRO-3, hpZ 4", "ZeRO-3, hpZ 4, quantised"}
    names |= {"ZeRO-3, optimiser on cpu", "ZeRO-3, hpZ 4, optimiser on cpu"}
    names |= {"ZeRO-3, optimiser on cpu, parameters on cpu"}
    assert {layout_name(candidate.run) for candidate in found.ranked} == names
    for name in names:
        same = [c.run.train for c in found.ranked if layout_name(c.run) == name]
        ways = {(train.micro_batches, train.recompute) for train in same}
        assert len(ways) == len(same)
        assert {recompute for _, recompute in ways} == {"none", "selective", "full"}
    batches = {c.run.train.micro_batches for c in found.ranked if layout_name(c.run) == "FSDP2"}
    assert batches == {1, 2, 4}  # 32 samples on 8 ranks


def test_the_runs_own_number_of_micro_batches_is_compared():
    run = tiny("train.samples_per_step=72", "train.micro_batches=9")
    zero3 = search(run, CLUSTER, TEXT, ["zero3"]).ranked
    assert {candidate.run.train.micro_batches for candidate in zero3} == {1, 9}


def test_all_of_zero3_is_compared_whatever_the_run_has():
    quantised = ("zero3.quantized_weights=true", "zero3.quantized_gradients=true")
    offloaded = ("zero3.offload_optimizer=cpu",)
    own = ("zero3.offload_parameters=cpu", "zero3.secondary_partition=2", "zero3.reduce_bucket=77")
    ranked = search(tiny(*quantised, *offloaded, *own), CLUSTER, TEXT, ["zero3"]).ranked
    names = ("secondary_partition", "quantized_weights", "quantized_gradients")
    names += ("offload_optimizer", "offload_parameters", "nvme_folder", "reduce_bucket")
    found = {tuple(getattr(c.run.zero3, name) for name in names) for c in ranked}
    assert found == {
        *((near, False, False, host, "none", None, 77) for near in (1, 4) for host in HOST),
        (1, False, False, "cpu", "cpu", None, 77),
        (4, True, True, "none", "none", None, 77),
        (2, True, True, "cpu", "cpu", None, 77),  # as it stands
    }


def test_a_layout_that_cannot_start_is_not_compared():
    """A partition of 8 would span two hosts."""
    ranked = search(tiny("zero3.secondary_partition=8"), CLUSTER, TEXT, ["zero3"]).ranked
    assert {candidate.run.zero3.secondary_partition for candidate in ranked} == {1, 4}


def test_every_candidate_is_a_run_that_divides(found):
    for candidate in found.ranked:
        run = replace(candidate.run)  # checks its settings
        copies = data_parallel_ranks(run, CLUSTER.ranks)
        samples = samples_per_micro_batch(run.train, copies)
        assert samples * copies * run.train.micro_batches == run.train.samples_per_step
        assert replace(run, train=tiny().train, engine="zero3", **engines(tiny())) == tiny()
        parallel = run.model_parallel
        assert parallel.sequence_parallel == (parallel.tensor_parallel > 1)
        assert parallel.overlap_communication and parallel.chunk_layers is None  # the cut balances
        pipeline = parallel.pipeline_parallel
        assert len(candidate.memory) == pipeline


def engines(run):
    return {name: getattr(run, name) for name in ("zero3", "fsdp2", "megatron")}


def test_what_does_not_divide_is_counted_by_the_rule(found):
    whole = "train.samples_per_step=32 is not divisible by train.micro_batches=8 x data_parallel=8"
    [count] = [n for rule, n in found.refused.items() if rule.startswith(whole)]
    # FSDP2 twice, ZeRO-3 six times, Megatron once; three modes of recomputation.
    assert count == 3 * 9


def test_what_fits_comes_first_and_the_fastest_of_it(found):
    sizes = sorted(candidate.fullest.total for candidate in found.ranked)
    cluster = smaller_gpus(sizes[len(sizes) // 2] / FILLED)
    ranked = search(tiny(), cluster, TEXT).ranked
    fits = [max(m.total for m in c.memory) <= FILLED * cluster.gpu.memory_bytes for c in ranked]
    assert 0 < sum(fits) < len(fits) and fits == sorted(fits, reverse=True)
    assert [candidate.fits for candidate in ranked] == fits
    for group in (True, False):
        same = zip(ranked, fits, strict=True)
        seconds = [c.prediction.seconds for c, fit in same if fit == group]
        assert seconds == sorted(seconds)
    best = Found(ranked, Counter()).best
    assert best is ranked[0]


FAST = ("train.precision=bf16", "zero3.overlap_communication=true")


def test_where_all_wait_for_the_loader_the_step_decides(found):
    ranked = search(tiny("train.samples_per_step=1024", *FAST), CLUSTER, TEXT).ranked
    same = [c for c in ranked if c.prediction.data_seconds == ranked[0].prediction.data_seconds]
    assert all(c.prediction.data_seconds > c.prediction.step.seconds for c in same)
    steps = [candidate.prediction.step.seconds for candidate in same]
    assert len(steps) > 10 and steps == sorted(steps)


def test_the_best_rounds_nothing(found):
    [slow, *_] = [c for c in found.ranked if c.run.engine == "fsdp2"]
    for name in ("quantized_weights", "quantized_gradients"):
        rounds = replace(tiny().zero3, **{name: True})
        candidate = candidate_of(tiny("engine=zero3"), CLUSTER, TEXT)
        candidate = replace(candidate, run=replace(candidate.run, zero3=rounds))
        assert candidate.rounds
        assert Found([candidate, slow], Counter()).best is slow
    # Settings of another engine round nothing.
    ignored = replace(slow, run=replace(slow.run, zero3=rounds))
    assert not ignored.rounds


def test_nothing_fits():
    with pytest.raises(ConfigError) as error:
        _ = search(tiny(), smaller_gpus(2**30), TEXT).best
    told = "no layout fits 8 x H100 80 GB: the smallest needs 2 GiB a GPU; take more hosts or GPUs"
    assert str(error.value) == f"{told} with more memory"


def test_the_smallest_that_is_told_rounds_nothing(found):
    large = [c for c in found.ranked if not c.fits] or found.ranked
    exact = min((c for c in large if not c.rounds), key=lambda c: c.fullest.total)
    run = replace(exact.run, engine="zero3", zero3=replace(tiny().zero3, quantized_weights=True))
    small = replace(exact.memory[0], activations=0)
    gpu = smaller_gpus(2**20)
    ranked = [replace(exact, cluster=gpu), replace(exact, run=run, memory=(small,), cluster=gpu)]
    assert ranked[1].rounds and ranked[1].fullest.total < exact.fullest.total
    with pytest.raises(ConfigError, match=f"needs {exact.fullest.total / 2**30:.0f} GiB a GPU"):
        _ = Found(ranked, Counter()).best


def test_one_small_gpu_runs_from_the_hosts_memory():
    ranked = search(recipe.PLAIN, cluster_of("a100-40", 1, 1), TEXT, ["zero3"])
    assert layout_name(ranked.best.run) == "ZeRO-3, optimiser on cpu, parameters on cpu"


def test_nothing_divides():
    with pytest.raises(ConfigError) as error:
        run = tiny("train.samples_per_step=31", "train.micro_batches=1")
        search(run, CLUSTER, TEXT, ["zero3", "fsdp2"])
    told = str(error.value)
    assert told.startswith("no layout divides: train.samples_per_step=31 is not divisible by")
    assert "\n" not in told and told.endswith(
        "; try 24 or 32, or train.micro_batch_samples; or change the hosts"
    )


@pytest.mark.parametrize("function", [candidate_of, search])
def test_pretraining_is_refused(function):
    run = tiny("objectives={mim: 1, contrastive: 1}")
    with pytest.raises(ConfigError) as error:
        function(run, CLUSTER, TEXT)
    told = "a stage of mim, contrastive is not predicted; plan one of captioning or instruction"
    assert str(error.value).startswith(told)


def test_hosts_of_one_gpu_and_one_host():
    """No layout stands there twice."""
    for hosts, gpus in ((1, 1), (4, 1), (1, 4)):
        ranked = search(tiny(), cluster_of("h100-80", hosts, gpus), TEXT).ranked
        settings = [repr((c.run.engine, c.run.train, engines(c.run))) for c in ranked]
        [(_, most)] = Counter(settings).most_common(1)
        assert most == 1
        names = Counter(layout_name(candidate.run) for candidate in ranked)
        assert f"FSDP2 hybrid {hosts * gpus}" not in names  # all ranks: FSDP2


def test_only_the_engines_asked_for():
    ranked = search(tiny(), CLUSTER, TEXT, ["fsdp2"]).ranked
    assert {candidate.run.engine for candidate in ranked} == {"fsdp2"}


def test_all_stages_of_a_plan_divide():
    """They share the layout, each with a batch of its own."""
    short = stage("train.samples_per_step=8", "train.micro_batches=1")
    # Pre-training runs without a pipeline, in micro-batches of its own.
    first = stage("train.samples_per_step=4", "train.micro_batches=1", "objectives={mim: 1}")
    alone, adapted, shared = (
        search(tiny(), CLUSTER, TEXT, other_stages=stages).ranked
        for stages in ([], [short], [first])
    )
    # One micro-batch cannot be interleaved, but 2 can.
    assert {c.run.megatron.virtual_pipeline for c in alone} == {1, 2, 3}
    assert [candidate.run for candidate in adapted] == [candidate.run for candidate in alone]
    left = [
        c.run for c in alone if c.run.engine == "megatron" and c.run.megatron.tensor_parallel == 2
    ]
    assert [candidate.run for candidate in shared] == left != []
    told = r"^no layout divides: stages.other: train.samples_per_step=4 is not"
    with pytest.raises(ConfigError, match=told):
        stages = [stage("train.samples_per_step=4", "train.micro_batches=1")]
        search(tiny(), CLUSTER, TEXT, ["fsdp2"], other_stages=stages)


def test_all_stages_of_a_plan_fit():
    """One of longer rows decides; one of pre-training is not predicted."""
    long = stage("data.row_tokens=64", "train.micro_batches=1", "train.samples_per_step=64")
    pretraining = Stage("first", tiny("objectives={mim: 1}"), 0)
    alone = search(tiny(), CLUSTER, TEXT, ["fsdp2"]).ranked
    shared = search(tiny(), CLUSTER, TEXT, ["fsdp2"], other_stages=[pretraining, long]).ranked
    for before, after in zip(alone, shared, strict=True):
        assert set(after.other_stages) == {"other"}
        same = replace(long.run, engine="fsdp2", fsdp2=after.run.fsdp2)
        [memory] = candidate_of(same, CLUSTER, TEXT).memory
        assert after.fullest == memory and memory.total > before.fullest.total
        assert after == candidate_of(after.run, CLUSTER, TEXT, [pretraining, long])
    cluster = smaller_gpus(max(c.fullest.total for c in alone) / FILLED + 1)
    assert all(c.fits for c in search(tiny(), cluster, TEXT, ["fsdp2"]).ranked)
    # In more micro-batches it fits, too; the longest rows do not in any.
    both = search(tiny(), cluster, TEXT, ["fsdp2"], other_stages=[long])
    assert all(c.fits for c in both.ranked)
    assert not any(candidate_of(c.run, cluster, TEXT, [long]).fits for c in both.ranked)
    longest = stage("data.row_tokens=16384", "train.micro_batches=1", "train.samples_per_step=64")
    neither = search(tiny(), cluster, TEXT, ["fsdp2"], other_stages=[longest])
    assert not any(c.fits for c in neither.ranked) and neither.chosen is None
    # Then it is taken as it needs least, which the error tells.
    least = {c.other_stages["other"].fullest.total for c in neither.ranked}
    for recompute in ("none", "selective", "full"):
        train = replace(longest.run.train, recompute=recompute)
        same = replace(longest.run, engine="fsdp2", train=train)
        assert candidate_of(same, cluster, TEXT).fullest.total >= min(least)
    with pytest.raises(ConfigError, match=f"smallest needs {min(least) / 2**30:.0f} GiB"):
        _ = neither.best


def test_the_longest_stage_is_planned():
    plan = load_plan(recipe.RUN.with_name("vlm-30b-curriculum.yaml"))
    assert planned_stage(plan).name == "captioning" != plan.stages[-1].name
    with pytest.raises(ConfigError, match=r"^a stage of mim is not predicted"):
        planned_stage(Plan((stage("objectives={mim: 1}"),)))


@pytest.mark.parametrize("engine", ["zero3", "megatron"])
def test_another_stage_in_the_chosen_layout(engine):
    """Its micro-batches and recomputation are those that a search would find there."""
    run = tiny("data.row_tokens=64", "train.samples_per_step=64", "train.recompute=full")
    layout = search(tiny(), CLUSTER, TEXT, [engine]).best.run
    best = fastest_in(layout, run, CLUSTER, TEXT)
    settings = getattr(layout, engine)
    assert (best.run.engine, getattr(best.run, engine)) == (engine, settings)
    assert best.run.data == run.data and best.run.train.samples_per_step == 64
    own = replace(run, engine=engine, **{engine: settings})
    [first, *_] = [
        c for c in search(own, CLUSTER, TEXT, [engine]).ranked if getattr(c.run, engine) == settings
    ]
    assert best.run == first.run != own and best.fits
