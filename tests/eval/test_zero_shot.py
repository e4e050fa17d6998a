"""Zero-shot scores against their definitions, and features against those of training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megavlm.config.run import RunSettings
from megavlm.data.collate import Drawn, pairs
from megavlm.data.samples import text
from megavlm.data.tokenizer import Tokenizer
from megavlm.eval.zero_shot import class_accuracies, class_features, ranked, recalls
from megavlm.infer import features
from megavlm.infer.features import encode, image_features, text_features
from megavlm.infer.load import untrained_pretraining
from tests.ranks import alone


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_classes_are_the_means_of_their_prompts():
    prompts_cpd = random(4, 7, 5) * 10 ** random(4, 7, 1, seed=2)
    for prompts_pd, found_d in zip(prompts_cpd, class_features(prompts_cpd), strict=True):
        # open_clip's build_zero_shot_classifier, a prompt at a time.
        mean = sum(prompt / prompt.norm() for prompt in prompts_pd) / 7
        torch.testing.assert_close(found_d, mean / mean.norm(), rtol=1e-6, atol=3e-7)  # worst 6e-8


def test_accuracies_are_as_defined():
    best = np.array(
        [[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0]]
    )
    found = class_accuracies(best, np.array([0, 0, 0, 0]))
    assert found == {"accuracy@1": 0.25, "accuracy@5": 0.75, "mean per-class accuracy": 0.25}
    # Class 0 has three pictures of which one is right, class 5 has one, which is right.
    found = class_accuracies(best, np.array([0, 0, 0, 5]))
    assert found["accuracy@1"] == 0.5
    assert found["mean per-class accuracy"] == pytest.approx((1 / 3 + 1) / 2)


def test_recall_with_several_captions_is_as_defined():
    captions_of_pictures = [5] * 30 + [3, 7, 1]
    picture_of = np.repeat(np.arange(33), captions_of_pictures)
    pictures = random(33, 8)
    texts = pictures[picture_of] + 1.5 * random(len(picture_of), 8, seed=2)
    found = recalls(*ranked(pictures, texts), picture_of)
    cosines = torch.nn.functional.cosine_similarity(
        pictures[:, None].double(), texts[None].double(), dim=-1
    )
    for k in (1, 5, 10):
        # A picture is right if any of its captions is among the best; a caption has one picture.
        of_pictures = [
            any(picture_of[i] == n for i in np.argsort(-row)[:k])
            for n, row in enumerate(cosines.numpy())
        ]
        of_texts = [
            picture_of[m] in np.argsort(-row)[:k] for m, row in enumerate(cosines.T.numpy())
        ]
        assert found[f"picture to text, recall@{k}"] == of_pictures
        assert found[f"text to picture, recall@{k}"] == of_texts
        assert 0 < sum(of_texts) < len(of_texts)


def test_towers_alone_see_what_they_see_together(monkeypatch, tiny_run: RunSettings):
    run = replace(tiny_run, objectives={"mim": 1.0, "contrastive": 1.0})
    tokenizer = Tokenizer(run.data.tokenizer)
    side = run.model.encoder.image_pixels
    pixels = (255 * random(5, 3, side, side).sigmoid()).to(torch.uint8)
    texts = ["a red square", "a green square", "blue", "a white square " * 9, "black"]
    monkeypatch.setattr(features, "PICTURES_AT_ONCE", 2)
    monkeypatch.setattr(features, "TEXTS_AT_ONCE", 3)
    with alone():
        model = untrained_pretraining(run)
        drawn = [
            Drawn("", (picture,), (text("", caption, "caption"),), np.random.default_rng(1))
            for picture, caption in zip(pixels, texts, strict=True)
        ]
        encoded = encode((model,), drawn, tokenizer, run)
        batch = pairs(drawn, tokenizer, run, len(drawn))
        with torch.no_grad():  # as in training
            expected_images, expected_texts, *_ = model(
                batch.pixels, None, batch.tokens_bt, batch.text_numbers_bt, batch.ends_n
            )
        images_nd = image_features(model, list(pixels))
        texts_nd, cut = text_features(model, texts, tokenizer, run)
    [(encoded_images, encoded_texts)] = encoded.features
    assert torch.equal(encoded_images, images_nd) and torch.equal(encoded_texts, texts_nd)
    # Worst seen, of values up to 3.2 from batches of other sizes: 2.4e-7 and 4.8e-7.
    torch.testing.assert_close(images_nd, expected_images, rtol=0, atol=3e-6)
    torch.testing.assert_close(texts_nd, expected_texts, rtol=0, atol=3e-6)
    assert cut == encoded.truncated_texts == batch.truncated_texts == 1
    assert images_nd.std() > 0 and texts_nd.std() > 0
