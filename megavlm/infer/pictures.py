"""Keys and values of pictures, kept for those that are asked about again."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from megavlm.infer.decoder import CachedDecoder
from megavlm.infer.encoder import Encoder

KeysValues = list[tuple[Tensor, Tensor]]
"""(v, g, d) each, of every cross-attention layer."""

ENCODED_AT_ONCE = 16
KEPT_BYTES = 2**30


class Pictures:
    """Encodes pictures, and remembers those that were used last."""

    def __init__(
        self, encoder: Encoder, decoder: CachedDecoder, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._encoder, self._decoder = encoder, decoder
        self._kept: OrderedDict[bytes, KeysValues] = OrderedDict()
        layers = len(decoder.cross_layers)
        each = (
            2 * encoder.sizes.tokens * decoder.groups * decoder.head_width * decoder.dtype.itemsize
        )
        self._most = max(1, kept_bytes // (layers * each))
        self.encoded = self.reused = 0
        """Pictures so far."""

    def __call__(self, pixels: Sequence[Tensor]) -> list[KeysValues]:
        """Of uint8 (3, side, side) pictures, in order."""
        names = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pixels]
        found = {name: self._kept[name] for name in names if name in self._kept}
        new = {n: p for n, p in zip(names, pixels, strict=True) if n not in found}
        unseen = [*new.items()]
        for start in range(0, len(unseen), ENCODED_AT_ONCE):
            some = dict(unseen[start : start + ENCODED_AT_ONCE])
            found |= dict(zip(some, self._encode([*some.values()]), strict=True))
        self.encoded += len(new)
        self.reused += len(pixels) - len(new)
        for name in names:
            self._kept[name] = found[name]
            self._kept.move_to_end(name)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return [found[name] for name in names]

    def forget(self) -> None:
        """Keep none."""
        self._kept.clear()

    def _encode(self, pixels: Sequence[Tensor]) -> list[KeysValues]:
        states_vw = self._encoder(torch.stack([*pixels]).to(self._decoder.device))
        flat = _flat(self._decoder.image_states(states_vw))
        parts = [states.split(self._encoder.sizes.tokens) for states in flat]
        # Copies: a part would keep its whole batch alive.
        of_pictures = zip(*parts, strict=True)
        return [_paired([part.clone() for part in of_picture]) for of_picture in of_pictures]


def _flat(pairs: KeysValues) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair]


def _paired(tensors: Sequence[Tensor]) -> KeysValues:
    return [*zip(tensors[::2], tensors[1::2], strict=True)]
