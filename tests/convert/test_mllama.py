import random
from dataclasses import asdict, replace

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from megavlm.checkpoint.lazy import LazyTensor, in_memory
from megavlm.config.presets import PRESETS
from megavlm.config.sizes import EncoderSizes, ModelSizes
from megavlm.convert import mllama
from megavlm.convert.names import cast
from megavlm.data.tokenizer import BEGIN, END
from megavlm.errors import CheckpointError, ConfigError
from megavlm.model.params import parameters
from megavlm.model.vit import normalise
from tests.batches import TINY
from tests.convert.hugging_face import (
    assert_same,
    filed,
    opened,
    our_logits,
    our_model,
    saved,
    write,
)
from tests.infer.tokens import tokens_after
from tests.model.weights import randomise
from tests.ranks import alone

SEEDS = range(6)
NEW_TOKENS = 16
ATOL = 2e-5  # worst measured 1.7e-5
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def groups():
    with alone():
        yield


def random_config(seed: int) -> dict:
    """Any language half, and a vision half of our form."""
    chance = random.Random(seed)
    kv_heads = chance.choice([1, 2, 3])
    heads = kv_heads * chance.choice([1, 2, 3])
    layers = chance.randint(3, 7)
    cross = sorted(chance.sample(range(layers), chance.randint(1, layers - 1)))
    encoder_heads = chance.choice([1, 2, 4])
    encoder_width = encoder_heads * chance.choice([8, 16])
    rope = {"rope_type": "default"} if seed % 2 else LLAMA3
    return {
        "vision_config": {
            "hidden_size": encoder_width,
            "vision_output_dim": 2 * encoder_width,
            "hidden_act": chance.choice(["gelu", "quick_gelu", "gelu_pytorch_tanh"]),
            "num_hidden_layers": chance.randint(1, 3),
            "attention_heads": encoder_heads,
            "intermediate_size": chance.choice([24, 40]),
            "image_size": 24,
            "patch_size": chance.choice([4, 6, 8]),
            **mllama.VISION_REQUIRED,
        },
        "text_config": {
            "vocab_size": chance.randint(60, 200),
            "hidden_size": heads * chance.choice([8, 10, 16]),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": chance.choice([40, 72]),
            "cross_attention_layers": cross,
            "rms_norm_eps": chance.choice([1e-5, 1e-6]),
            "rope_parameters": {**rope, "rope_theta": chance.choice([1e4, 5e5])},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
    }


def sizes_of(config: dict) -> ModelSizes:
    return ModelSizes(
        encoder=mllama.encoder_sizes_of(config), decoder=mllama.decoder_sizes_of(config)
    )


def random_mllama(config: dict, seed: int) -> MllamaForConditionalGeneration:
    """Random rows for image symbols and embeddings of tiles; closed gates of tiles."""
    vision = config["vision_config"]
    model = MllamaForConditionalGeneration(MllamaConfig(**config)).eval()
    randomise(model, seed)
    with torch.no_grad():
        if vision["max_num_tiles"] == 1:
            model.model.multi_modal_projector.weight[:, vision["hidden_size"] :] = 0
            for name, parameter in model.model.vision_model.named_parameters():
                if name.endswith("embedding.gate"):
                    parameter.zero_()
    return model


def random_inputs(config: dict, seed: int, length: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (2, t), and pixels."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config["text_config"]["vocab_size"]
    tokens = torch.randint(10, vocabulary, (2, length), generator=generator)
    side = config["vision_config"]["image_size"]
    shape = (2, 3, side, side)
    return tokens, torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def picture_arguments(pixels: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """What Mllama's processor makes of one picture a row, seen by all tokens."""
    return {
        "pixel_values": normalise(pixels)[:, None, None],
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, length, 1, 1),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_import_equals_the_original(seed, tmp_path):
    config = random_config(seed)
    theirs = random_mllama(config, seed)
    tensors, filed_config = saved(theirs, tmp_path / "theirs")
    sizes = sizes_of(filed_config)
    imported = mllama.from_hugging_face(tensors, filed_config, sizes)
    assert imported.dropped == ()
    ours = our_model(imported.tensors, sizes)
    tokens, pixels = random_inputs(config, seed)
    with torch.no_grad():
        seeing = theirs(input_ids=tokens, **picture_arguments(pixels, tokens.shape[1])).logits
        blind = theirs(input_ids=tokens).logits
        states = ours.encode_images(pixels)
    assert seeing.std() > 0.5 and (seeing - blind).abs().max() > 0.1  # it says something
    worst = max(
        (our_logits(ours, tokens, states) - seeing).abs().max(),
        (our_logits(ours, tokens, None) - blind).abs().max(),
    )
    assert worst < ATOL

    exported = mllama.to_hugging_face(imported.tensors, sizes)
    assert_same(exported, tensors)
    again = mllama.mllama_config(sizes)
    assert sizes_of(again) == sizes
    write(exported, again, tmp_path / "again")
    with torch.no_grad():
        logits = opened(MllamaForConditionalGeneration, tmp_path / "again")(
            input_ids=tokens, **picture_arguments(pixels, tokens.shape[1])
        ).logits
    assert torch.equal(logits, seeing)


def random_sizes(seed: int) -> ModelSizes:
    """Any model of ours that Mllama can express."""
    return sizes_of(MllamaConfig(**random_config(seed)).to_dict())


@pytest.mark.parametrize("seed", SEEDS)
def test_export_generates_the_same(seed, tmp_path):
    sizes = TINY if seed == 0 else random_sizes(seed)
    ours = our_model({}, sizes)
    randomise(ours, seed)
    tensors = in_memory(dict(ours.named_parameters()))
    exported = mllama.to_hugging_face(tensors, sizes)
    image_token = 4
    config = mllama.mllama_config(sizes) | {"image_token_index": image_token}
    write(exported, config, tmp_path / "exported")
    theirs = opened(MllamaForConditionalGeneration, tmp_path / "exported")
    assert theirs.config.image_token_index == image_token
    prompts, pixels = random_inputs(config, seed)
    prompts[:, :2] = torch.tensor([image_token, BEGIN])
    generated = tokens_after(ours, prompts, [[picture] for picture in pixels], NEW_TOKENS)
    rows = theirs.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **picture_arguments(pixels, prompts.shape[1]),
    )
    assert generated == [until_end(row) for row in rows[:, prompts.shape[1] :].tolist()]
    assert len({token for tokens in generated for token in tokens}) > 1

    imported = mllama.from_hugging_face(filed(tmp_path / "exported"), config, sizes)
    assert_same(imported.tensors, tensors)


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END)] if END in tokens else tokens


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_bf16_comes_back_bit_for_bit(seed, tmp_path):
    config = random_config(seed)
    tensors, config = saved(random_mllama(config, seed).bfloat16(), tmp_path / "theirs")
    sizes = sizes_of(config)
    ours = mllama.from_hugging_face(tensors, config, sizes).tensors
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert_same(mllama.to_hugging_face(ours, sizes), tensors)
    as_fp32 = cast(ours, torch.float32)
    assert {tensor.read().dtype for tensor in as_fp32.values()} == {torch.float32}
    assert_same(cast(as_fp32, torch.bfloat16), ours)


def test_a_tied_head_is_a_copy_of_the_embedding(tmp_path):
    config = random_config(1)
    theirs = random_mllama(config, 1)
    vocabulary = config["text_config"]["vocab_size"]
    embedding = theirs.get_input_embeddings().weight
    with torch.no_grad():
        theirs.lm_head.weight.copy_(embedding[:vocabulary])
    tensors, config = saved(theirs, tmp_path / "theirs")
    del tensors["language_model.lm_head.weight"]
    sizes = sizes_of(config)
    with pytest.raises(CheckpointError, match=r"lacks 1 \(language_model.lm_head.weight\)"):
        mllama.from_hugging_face(tensors, config, sizes)
    config["text_config"]["tie_word_embeddings"] = True
    ours = our_model(mllama.from_hugging_face(tensors, config, sizes).tensors, sizes)
    tokens, pixels = random_inputs(config, 1)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, **picture_arguments(pixels, tokens.shape[1])).logits
        actual = our_logits(ours, tokens, ours.encode_images(pixels))
    assert (actual - expected).abs().max() < ATOL


def test_llama3_scaling_matters_and_is_the_same(tmp_path):
    config = random_config(2)
    theirs = random_mllama(config, 2)
    tensors, filed_config = saved(theirs, tmp_path / "theirs")
    sizes = sizes_of(filed_config)
    assert sizes.decoder.rope_scaling == 8
    unscaled = replace(sizes, decoder=replace(sizes.decoder, rope_scaling=None))
    tokens, _ = random_inputs(config, 2, length=400)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
    imported = mllama.from_hugging_face(tensors, filed_config, sizes).tensors
    actual, other = (our_logits(our_model(imported, s), tokens, None) for s in (sizes, unscaled))
    assert (actual - expected).abs().max() < 2 * ATOL
    assert (other - expected).abs().max() > 100 * ATOL


def four_tiles(seed: int) -> dict:
    """As published: tiles, global layers and intermediate layers."""
    config = random_config(seed)
    width = config["vision_config"]["hidden_size"]
    config["vision_config"] |= {
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 3 * width,
        "supported_aspect_ratios": mllama.VISION_DEFAULTS["supported_aspect_ratios"],
    }
    return config


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_the_language_half_of_any_mllama(seed, tmp_path):
    config = four_tiles(seed)
    theirs = random_mllama(config, seed)
    tensors, config = saved(theirs, tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"num_global_layers=2 must be 0, max_num_tiles=4 must"):
        sizes_of(config)
    sizes = ModelSizes(encoder=TINY.encoder, decoder=mllama.decoder_sizes_of(config))
    imported = mllama.from_hugging_face(tensors, config, sizes, parts=("decoder",))
    vision = {n for n in tensors if n.startswith(("vision_model", "multi_modal_projector"))}
    assert set(imported.dropped) == vision
    ours = our_model(imported.tensors, sizes)
    tokens, _ = random_inputs(config, seed)
    side = config["vision_config"]["image_size"]
    generator = torch.Generator().manual_seed(seed)
    tiles = {
        "pixel_values": torch.randn(2, 1, 4, 3, side, side, generator=generator),
        "aspect_ratio_ids": torch.tensor([[6], [8]]),  # two by two, four by one
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
    }
    with torch.no_grad():
        features = theirs.model.vision_model(**tiles).last_hidden_state
        states = theirs.model.multi_modal_projector(features).flatten(0, 3).unsqueeze(1)
        mask = torch.ones(2, tokens.shape[1], 1, 4)
        expected = theirs(input_ids=tokens, cross_attention_mask=mask, **tiles).logits
    actual = our_logits(ours, tokens, states)
    assert (actual - expected).abs().max() < ATOL


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_shapes_of_mllama(preset):
    sizes = PRESETS[preset]

    def unread():
        raise AssertionError("names and shapes are enough")

    ours = {p.name: LazyTensor(p.shape, torch.bfloat16, unread) for p in parameters(sizes)}
    with torch.device("meta"):
        theirs = MllamaForConditionalGeneration(MllamaConfig(**mllama.mllama_config(sizes)))
    in_memory_name = {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_model.": "model.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    exported = {
        filed.replace(prefix, name, 1): tensor.shape
        for filed, tensor in mllama.to_hugging_face(ours, sizes).items()
        for prefix, name in in_memory_name.items()
        if filed.startswith(prefix)
    }
    assert exported == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}


def test_regular_positions_are_named_so():
    assert sizes_of(mllama.mllama_config(TINY)).decoder.cross_every == 2
    published = mllama.decoder_sizes_of({})  # Llama 3.2 Vision, 11 B
    assert published.cross_at == (3, 8, 13, 18, 23, 28, 33, 38)
    assert (published.self_layers, published.head_width) == (32, 128)


def test_what_mllama_cannot_express_is_named():
    encoder = EncoderSizes(
        **{
            **asdict(TINY.encoder),
            "attention_bias": True,
            "class_token": False,
            "norm_epsilon": 1e-6,
        }
    )
    sizes = replace(TINY, encoder=encoder)
    for convert in (mllama.mllama_config, lambda s: mllama.to_hugging_face({}, s)):
        with pytest.raises(
            ConfigError,
            match=r"encoder.attention_bias=True must be False, encoder.class_token=False must be "
            r"True, encoder.norm_epsilon=1e-06 must be 1e-05",
        ):
            convert(sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu must be silu"),
        ({"head_dim": 32}, "head_dim=32 times num_attention_heads"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'rope_type': 'yarn'"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "low_freq_factor": 2}}, "llama3 with"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "a whole rope_theta"),
        ({"cross_attention_layers": []}, "cross_at"),
        ({"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 256}, "exceeds 128"),
    ],
)
def test_other_language_models_are_refused(change, message):
    config = random_config(0)
    config["text_config"] |= change
    with pytest.raises(ConfigError, match=message):
        mllama.decoder_sizes_of(config)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors, config = saved(random_mllama(random_config(0), 0), tmp_path / "theirs")
    sizes = sizes_of(config)

    def convert(**changes):
        return mllama.from_hugging_face({**tensors, **in_memory(changes)}, config, sizes)

    missing = {n: t for n, t in tensors.items() if not n.endswith("mlp.fc1.bias")}
    assert len(tensors) - len(missing) == sizes.encoder.layers
    with pytest.raises(CheckpointError, match=rf"lacks {sizes.encoder.layers} \(vision_model"):
        mllama.from_hugging_face(missing, config, sizes)
    with pytest.raises(CheckpointError, match=r"has 1 \(stray\) that its sizes do not explain"):
        convert(stray=torch.ones(1))
    name = "language_model.model.norm.weight"
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[1\], but .* \(1 of "):
        convert(**{name: torch.ones(1)})
    projector = "multi_modal_projector.weight"
    for name, value in (
        (projector, torch.ones(tensors[projector].shape)),
        ("vision_model.pre_tile_positional_embedding.gate", torch.ones(1)),
    ):
        with pytest.raises(CheckpointError, match=f"{name} holds values .* must be zero"):
            convert(**{name: value})
