"""Named model sizes, from seconds on a laptop to 30.5 billion parameters."""

from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes, TextTowerSizes

PRESETS: dict[str, ModelSizes] = {
    # Tests: every part of the architecture, at the smallest sizes that still have structure.
    "vlm-tiny": ModelSizes(
        encoder=EncoderSizes(
            image_pixels=32, patch_pixels=8, width=32, layers=2, heads=2, mlp_width=64
        ),
        decoder=DecoderSizes(
            vocabulary=512,
            width=48,
            self_layers=4,
            cross_every=2,
            heads=4,
            kv_heads=2,
            mlp_width=96,
            initial_gate=0.5,
        ),
        text_tower=TextTowerSizes(width=32, layers=2, heads=4, mlp_width=64, feature_width=24),
    ),
    # `make demo`: learns the sample set from scratch in minutes on two cores.
    "vlm-demo": ModelSizes(
        encoder=EncoderSizes(patch_pixels=32, width=128, layers=4, heads=4, mlp_width=512),
        decoder=DecoderSizes(
            vocabulary=2_000,
            width=128,
            self_layers=4,
            cross_every=2,
            heads=4,
            kv_heads=2,
            mlp_width=384,
            initial_gate=1.0,
        ),
        text_tower=TextTowerSizes(width=128, layers=2, heads=4, mlp_width=384, feature_width=128),
    ),
    # ViT-L/14 with a decoder of 1,536: one GPU.
    "vlm-1b": ModelSizes(
        encoder=EncoderSizes(patch_pixels=14, width=1_024, layers=24, heads=16, mlp_width=4_096),
        decoder=DecoderSizes(
            vocabulary=64_000,
            width=1_536,
            self_layers=20,
            cross_every=5,
            heads=12,
            kv_heads=4,
            mlp_width=4_096,
        ),
        text_tower=TextTowerSizes(
            width=768, layers=12, heads=12, mlp_width=2_048, feature_width=768
        ),
    ),
    # ViT-H/14 with a decoder of 4,096: one node.
    "vlm-8b": ModelSizes(
        encoder=EncoderSizes(patch_pixels=14, width=1_280, layers=32, heads=16, mlp_width=5_120),
        decoder=DecoderSizes(
            vocabulary=64_000,
            width=4_096,
            self_layers=30,
            cross_every=5,
            heads=32,
            kv_heads=8,
            mlp_width=11_008,
        ),
        text_tower=TextTowerSizes(
            width=1_024, layers=24, heads=16, mlp_width=2_752, feature_width=1_024
        ),
    ),
    # ViT-bigG/14 with a decoder of 6,144: 128 GPUs.
    "vlm-30b": ModelSizes(
        encoder=EncoderSizes(patch_pixels=14, width=1_664, layers=48, heads=16, mlp_width=8_192),
        decoder=DecoderSizes(
            vocabulary=64_000,
            width=6_144,
            self_layers=60,
            cross_every=5,
            heads=48,
            kv_heads=8,
            mlp_width=16_192,
        ),
        text_tower=TextTowerSizes(
            width=1_280, layers=32, heads=16, mlp_width=3_456, feature_width=1_280
        ),
    ),
}
