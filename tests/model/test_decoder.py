from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.presets import PRESETS
from megavlm.convert.llama import llama_config
from megavlm.model.decoder import build_decoder
from megavlm.model.initial import materialise
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import TINY, label_losses, random_batch
from tests.ranks import alone, run_on_ranks

Z_LOSS = 0.1
LAYOUTS = {
    "undivided": UNDIVIDED,
    "TP2": MegatronSettings(tensor_parallel=2),
    "TP2 SP": MegatronSettings(tensor_parallel=2, sequence_parallel=True),
}
# Worst measured, relative to the largest number: losses and the head's gradient 5.3e-7; the
# gradient of what the head sees, a sum over the vocabulary, 2.2e-6 (plain torch in fp32: 1.9e-6).
BOUND, HIDDEN_BOUND = 2e-6, 8e-6


@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1 and 3.2 Vision; the small 3.2
def test_scaled_rotary_frequencies_are_llamas(factor):
    sizes = replace(PRESETS["vlm-8b"].decoder, rope_base=500_000, rope_scaling=factor)
    with alone(), torch.device("meta"):
        decoder = build_decoder(
            sizes, dtype=torch.bfloat16, recompute="none", parallel=UNDIVIDED, vp_stage=None
        )
    config = LlamaConfig(**llama_config(sizes))
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1
    assert torch.equal(decoder.rotary_pos_emb.inv_freq, expected)
    unscaled = sizes.rope_base ** (-torch.arange(0, 128, 2) / 128)
    assert unscaled[-1] / expected[-1] == pytest.approx(factor)


def decoder_with(z_loss):
    with torch.device("meta"):
        return build_decoder(
            TINY.decoder,
            dtype=torch.float32,
            recompute="none",
            parallel=UNDIVIDED,
            vp_stage=None,
            z_loss=z_loss,
        )


def expected_losses(logits_bv, labels_b):
    """In plain torch, from fp64 logits."""
    log_partition_b = logits_bv.logsumexp(-1)
    return cross_entropy(logits_bv, labels_b, reduction="none") + Z_LOSS * log_partition_b.square()


def worst_difference(actual, expected):
    """Relative to the largest expected number."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


# Worst measured of gradients: fp32 6.9e-8; bf16, to which they are rounded, 3.7e-3.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, BOUND), (torch.bfloat16, 8e-3)])
def test_z_loss_of_given_logits(dtype, bound):
    generator = torch.Generator().manual_seed(1)
    logits = (8 * torch.randn(5, 3, 512, generator=generator)).to(dtype)
    labels_bt = torch.randint(512, (3, 5), generator=generator)
    weights_bt = torch.randn(3, 5, generator=generator)  # prompts weigh nothing, say
    plain = logits.double().requires_grad_()
    expected_bt = expected_losses(plain.transpose(0, 1).flatten(0, 1), labels_bt.flatten())
    expected_bt = expected_bt.view(3, 5)
    (expected_bt * weights_bt).sum().backward()
    with alone():
        leaf = logits.clone().requires_grad_()
        # The cross entropy overwrites its input, which a leaf does not allow.
        losses_bt = decoder_with(Z_LOSS).compute_language_model_loss(labels_bt, leaf * 1)
        (losses_bt * weights_bt).sum().backward()
    assert losses_bt.dtype == torch.float32
    assert worst_difference(losses_bt, expected_bt) < BOUND
    assert worst_difference(leaf.grad, plain.grad) < bound


@pytest.mark.parametrize(("z_loss", "training"), [(0.0, True), (0.0, False), (Z_LOSS, False)])
def test_without_z_loss_and_in_evaluation_the_loss_is_megatrons_to_the_bit(z_loss, training):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 3, 512, generator=generator)
    labels_bt = torch.randint(512, (3, 5), generator=generator)
    with alone():
        decoder = decoder_with(z_loss).train(training)
        outcomes = []
        for loss in (decoder.compute_language_model_loss, super_loss(decoder)):
            leaf = logits.clone().requires_grad_()
            losses_bt = loss(labels_bt, leaf * 1)
            losses_bt.sum().backward()
            outcomes.append((losses_bt, leaf.grad))
    (actual, gradient), (expected, expected_gradient) = outcomes
    assert torch.equal(actual, expected)
    assert torch.equal(gradient, expected_gradient)


def super_loss(decoder):
    return lambda labels, logits: GPTModel.compute_language_model_loss(decoder, labels, logits)


def head_of(model, batch, weights_bt):
    """Train the head on a batch once: the losses, what the head sees, its weight, gradients."""
    seen = []

    def keep(_, args):
        args[0].retain_grad()
        seen.append(args[0])

    model.language.output_layer.register_forward_pre_hook(keep)
    losses_bt = label_losses(model, batch)
    (losses_bt * weights_bt).sum().backward()
    [hidden] = seen
    weight = model.language.output_layer.weight
    return losses_bt.detach(), hidden.detach(), weight.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_z_loss_of_a_model(layout):
    """Losses, and gradients of the head and of what it sees, against plain torch in fp64."""
    parallel = LAYOUTS[layout]
    batch = random_batch(1, samples=3)
    weights_bt = torch.rand(batch.labels_bt.shape, generator=torch.Generator().manual_seed(3))

    def on_rank(_):
        with torch.device("meta"):
            model = VisionLanguageModel(TINY, dtype=torch.float32, parallel=parallel, z_loss=Z_LOSS)
        materialise(model, 1, torch.device("cpu"))
        with torch.no_grad():
            model.language.output_layer.weight.mul_(20)  # so that some words are likely
        return head_of(model, batch, weights_bt)

    ranks = run_on_ranks(parallel.tensor_parallel, on_rank, parallel=parallel)
    losses, hidden, weights, hidden_gradients, weight_gradients = zip(*ranks, strict=True)
    shards = slice(None) if parallel.sequence_parallel else slice(1)  # of what the head sees
    hidden_tbw = torch.cat(hidden[shards]).double().requires_grad_()
    weight_vw = torch.cat(weights).double().requires_grad_()
    logits_bv = (hidden_tbw.transpose(0, 1) @ weight_vw.t()).flatten(0, 1)
    expected_bt = expected_losses(logits_bv, batch.labels_bt.flatten()).view(weights_bt.shape)
    (expected_bt * weights_bt).sum().backward()
    assert logits_bv.std() > 1
    for losses_bt in losses:
        assert worst_difference(losses_bt, expected_bt) < BOUND
    assert worst_difference(torch.cat(weight_gradients), weight_vw.grad) < BOUND
    assert worst_difference(torch.cat(hidden_gradients[shards]), hidden_tbw.grad) < HIDDEN_BOUND
