from dataclasses import replace

import numpy as np
import pytest
import torch

from megavlm.data.packing import (
    NO_TEXT,
    Layout,
    PackedText,
    Span,
    lay_out,
    pack,
    python_text_places,
    tokenize,
)
from megavlm.data.samples import Text, Turn
from megavlm.data.tokenizer import BEGIN, END, PADDING, Tokenizer
from tests import batches

IMAGE_TOKENS = 5
ROW_TOKENS = 24
ROWS = replace(batches.ROWS, row_tokens=ROW_TOKENS)


def packed(tokens: list[int], answer_start: int, image: int | None) -> PackedText:
    """One turn that shows one picture, or none."""
    images = [] if image is None else [(0, Span(image, image + 1))]
    return PackedText(tokens, [Span(answer_start, len(tokens))], images)


def random_texts(seed: int) -> list[PackedText]:
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(int(generator.integers(0, 12))):
        length = int(generator.integers(3, ROW_TOKENS + 2))
        tokens = [BEGIN, *generator.integers(10, 99, length - 2).tolist(), END]
        image = int(generator.integers(0, 4)) if generator.random() < 0.7 else None
        texts.append(packed(tokens, int(generator.integers(1, length)), image))
    return texts


@pytest.mark.parametrize("seed", range(30))
def test_no_token_is_lost_and_none_is_mixed_up(seed):
    texts = random_texts(seed)
    batch = pack(texts, torch.zeros(4, 3, 8, 8), ROWS, image_tokens=IMAGE_TOKENS)
    found = []
    for row in range(len(batch.tokens_bt)):
        for number in set(batch.text_numbers_bt[row].tolist()) - {NO_TEXT}:
            place = batch.text_numbers_bt[row] == number
            tokens, labels = batch.tokens_bt[row, place], batch.labels_bt[row, place]
            assert tokens[1:].tolist() == labels[:-1].tolist()
            low, high = batch.image_ranges_2bt[:, row, place].unique(dim=1).flatten().tolist()
            image = None if low == high else low // IMAGE_TOKENS
            assert high - low in (0, IMAGE_TOKENS)
            answer_start = len(tokens) + 1 - int(batch.learned_bt[row, place].sum())
            whole = [*tokens.tolist(), int(labels[-1])]
            found.append(packed(whole, answer_start, image))
    assert sorted(map(repr, found)) == sorted(map(repr, texts))
    padding = batch.text_numbers_bt == NO_TEXT
    assert (batch.tokens_bt[padding] == PADDING).all()
    assert not batch.learned_bt[padding].any()
    assert (batch.image_ranges_2bt[0] == batch.image_ranges_2bt[1])[padding].all()


def test_texts_share_rows():
    texts = [packed([BEGIN, *[9] * 10, END], 1, None)] * 4  # 11 tokens each go into a row
    batch = pack(texts, torch.zeros(1, 3, 8, 8), ROWS, image_tokens=IMAGE_TOKENS)
    assert batch.tokens_bt.shape == (2, ROW_TOKENS)


def test_a_batch_without_texts_still_has_a_row():
    batch = pack([], torch.zeros(2, 3, 8, 8), ROWS, image_tokens=IMAGE_TOKENS)
    assert batch.tokens_bt.shape == (1, ROW_TOKENS)
    assert not batch.learned_bt.any()


def loads_of(lengths: list[int], layout: Layout) -> list[int]:
    loads = [0] * layout.shape[0]
    for length, (row, start, _) in zip(lengths, layout.places, strict=True):
        assert start == loads[row], "texts of a row follow one another"
        loads[row] += length
    return loads


@pytest.mark.parametrize("seed", range(10))
def test_rows_are_no_longer_than_the_texts_need(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 60, int(generator.integers(1, 80))).tolist()
    whole = lay_out(lengths, 100, bucket_tokens=None, shared=True)
    short = lay_out(lengths, 100, bucket_tokens=8, shared=True)
    rows, row_tokens = short.shape
    assert whole.shape == (rows, 100)
    assert max(loads_of(lengths, short)) <= row_tokens
    assert row_tokens == 100 or row_tokens % 8 == 0
    if row_tokens < 100 and max(lengths) <= row_tokens - 8:
        shorter = lay_out(lengths, row_tokens - 8, bucket_tokens=None, shared=True)
        assert shorter.shape[0] > rows


def test_texts_that_are_not_packed_have_rows_of_their_own():
    layout = lay_out([5, 19, 7], ROW_TOKENS, bucket_tokens=None, shared=False)
    assert layout == ((3, ROW_TOKENS), [(0, 0, 0), (1, 0, 0), (2, 0, 0)])
    bucketed = lay_out([5, 9, 7], ROW_TOKENS, bucket_tokens=4, shared=False)
    assert bucketed == ((3, 12), [(0, 0, 0), (1, 0, 0), (2, 0, 0)])


@pytest.mark.parametrize("seed", range(20))
def test_the_extension_packs_like_the_python_version(seed):
    extension = pytest.importorskip("megavlm._data", reason="installed without a compiler")
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, ROW_TOKENS + 1, int(generator.integers(0, 200)))
    places = extension.text_places(lengths, ROW_TOKENS)
    assert np.array_equal(places, python_text_places(lengths, ROW_TOKENS))
    loads = np.bincount(places[0], weights=lengths) if len(lengths) else np.zeros(0)
    assert (loads <= ROW_TOKENS).all()
    # No two rows could be one: each item went into the first row with room.
    assert (loads[:-1] + loads[1:] > ROW_TOKENS).all()


def test_the_extension_refuses_what_cannot_fit():
    extension = pytest.importorskip("megavlm._data", reason="installed without a compiler")
    with pytest.raises(ValueError, match="exceeds the row's capacity"):
        extension.text_places(np.array([3, 9]), 8)


def test_an_image_symbol_sees_the_pictures_up_to_its_own(coloured_squares):
    tokenizer = Tokenizer(coloured_squares / "tokenizer.model")
    turns = (
        Turn(prompt="a", answer="b", pictures=(0, 1)),
        Turn(prompt="a", answer="b"),
        Turn(prompt="a", answer="b", pictures=(2,)),
    )
    text, was_cut = tokenize(tokenizer, Text(turns=turns, task="chat"), [4, 5, 6], 100)
    symbols = [at for at, token in enumerate(text.tokens) if token == tokenizer.image]
    assert symbols[:2] == [0, 1] and not was_cut
    assert text.images == [(0, Span(4, 5)), (1, Span(4, 6)), (symbols[2], Span(6, 7))]
