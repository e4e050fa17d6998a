from collections import Counter

import pytest

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.model.params import parameters_of
from megavlm.planner.predict import cut_blocks
from megavlm.planner.work import head, model_blocks, tokens_of
from tests.planner.test_cut import RUN
from tests.runs import load_run

LEFT_OUT = {"encoder": 4e-4, "projector": 1e-9, "decoder": 1e-9, "cross_attention": 1e-6}
"""Biases, the encoder's outer norms and gates, of a part: measured 3.5e-4, 0, 0 and 6.7e-7."""


def blocks_of(run, samples=16, tokens_per_text=64):
    return model_blocks(run, tokens_of(run, samples, tokens_per_text), run.model_parallel)


@pytest.mark.parametrize("frozen", ["[]", "[encoder]", "[encoder, decoder]"])
def test_blocks_hold_the_parameters_of_the_ledger(frozen):
    run = load_run(RUN, [f"train.frozen={frozen}"])
    blocks, whole, found = blocks_of(run), Counter(), Counter()
    for entry in parameters_of(run):
        whole[entry.setting] += entry.numel
    for block in blocks:
        found[block.part] += block.parameters
    assert whole.keys() == found.keys() == LEFT_OUT.keys()
    for part, error in LEFT_OUT.items():
        assert found[part] == pytest.approx(whole[part], rel=error), part
    assert found.total() == pytest.approx(whole.total(), rel=3e-5)  # measured 2.1e-5
    assert {block.part for block in blocks if block.trained} == {*run.trained_parts}


def test_tensor_parallel_ranks_hold_a_part_each():
    run = load_run(RUN, ["engine=megatron", "megatron.tensor_parallel=4"])
    whole = {block.name: block.parameters for block in blocks_of(load_run(RUN))}
    for block in blocks_of(run):
        shards = 1 if block.name in ("patches", "projector") else 4
        assert block.parameters == pytest.approx(whole[block.name] / shards, rel=1e-3)


def test_the_encoder_lies_in_the_first_chunk_and_the_head_in_the_last():
    run = load_run(RUN)
    blocks = blocks_of(run)
    chunks = cut_blocks(
        run, blocks, MegatronSettings(pipeline_parallel=3, chunk_layers=(2, 30, 40))
    )
    assert [block for chunk in chunks for block in chunk] == blocks
    assert [len(chunk) for chunk in chunks] == [1 + 48 + 2 + 2, 30, 40 + 1]
    assert chunks[2][-1].name == "head"


def test_gradients_pass_through_what_is_frozen_only_behind_what_is_trained():
    run = load_run(RUN, ["train.frozen=[encoder, decoder]"])
    passes = {block.name: block.passes_gradients for block in blocks_of(run)}
    assert not passes["patches"] and not passes["encoder layer"] and not passes["projector"]
    assert passes["cross-attention layer"] and passes["head"]
    # Texts meet images, whose projector is trained, in the first cross layer.
    decoder = blocks_of(run)[-run.model.decoder.layers - 1 :]
    first = run.model.decoder.cross_layers[0]
    assert [b.passes_gradients for b in decoder] == [n >= first for n in range(len(decoder))]
    assert not passes["embedding"]
    run = load_run(RUN, ["train.frozen=[encoder, projector, cross_attention]"])
    blocks = blocks_of(run)
    keeping = {block.name for block in blocks if block.keeps}
    assert keeping == {"embedding", "self-attention layer", "cross-attention layer", "head"}


def test_the_loss_streams_fp32_at_either_precision():
    def bytes_of_logit(value_bytes):
        block = head(128, 1000, 10, value_bytes=value_bytes)
        return value_bytes * block.streamed_values / (10 * 1000)

    # 5 passes in fp32; logits in bf16 are read and written in fp32 before.
    assert bytes_of_logit(4) == pytest.approx(5 * 4)
    assert bytes_of_logit(2) == pytest.approx(5 * 4 + 2 + 4)


@pytest.mark.parametrize(
    ("frozen", "alone", "sharded"),
    [
        ("[]", ["image"] * 2, ["text", "text", "image"]),
        ("[cross_attention]", ["image"] * 2, []),
        ("[encoder, projector]", ["image"] * 2, ["text", "text", "image"]),
        ("[encoder, projector, cross_attention]", [], []),
    ],
)
def test_what_only_the_backward_pass_of_a_cross_layer_sends(frozen, alone, sharded):
    """Without and with sequence parallelism."""
    sizes = {16 * 257 * 6144: "image", 4 * 256 * 6144: "text"}  # 16 samples, 4 texts in each row
    for sequence_parallel, expected in (("false", alone), ("true", sharded)):
        run = load_run(
            RUN,
            [
                *("engine=megatron", "megatron.tensor_parallel=4", f"train.frozen={frozen}"),
                f"megatron.sequence_parallel={sequence_parallel}",
            ],
        )
        layers = {block.name: block for block in blocks_of(run)}
        sent = layers["cross-attention layer"].regathered
        assert [sizes[values] for values in sent] == expected


def test_texts_fill_rows():
    run = load_run(RUN, ["data.texts_per_sample=3"])  # rows of 256 tokens
    tokens = tokens_of(run, 4, 100)
    assert (tokens.images, tokens.texts, tokens.text_tokens) == (4, 12, 1200)
    assert (tokens.rows, tokens.row_total) == (6, 6 * 256)  # two of 100 tokens in each
    longer = tokens_of(run, 4, 1000)  # cut off
    assert (longer.rows, longer.text_tokens) == (12, 12 * 256)
    assert tokens_of(run, 1, 1).rows == 1


def test_packed_rows_are_computed_whole_and_seen_in_part():
    """FLOPs of the kernels and of the tokens that are no padding."""
    layers = {b.name: b for b in blocks_of(load_run(RUN), samples=16, tokens_per_text=96)}
    layer = layers["self-attention layer"]
    rows, texts = 8, 16  # two texts of 96 tokens in each row of 256
    matrices = 2 * 6144**2 + 2 * 6144 * 1024 + 3 * 6144 * 16_192
    assert sum(m.flops for m in layer.matmuls) == 2 * rows * 256 * matrices
    assert sum(a.flops for a in layer.attentions) == 4 * rows * 256**2 * 6144
    seen = 2 * texts * 96 * matrices + 2 * texts * 96**2 * 6144  # causal: half of the pairs
    assert layer.seen_flops == pytest.approx(seen, rel=1e-12)
    assert UNDIVIDED.token_shards == 1 and layer.gathered == ()
