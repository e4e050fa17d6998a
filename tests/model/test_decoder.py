from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megavlm.config.engines import UNDIVIDED
from megavlm.config.presets import PRESETS
from megavlm.convert.llama import llama_config
from megavlm.model.decoder import build_decoder
from tests.ranks import alone


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
