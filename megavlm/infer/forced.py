"""What a model makes of given answers (teacher forcing)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megavlm.data.tokenizer import PADDING
from megavlm.infer.decoder import CachedDecoder, Caches, Step
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
        texts = [[*p.tokens, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
        rows, longest = len(texts), max(map(len, texts))
        caches = Caches(
            self._decoder,
            places=rows,
            tokens=longest,
            image_tokens=max(map(len, pixels)) * self._picture_tokens,
        )
        encoded = iter(self._pictures([picture for of_row in pixels for picture in of_row]))
        tokens_bt = np.full((rows, longest), PADDING, np.int64)
        sees_2bt = np.zeros((2, rows, longest), np.int32)
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            caches.put_images(row, [next(encoded) for _ in pixels[row]])
            tokens_bt[row, : len(text)] = text
            seen = [*prompt.seen, *[prompt.seen[-1]] * (len(text) - len(prompt.tokens))]
            seen_t2 = np.array(seen) * self._picture_tokens + row * caches.image_tokens
            sees_2bt[:, row, : len(text)] = seen_t2.T
        device = self._decoder.device
        step = Step(
            places_b=torch.arange(rows, device=device),
            positions_bt=torch.arange(longest, device=device).expand(rows, longest),
            low_bt=torch.as_tensor(sees_2bt[0], device=device),
            high_bt=torch.as_tensor(sees_2bt[1], device=device),
            sees_images=any(map(len, pixels)),
            visible_bc=None,
        )
        # An answer's n-th token is chosen after so many; beyond the end, the last again.
        starts_b = np.array([len(prompt.tokens) for prompt in prompts]) - 1
        ends_b = np.array([len(text) for text in texts]) - 1
        most = max(map(len, answers))
        after_nb = np.minimum(starts_b + np.arange(most)[:, None], ends_b)
        logits_nbv = self._decoder(
            torch.as_tensor(tokens_bt, device=device),
            torch.as_tensor(after_nb, device=device),
            step,
            caches,
        )
        return [logits_nbv[: len(answer), row] for row, answer in enumerate(answers)]
