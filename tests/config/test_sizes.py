import pytest

from megavlm.config.presets import PRESETS
from megavlm.config.sizes import DecoderSizes, EncoderSizes
from megavlm.errors import ConfigError

ENCODER = {"image_pixels": 224, "patch_pixels": 14, "width": 64, "layers": 1, "heads": 4}
DECODER = {"vocabulary": 512, "width": 64, "self_layers": 4, "cross_every": 2, "heads": 4}


def test_image_tokens_and_registers():
    sizes = PRESETS["vlm-30b"].encoder
    assert sizes.tokens == 257
    assert sizes.register_tokens == 7


def test_cross_layers_follow_every_fifth_self_layer():
    decoder = PRESETS["vlm-30b"].decoder
    assert decoder.layers == 72
    assert decoder.cross_layers == tuple(range(5, 72, 6))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_pixels": 15}, "encoder.patch_pixels=15 does not divide image_pixels=224; try [1,"),
        ({"heads": 5}, "encoder.heads=5 does not divide width=64"),
        ({"layers": 0}, "EncoderSizes.layers=0 must be at least 1"),
        ({"width": 1024, "heads": 4}, "use at least 8 heads"),
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
        ({"width": 60, "heads": 4}, "must be even for rotary embeddings"),
    ],
)
def test_decoder_rules(changes, says):
    with pytest.raises(ConfigError) as caught:
        DecoderSizes(**{**DECODER, "kv_heads": 2, "mlp_width": 128, **changes})
    assert says in str(caught.value)
