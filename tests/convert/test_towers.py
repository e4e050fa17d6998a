import random
from dataclasses import replace

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from megavlm.checkpoint.lazy import in_memory
from megavlm.config.engines import UNDIVIDED
from megavlm.convert import towers
from megavlm.data.image import PIXEL_MEAN, PIXEL_STD
from megavlm.errors import CheckpointError, ConfigError
from megavlm.model.vit import VisionTransformer
from tests.convert.hugging_face import assert_same, fill, saved
from tests.model.weights import randomise
from tests.ranks import alone

ATOL = 1e-5  # worst measured 2.9e-6
SEEDS = range(3)
HALF = (0.5, 0.5, 0.5)
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def groups():
    with alone():
        yield


def clip(activation):
    return lambda **sizes: CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act=activation))


def clip_with_text(**sizes):
    return CLIPModel(CLIPConfig(vision_config=sizes, text_config=TEXT))


def siglip_with_text(**sizes):
    return SiglipModel(SiglipConfig(vision_config=sizes, text_config=TEXT))


MODELS = {
    "CLIP": clip("quick_gelu"),
    "OpenCLIP": clip("gelu"),
    "CLIP with text": clip_with_text,
    "SigLIP": lambda **sizes: SiglipVisionModel(SiglipVisionConfig(**sizes)),
    "SigLIP with text": siglip_with_text,
    "ViT": lambda **sizes: ViTModel(ViTConfig(**sizes)),
    "ViT classifier": lambda **sizes: ViTForImageClassification(ViTConfig(**sizes)),
}
DROPPED = {
    "CLIP": set(),
    "OpenCLIP": set(),
    "CLIP with text": {"text_model", "logit_scale", "visual_projection", "text_projection"},
    "SigLIP": {"head"},
    "SigLIP with text": {"text_model", "logit_scale", "logit_bias", "vision_model"},
    "ViT": {"pooler"},
    "ViT classifier": {"classifier"},
}


def random_tower(name: str, seed: int):
    chance = random.Random(seed)
    heads = chance.choice([1, 2, 3])
    model = MODELS[name](
        hidden_size=heads * chance.choice([8, 12]),
        num_hidden_layers=chance.randint(1, 3),
        num_attention_heads=heads,
        intermediate_size=chance.choice([24, 40]),
        image_size=24,
        patch_size=chance.choice([4, 6, 7]),  # 7 leaves pixels over
        layer_norm_eps=chance.choice([1e-5, 1e-6, 1e-12]),
    )
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def their_features(model, pixels: torch.Tensor) -> torch.Tensor:
    """Last states after the last norm, (n, t, w)."""
    if isinstance(model, ViTForImageClassification):
        model = model.vit
    if isinstance(model, CLIPModel | SiglipModel):
        model = model.vision_model
    states = model(pixel_values=pixels).last_hidden_state
    # CLIP norms the class token only.
    return model.post_layernorm(states) if isinstance(model, CLIPVisionModel) else states


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", MODELS)
def test_features_equal_the_original(name, seed, tmp_path):
    theirs = random_tower(name, seed)
    tensors, config = saved(theirs, tmp_path)
    sizes = towers.encoder_sizes_of(config)
    imported = towers.from_hugging_face(tensors, config, sizes, {})
    assert {dropped.split(".")[0] for dropped in imported.dropped} == DROPPED[name]
    assert not any(".encoder." in n for n in imported.dropped if not n.startswith("text_model"))
    ours = VisionTransformer(
        sizes, dtype=torch.float32, recompute="none", parallel=UNDIVIDED
    ).eval()
    assert imported.tensors.keys() == {f"encoder.{name}" for name, _ in ours.named_parameters()}
    fill(ours, imported.tensors, prefix="encoder.")
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 24, 24)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mean, std = (PIXEL_MEAN, PIXEL_STD) if "CLIP" in name else (HALF, HALF)
    as_theirs = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    expected = their_features(theirs, as_theirs)
    side = sizes.image_pixels
    with torch.no_grad():
        actual = ours(pixels[..., :side, :side]).transpose(0, 1)
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() < ATOL


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "ViT"])
def test_bits_change_where_the_docstring_says(name, tmp_path):
    tensors, config = saved(random_tower(name, 1).bfloat16(), tmp_path)
    sizes = towers.encoder_sizes_of(config)

    def convert(**preprocessor):
        return towers.from_hugging_face(tensors, config, sizes, preprocessor).tensors

    as_trained = convert()
    as_clip = convert(image_mean=PIXEL_MEAN, image_std=PIXEL_STD)
    assert {t.dtype for t in as_trained.values()} == {torch.bfloat16}
    changed = {"encoder.patch.weight", "encoder.positions"} if name != "CLIP" else set()
    assert {
        n for n, t in as_clip.items() if not torch.equal(t.read(), as_trained[n].read())
    } == changed
    assert_same(as_trained, convert())  # reading twice changes nothing


def test_old_files(tmp_path):
    """transformers 4 named the encoder of CLIP as in the whole model, and wrote a buffer."""
    tensors, config = saved(random_tower("CLIP", 0), tmp_path)
    sizes = towers.encoder_sizes_of(config)
    old = {f"vision_model.{name}": t for name, t in tensors.items()}
    buffer = "vision_model.embeddings.position_ids"
    old |= in_memory({buffer: torch.arange(5)})
    imported = towers.from_hugging_face(old, config, sizes, {})
    assert imported.dropped == (buffer,)
    assert_same(imported.tensors, towers.from_hugging_face(tensors, config, sizes, {}).tensors)


def test_published_sizes():
    large = towers.encoder_sizes_of(
        {
            "model_type": "clip",
            "vision_config": {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
                "patch_size": 14,
            },
        }
    )
    assert (large.image_pixels, large.tokens, large.activation) == (224, 257, "quick_gelu")
    assert large.norm_epsilon == 1e-5
    base = towers.encoder_sizes_of({"model_type": "siglip", "vision_config": {}})
    assert (base.tokens, base.activation, base.norm_epsilon) == (196, "gelu_tanh", 1e-6)
    so400m = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 384,
        "patch_size": 14,
    }
    shape = towers.encoder_sizes_of({"model_type": "siglip", "vision_config": so400m})
    assert (shape.image_pixels, shape.tokens) == (378, 729)
    assert towers.encoder_sizes_of({"model_type": "vit"}).norm_epsilon == 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2"}, "model_type=dinov2: image encoders are converted from clip"),
        ({"hidden_act": "relu"}, "hidden_act=relu must be one of gelu"),
        ({"num_channels": 1}, "num_channels=1 must be 3"),
        ({"qkv_bias": False}, "qkv_bias=False must be True"),
        ({"image_size": [224, 448]}, r"image_size=\[224, 448\] must be square"),
        ({"hidden_size": 1024, "num_attention_heads": 4}, "exceeds 128"),
    ],
)
def test_other_encoders_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        towers.encoder_sizes_of(ViTConfig().to_dict() | change)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors, config = saved(random_tower("SigLIP", 0), tmp_path)
    sizes = towers.encoder_sizes_of(config)
    bias = "embeddings.patch_embedding.bias"
    without = {name: t for name, t in tensors.items() if name != bias}
    with pytest.raises(CheckpointError, match=rf"lacks 1 \({bias}\)"):
        towers.from_hugging_face(without, config, sizes, {})
    with pytest.raises(CheckpointError, match=r"has shape .* but its sizes say"):
        towers.from_hugging_face(tensors, config, replace(sizes, width=2 * sizes.width), {})
