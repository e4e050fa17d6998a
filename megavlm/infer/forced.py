"""What a model makes of given answers (teacher forcing)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megavlm.infer.beginnings import beginnings
from megavlm.infer.decoder import CachedDecoder, Caches
from megavlm.infer.encoder import Encoder
from megavlm.infer.pictures import Pictures
from megavlm.infer.prompts import Prompt
from megavlm.model.vlm import VisionLanguageModel


class TeacherForced:
    """Reads prompts and their answers at once, with what generation computes token by token."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._decoder = CachedDecoder(model.language, model.sizes.decoder)
        self._pictures = Pictures(Encoder(model), self._decoder)
        self._picture_tokens = model.sizes.encoder.tokens

    @torch.inference_mode()
    def logits(
        self,
        prompts: Sequence[Prompt],
        pixels: Sequence[Sequence[Tensor]],
        answers: Sequence[Sequence[int]],
    ) -> list[Tensor]:
        """For each prompt, logits (t, vocabulary) fp32 of every token of its answer.

        pixels: uint8 (3, side, side), as each prompt numbers them.
        """
        texts = [
            Prompt([*p.tokens, *a[:-1]], [*p.seen, *[p.seen[-1]] * (len(a) - 1)])
            for p, a in zip(prompts, answers, strict=True)
        ]
        caches = Caches(
            self._decoder,
            places=len(texts),
            tokens=max(len(text.tokens) for text in texts),
            image_tokens=max(map(len, pixels)) * self._picture_tokens,
        )
        encoded = iter(self._pictures([picture for of_row in pixels for picture in of_row]))
        for row, of_row in enumerate(pixels):
            caches.put_images(row, [next(encoded) for _ in of_row])
        tokens_bt, step = beginnings(texts, range(len(texts)), caches, self._picture_tokens)
        # An answer's n-th token is chosen after so many; beyond the end, the last again.
        starts_b = np.array([len(prompt.tokens) for prompt in prompts]) - 1
        ends_b = np.array([len(text.tokens) for text in texts]) - 1
        most = max(map(len, answers))
        after_nb = np.minimum(starts_b + np.arange(most)[:, None], ends_b)
        after_nb = torch.as_tensor(after_nb, device=self._decoder.device)
        logits_nbv = self._decoder.read(tokens_bt, after_nb, step, caches)
        return [logits_nbv[: len(answer), row] for row, answer in enumerate(answers)]
