"""Bucket sizes of ZeRO-3, from the ledger of parameters."""

import re
from collections import Counter
from dataclasses import replace

from megavlm.config.run import RunSettings
from megavlm.model.params import parameters_of

SMALLEST_BUCKET = 5_000_000
"""Ten megabytes in bf16: a smaller message takes its latency's time, whatever its size."""

_LAYER = re.compile(r".*\.layers\.\d+\.")


def with_bucket_sizes(run: RunSettings) -> RunSettings:
    """The run with every size of ZeRO-3 that it leaves open chosen.

    The unit is the largest layer: most of the parameters lie in such layers, all alike.

    - prefetch_bucket, one layer: while a layer computes, the next one is gathered.
    - max_live_parameters, three units: the layer that computes, the one that is gathered, and one
      that is kept or that is no layer (the embedding, the head), which may be larger than a layer;
      and what is never divided, because DeepSpeed counts it, too.
    - persistence_threshold, the longest vector: norms, biases and gates are a thousandth of the
      model, but most of its tensors. Gathering each of them would cost a message of no size.
    - reduce_bucket, one layer: a layer's gradients are reduced while the next one computes theirs.
      It is also a buffer that is always there.
    """
    ledger = parameters_of(run)
    layers: Counter[str] = Counter()
    for entry in ledger:
        if layer := _LAYER.match(entry.name):
            layers[layer[0]] += entry.numel
    layer = max(layers.values())
    largest = max(layer, *(entry.numel for entry in ledger))
    zero3 = run.zero3
    threshold = _or(zero3.persistence_threshold, max(e.numel for e in ledger if len(e.shape) == 1))
    persistent = sum(entry.numel for entry in ledger if entry.numel <= threshold)
    bucket = max(layer, SMALLEST_BUCKET)
    return replace(
        run,
        zero3=replace(
            zero3,
            reduce_bucket=_or(zero3.reduce_bucket, bucket),
            prefetch_bucket=_or(zero3.prefetch_bucket, bucket),
            persistence_threshold=threshold,
            max_live_parameters=_or(
                zero3.max_live_parameters, 3 * max(largest, SMALLEST_BUCKET) + persistent
            ),
        ),
    )


def _or(chosen: int | None, planned: int) -> int:
    return planned if chosen is None else chosen
