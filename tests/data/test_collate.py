"""What a micro-batch is made of: texts alone, chats, pairs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

from megavlm.data.collate import Drawn, chats, pairs, texts_alone
from megavlm.data.masking import mask_blocks
from megavlm.data.packing import NO_TEXT
from megavlm.data.samples import Text, Turn, text
from megavlm.data.tokenizer import BEGIN, END, Tokenizer

SIDE = 32  # of the smallest model's pictures


@pytest.fixture
def tokenizer(tiny_run):
    return Tokenizer(tiny_run.data.tokenizer)


def drawn(*texts, pictures=1):
    shown = tuple(torch.full((3, SIDE, SIDE), n + 1, dtype=torch.uint8) for n in range(pictures))
    return Drawn("sample", shown, texts, np.random.default_rng(5))


def turn(prompt, answer, *pictures):
    return Turn(prompt=prompt, answer=answer, pictures=pictures)


def long_rows(run, tokens=200):
    return replace(run, data=replace(run.data, row_tokens=tokens))


def learned_texts(batch, tokenizer):
    """What is learned of each text, each run of learned labels by itself."""
    found = []
    for row, learned in zip(batch.labels_bt, batch.learned_bt, strict=True):
        runs, current = [], []
        for label, counts in zip(row.tolist(), learned.tolist(), strict=True):
            if counts:
                current.append(label)
            elif current:
                runs, current = [*runs, current], []
        found += [*runs, current] if current else runs
    assert all(tokens[-1] == END for tokens in found)
    return sorted(tokenizer.decode(tokens[:-1]) for tokens in found)


def test_a_chat_is_learned_in_its_answers_alone(tiny_run, tokenizer):
    chat = Text(
        turns=(turn("Which colour?", "red", 0), turn("Say it.", "a blue square")), task="chat"
    )
    batch = chats([drawn(chat)], tokenizer, long_rows(tiny_run), 1)
    assert learned_texts(batch, tokenizer) == ["a blue square", "red"]
    tokens = batch.tokens_bt[0, batch.text_numbers_bt[0] != NO_TEXT].tolist()
    prompts = [tokenizer.encode(t.prompt) for t in chat.turns]
    answers = [tokenizer.encode(t.answer) for t in chat.turns]
    user, assistant = tokenizer.user, tokenizer.assistant
    first = [tokenizer.image, BEGIN, user, *prompts[0], assistant, *answers[0], END]
    assert tokens == [*first, user, *prompts[1], assistant, *answers[1]]


def test_questions_about_the_same_picture_become_one_chat(tiny_run, tokenizer):
    questions = [text(f"Which colour {n}?", "red", task="vqa") for n in range(3)]
    sample = drawn(*questions)
    alone = texts_alone([sample], tokenizer, long_rows(tiny_run), 1)
    joined = chats([sample], tokenizer, long_rows(tiny_run), 1)
    assert (alone.tokens_bt == tokenizer.image).sum() == 3
    assert (joined.tokens_bt == tokenizer.image).sum() == 1
    assert set(joined.text_numbers_bt.unique().tolist()) == {NO_TEXT, 0}
    assert learned_texts(joined, tokenizer) == learned_texts(alone, tokenizer) == ["red"] * 3
    seen = joined.text_numbers_bt != NO_TEXT
    assert (joined.image_ranges_2bt[1][seen] == tiny_run.model.encoder.tokens).all()


@pytest.mark.parametrize("seed", range(20))
def test_what_a_token_sees_is_mllamas_rule(tiny_run, tokenizer, seed):
    """Random chats against Hugging Face's mask of the same tokens."""
    generator = np.random.default_rng(seed)
    pictures, turns = 0, []
    for _ in range(generator.integers(1, 6)):
        shown = int(generator.integers(0, 3))
        turns.append(turn("Say it.", "red", *range(pictures, pictures + shown)))
        pictures += shown
    sample = drawn(Text(turns=tuple(turns), task="chat"), pictures=pictures)
    batch = chats([sample], tokenizer, long_rows(tiny_run), max(1, pictures))
    place = batch.text_numbers_bt[0] != NO_TEXT
    tokens = batch.tokens_bt[0, place].tolist()
    theirs = get_cross_attention_token_mask(tokens, tokenizer.image)
    per_image = tiny_run.model.encoder.tokens
    for position, (low, high) in enumerate(batch.image_ranges_2bt[:, 0, place].T.tolist()):
        ours = set(range(low // per_image, high // per_image))
        # Theirs lets a picture's text begin at its symbol; ours shows a turn's pictures at once.
        after = {i for i, (start, end) in enumerate(theirs) if start <= position < end}
        if tokens[position] != tokenizer.image:
            assert ours == after, position


def test_pictures_that_do_not_follow_one_another_are_a_bad_sample(tiny_run, tokenizer):
    good = drawn(text("Which colour?", "red", task="vqa"))
    bad = drawn(Text(turns=(turn("Which?", "red", 0, 2),), task="chat"), pictures=3)
    batch = chats([bad, good], tokenizer, tiny_run, 3)
    assert batch.samples == 1
    [told] = batch.skipped
    assert told.startswith("sample: a turn shows the pictures [0, 2], which do not follow")
    assert (batch.pixels[0] == 1).all() and not batch.pixels[1:].any()


def test_turns_that_do_not_fit_are_left_out_whole_and_counted(tiny_run, tokenizer):
    chat = Text(turns=tuple(turn("Say it.", "a red square") for _ in range(9)), task="chat")
    row_tokens = 60
    batch = chats([drawn(chat)], tokenizer, long_rows(tiny_run, row_tokens), 1)
    assert batch.truncated_texts == 1
    kept = learned_texts(batch, tokenizer)
    assert 1 <= len(kept) < 9 and set(kept) == {"a red square"}


def test_a_first_turn_too_long_for_the_row_is_cut_and_the_others_left_out(tiny_run, tokenizer):
    long = text("Say it.", "a red square " * 20, task="caption")
    batch = chats([drawn(long, text("Say it.", "red", task="vqa"))], tokenizer, tiny_run, 1)
    assert batch.truncated_texts == 1 and batch.tokens_bt.shape == (1, tiny_run.data.row_tokens)
    start = len(tokenizer.prompt(long.prompt, with_image=True))
    answer = tokenizer.encode(long.answer)[: tiny_run.data.row_tokens + 1 - start]
    assert batch.labels_bt[batch.learned_bt].tolist() == answer


def test_pairs(tiny_run, tokenizer):
    run = replace(long_rows(tiny_run, 12), objectives={"mim": 1.0, "contrastive": 1.0})
    samples = [
        drawn(text("Caption:", "a red square", task="caption"), pictures=2),
        drawn(text("Say it.", "number 5", task="text", pictures=()), pictures=0),
        drawn(),
        drawn(text("Caption:", "a " * 50, task="caption")),
    ]
    batch = pairs(samples, tokenizer, run, 5)
    assert batch.samples == 4 and batch.without_text == 2 and batch.truncated_texts == 1
    assert batch.has_image_n.tolist() == [True, True, True, False, False]
    assert batch.is_pair_n.tolist() == [True, False, True, False, False]
    flat = batch.tokens_bt.flatten()
    assert (flat[batch.ends_n[batch.is_pair_n]] == END).all()
    first = flat[: batch.ends_n[0] + 1].tolist()[-len(tokenizer.encode("a red square")) - 2 :]
    assert first == [BEGIN, *tokenizer.encode("a red square"), END]
    assert batch.masked_np[:3].any(1).all() and not batch.masked_np[3:].any()
    unmasked = pairs(samples, tokenizer, replace(run, objectives={"contrastive": 1.0}), 5)
    assert not unmasked.masked_np.any()


@pytest.mark.parametrize(
    ("side", "fraction", "block", "hidden"),
    [(16, 0.6, 2, 4 * 38), (4, 0.6, 1, 10), (4, 0.01, 2, 4), (4, 0.99, 2, 12)],
)
def test_whole_blocks_are_hidden(side, fraction, block, hidden):
    mask = mask_blocks(np.random.default_rng(1), side, fraction, block)
    assert mask.dtype == torch.bool and int(mask.sum()) == hidden
    square = mask.view(side // block, block, side // block, block).permute(0, 2, 1, 3).flatten(2)
    assert (square.all(-1) | ~square.any(-1)).all()


def test_blocks_at_the_border_are_cut():
    masks = [mask_blocks(np.random.default_rng(n), 7, 0.6, 2) for n in range(50)]
    assert all(len(mask) == 49 and 0 < mask.sum() < 49 for mask in masks)
    assert len({tuple(mask.tolist()) for mask in masks}) == 50
