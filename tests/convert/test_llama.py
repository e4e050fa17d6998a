import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from megavlm.checkpoint.lazy import in_memory
from megavlm.config.sizes import ModelSizes
from megavlm.convert import llama
from megavlm.errors import CheckpointError, ConfigError
from tests.batches import TINY
from tests.convert.hugging_face import (
    assert_same,
    opened,
    our_logits,
    our_model,
    saved,
    write,
)
from tests.convert.test_mllama import LLAMA3
from tests.model.weights import randomise
from tests.ranks import alone

ATOL = 3e-5  # worst measured 1.4e-5
SEEDS = range(5)


@pytest.fixture(autouse=True)
def groups():
    with alone():
        yield


def random_decoder(seed: int):
    """A Llama, or for the last seed a Mistral without its window; tied for every other seed."""
    chance = random.Random(seed)
    kv_heads = chance.choice([1, 2, 3])
    heads = kv_heads * chance.choice([1, 2, 3])
    common = {
        "vocab_size": chance.randint(60, 200),
        "hidden_size": heads * chance.choice([8, 10, 16]),
        "num_hidden_layers": 2 * chance.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": chance.choice([40, 72]),
        "rms_norm_eps": chance.choice([1e-5, 1e-6]),
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            **(LLAMA3 if seed % 3 == 0 else {"rope_type": "default"}),
            "rope_theta": chance.choice([1e4, 5e5]),
        },
        "tie_word_embeddings": seed % 2 == 1,
    }
    if seed == SEEDS[-1]:
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=None))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    randomise(model, seed)
    return model.eval()


def random_tokens(vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randint(vocabulary, (2, 30), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cross", [{"cross_every": 2}, {"cross_at": (0, 3)}], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_import_equals_the_original_on_text(seed, cross, tmp_path):
    theirs = random_decoder(seed)
    tensors, config = saved(theirs, tmp_path / "theirs")
    assert ("lm_head.weight" in tensors) == (seed % 2 == 0)
    decoder = llama.decoder_sizes_of(config, **cross)
    imported = llama.from_hugging_face(tensors, config, decoder)
    assert imported.dropped == ()
    sizes = ModelSizes(encoder=TINY.encoder, decoder=decoder)
    ours = our_model(imported.tensors, sizes)
    missing = {name for name, _ in ours.named_parameters()} - imported.tensors.keys()
    for name in missing:
        assert name.startswith(("encoder.", "projector.")) or any(
            f".layers.{i}." in name for i in decoder.cross_layers
        )
    tokens = random_tokens(decoder.vocabulary, seed)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
    actual = our_logits(ours, tokens, None)
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() < ATOL

    whole = {**imported.tensors, **in_memory({name: torch.ones(1) for name in missing})}
    exported = llama.to_hugging_face(whole, decoder)
    assert set(exported.dropped) == missing
    head = {"lm_head.weight": imported.tensors[llama.HEAD]}
    assert_same(exported.tensors, {**head, **tensors})
    write(exported.tensors, llama.llama_config(decoder), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(
            opened(LlamaForCausalLM, tmp_path / "again")(input_ids=tokens).logits, expected
        )


@pytest.mark.parametrize("more", [-13, 0, 17])
def test_another_vocabulary(more, tmp_path):
    theirs = random_decoder(0)
    tensors, config = saved(theirs, tmp_path / "theirs")
    present = config["vocab_size"]
    decoder = llama.decoder_sizes_of(config, cross_every=2, vocabulary=present + more)
    imported = llama.from_hugging_face(tensors, config, decoder)
    rows = f"[{present - 13}:{present}]"
    cut = (f"model.embed_tokens.weight{rows}", f"lm_head.weight{rows}")
    assert imported.dropped == (cut if more < 0 else ())
    ours = imported.tensors
    kept = min(present, decoder.vocabulary)
    tokens = random_tokens(kept, 0)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
    model = our_model(ours, ModelSizes(encoder=TINY.encoder, decoder=decoder))
    actual = our_logits(model, tokens, None)
    assert actual.shape[-1] == decoder.vocabulary
    assert (actual[..., :kept] - expected[..., :kept]).abs().max() < ATOL
    if more > 0:
        mean = expected.mean(-1, keepdim=True)
        assert (actual[..., present:] - mean).abs().max() < ATOL
        rows = ours[llama.EMBEDDING].read()
        assert torch.equal(rows[present:], rows[:present].mean(0).expand(more, -1))


def test_old_files(tmp_path):
    """transformers 4 wrote rotary settings apart, and buffers."""
    tensors, config = saved(random_decoder(3), tmp_path / "theirs")
    decoder = llama.decoder_sizes_of(config, cross_every=1)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    rope["type"] = rope.pop("rope_type")
    assert llama.decoder_sizes_of(config, cross_every=1) == decoder
    del config["rope_scaling"]
    assert llama.decoder_sizes_of(config, cross_every=1) == replace(decoder, rope_scaling=None)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    old = {**tensors, **in_memory({buffer: torch.ones(4)})}
    imported = llama.from_hugging_face(old, config, decoder)
    assert imported.dropped == (buffer,)
    assert_same(imported.tensors, llama.from_hugging_face(tensors, config, decoder).tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias=True .* mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu must be silu"),
        ({"head_dim": 4}, "head_dim=4 times"),
        ({"model_type": "gemma"}, "model_type=gemma: decoders are converted from llama and mistr"),
        ({"model_type": "mistral"}, "sliding_window=4096 must be None"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type default or"),
    ],
)
def test_other_decoders_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        llama.decoder_sizes_of(LlamaConfig().to_dict() | change, cross_every=2)


def test_foreign_tensors_are_named(tmp_path):
    tensors, config = saved(random_decoder(0), tmp_path / "theirs")
    decoder = llama.decoder_sizes_of(config, cross_every=1)
    biased = {**tensors, **in_memory({"model.layers.0.self_attn.q_proj.bias": torch.ones(3)})}
    with pytest.raises(CheckpointError, match=r"has 1 \(model.layers.0.self_attn.q_proj.bias\)"):
        llama.from_hugging_face(biased, config, decoder)
