import pytest

from megavlm.config.presets import PRESETS
from megavlm.config.sizes import DecoderSizes, EncoderSizes
from megavlm.errors import ConfigError

ENCODER = {"image_pixels": 224, "patch_pixels": 14, "width": 64, "layers": 1, "heads": 4}
DECODER = {"vocabulary": 512, "width": 64, "self_layers": 4, "cross_every": 2, "heads": 4}


def at(*positions: int) -> dict[str, object]:
    return {"cross_every": None, "cross_at": positions}


def test_image_tokens_and_registers():
    sizes = PRESETS["vlm-30b"].encoder
    assert sizes.tokens == 257
    assert sizes.register_tokens == 7


def test_without_a_class_token_the_patches_are_all():
    sizes = EncoderSizes(**ENCODER, mlp_width=128, class_token=False)
    assert (sizes.tokens, sizes.register_tokens) == (256, 0)


def test_cross_layers_follow_every_fifth_self_layer():
    decoder = PRESETS["vlm-30b"].decoder
    assert decoder.layers == 72
    assert decoder.cross_layers == tuple(range(5, 72, 6))


def test_cross_layers_lie_where_they_are_put():
    # As in Llama-3.2-11B-Vision.
    positions = (3, 8, 13, 18, 23, 28, 33, 38)
    changes = {"self_layers": 32, "cross_every": None, "cross_at": positions}
    decoder = DecoderSizes(**{**DECODER, "kv_heads": 2, "mlp_width": 128, **changes})
    assert decoder.layers == 40
    assert decoder.cross_layers == positions


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_pixels": 15}, "encoder.patch_pixels=15 does not divide image_pixels=224; try [1,"),
        ({"heads": 5}, "encoder.heads=5 does not divide width=64"),
        ({"layers": 0}, "EncoderSizes.layers=0 must be at least 1"),
        ({"width": 1024, "heads": 4}, "use at least 8 heads"),
        ({"norm_epsilon": 0.0}, "encoder.norm_epsilon=0.0 must lie between 0 and 1"),
        ({"norm_epsilon": float("nan")}, "encoder.norm_epsilon=nan must lie between 0 and 1"),
    ],
)
def test_encoder_rules(changes, says):
    with pytest.raises(ConfigError) as caught:
        EncoderSizes(**{**ENCODER, "mlp_width": 128, **changes})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_heads": 3}, "decoder.kv_heads=3 does not divide heads=4"),
        ({"cross_every": 3}, "decoder.cross_every=3 does not divide self_layers=4; try [1, 2, 4]"),
        ({"cross_every": 0}, "DecoderSizes.cross_every=0 must be at least 1"),
        ({"width": 60, "heads": 4}, "must be even for rotary embeddings"),
        ({"norm_epsilon": -1e-5}, "decoder.norm_epsilon=-1e-05 must lie between 0 and 1"),
        ({"rope_scaling": 0.5}, "decoder.rope_scaling=0.5 must be finite and at least 1"),
        ({"rope_scaling": float("inf")}, "decoder.rope_scaling=inf must be finite"),
        ({"cross_at": (1, 4)}, "cross_every=2 and decoder.cross_at=(1, 4): give one of them"),
        ({"cross_every": None}, "cross_every=None and decoder.cross_at=None: give one of them"),
        (at(4, 1), "decoder.cross_at=[4, 1] must be positions in ascending order, each once"),
        (at(1, 1), "decoder.cross_at=[1, 1] must be positions in ascending order, each once"),
        (at(), "decoder.cross_at=[] must be positions in ascending order, each once, and at least"),
        (at(-1, 2), "decoder.cross_at=[-1, 2] must lie in 0 to 5: 4 self-attention and 2 cross"),
        (at(1, 6), "decoder.cross_at=[1, 6] must lie in 0 to 5: 4 self-attention and 2 cross"),
    ],
)
def test_decoder_rules(changes, says):
    with pytest.raises(ConfigError) as caught:
        DecoderSizes(**{**DECODER, "kv_heads": 2, "mlp_width": 128, **changes})
    assert says in str(caught.value)
