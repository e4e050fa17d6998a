"""Captioning: every text stands alone, and its answer is learned through cross-attention.

Trains the whole vision-language model, or, with `train.frozen: [encoder, decoder]`, only what joins
a pre-trained encoder and decoder (Flamingo, Alayrac et al. 2022, section 3.1).
"""

from megavlm.data.collate import texts_alone
from megavlm.stages.language import LanguageObjective


class Captioning(LanguageObjective):
    """Texts of pictures, each by itself."""

    collate = staticmethod(texts_alone)
