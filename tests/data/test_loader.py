import ctypes
import os
import signal
import sys
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch

from megavlm.config.data import SourceSettings
from megavlm.data.collate import chats, pairs, texts_alone
from megavlm.data.loader import MicroBatches, Share, _heed_its_rank_alone, load
from megavlm.data.packing import NO_TEXT
from megavlm.data.samples import Sample, text
from megavlm.data.shards import write_shards
from megavlm.data.sources import Sources, training_sources
from megavlm.data.tokenizer import Tokenizer
from tests.conftest import coloured_sample, picture


def micro_batches(run, rank=0, ranks=1, training=True, collate=texts_alone):
    tokenizer = Tokenizer(run.data.tokenizer)
    sources = training_sources(run) if training else Sources((run.data.heldout,), run.seed)
    share = Share(rank, ranks)
    return MicroBatches(sources, tokenizer, run, share, collate, training=training)


def texts_of(batch, tokenizer):
    """Every text of a batch with the picture that it sees, in no order."""
    texts = []
    for row in range(len(batch.tokens_bt)):
        for number in set(batch.text_numbers_bt[row].tolist()) - {NO_TEXT}:
            place = batch.text_numbers_bt[row] == number
            low, high = batch.image_ranges_2bt[:, row, place][:, 0].tolist()
            image = None if low == high else low // (high - low)
            seen = b"" if image is None else batch.pixels[image].numpy().tobytes()
            texts.append((tokenizer.decode(batch.tokens_bt[row, place].tolist()), seen))
    return sorted(texts)


def test_the_samples_of_a_step_do_not_depend_on_ranks(tiny_run):
    tokenizer = Tokenizer(tiny_run.data.tokenizer)

    def texts_of_step(step, ranks):
        batches = batches_of_step(tiny_run, step, ranks)
        return sorted(text for batch in batches for text in texts_of(batch, tokenizer))

    for step in (0, 3):
        whole = texts_of_step(step, ranks=1)
        assert len(whole) > 8
        assert texts_of_step(step, ranks=2) == texts_of_step(step, ranks=4) == whole


def batches_of_step(run, step, ranks):
    """All micro-batches of a step, of all ranks."""
    per_step = run.train.micro_batches
    numbers = range(step * per_step, (step + 1) * per_step)
    return [micro_batches(run, rank, ranks)[n] for rank in range(ranks) for n in numbers]


def test_no_micro_batch_waits_for_one_with_more_images(tiny_run):
    for step in range(5):
        batches = batches_of_step(tiny_run, step, ranks=2)
        images = [len({*batch.image_ranges_2bt[1].flatten().tolist()} - {0}) for batch in batches]
        assert max(images) - min(images) <= 1, "a sort could have done better"
        assert {len(batch.pixels) for batch in batches} == {max(images)}


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_gives_the_same_batches(tiny_run, workers):
    batches = list(load(micro_batches(tiny_run), range(8), workers=0))
    resumed = list(load(micro_batches(tiny_run), range(5, 8), workers=workers))
    assert len(resumed) == 3
    for a, b in zip(batches[5:], resumed, strict=True):
        for name in ("tokens_bt", "pixels", "image_ranges_2bt"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_epochs_show_every_sample_once_and_augment_anew(tiny_run):
    run = replace(tiny_run, data=replace(tiny_run.data, texts_per_sample=1))
    data = micro_batches(run)
    epochs = [[data[n] for n in range(e * 10, e * 10 + 10)] for e in range(2)]
    for epoch in epochs:
        assert sum(batch.samples for batch in epoch) == 40
    pictures = [
        {batch.pixels[i].numpy().tobytes() for batch in epoch for i in range(len(batch.pixels))}
        for epoch in epochs
    ]
    assert pictures[0] != pictures[1]


def test_heldout_comes_whole_in_order_and_plain(tiny_run):
    tokenizer = Tokenizer(tiny_run.data.tokenizer)
    data = micro_batches(tiny_run, training=False)
    batches = [data[n] for n in range(data.count())]
    assert sum(batch.samples for batch in batches) == 10
    expected = [
        f"{text.prompt}{text.answer}" for n in range(10) for text in coloured_sample(n).texts
    ]
    found = [text for batch in batches for text, _ in texts_of(batch, tokenizer)]
    assert sorted(found) == sorted(expected)
    assert (batches[0].pixels[0] == torch.tensor([255, 0, 0])[:, None, None]).all()  # red


def test_heldout_is_whole_on_ranks_that_do_not_divide_it(tiny_run):
    parts = [micro_batches(tiny_run, rank, 4, training=False) for rank in range(4)]
    assert len({part.count() for part in parts}) == 1
    assert sum(part[n].samples for part in parts for n in range(part.count())) == 10


def test_a_truncated_picture_is_named_and_nothing_else_is_lost(tiny_run, tmp_path):
    samples = [coloured_sample(n) for n in range(8)]
    samples[2] = replace(samples[2], pictures=(samples[2].pictures[0][:60],))
    write_shards(tmp_path, samples, 1000)
    run = replace(tiny_run, data=replace(tiny_run.data, train=(SourceSettings(folder=tmp_path),)))
    data = micro_batches(run)
    batches = [data[n] for n in range(2)]
    assert sum(batch.samples for batch in batches) == 7
    [name] = [name for batch in batches for name in batch.skipped]
    assert name.startswith("000000.tar:000002: picture of 000002 cannot be used")
    assert "\n" not in name


def test_a_sample_with_too_many_pictures_takes_no_slots(tiny_run, tmp_path):
    samples = [coloured_sample(n) for n in range(8)]
    samples[2] = replace(samples[2], pictures=(picture("red"),) * 65)
    write_shards(tmp_path, samples, 1000)
    run = replace(tiny_run, data=replace(tiny_run.data, train=(SourceSettings(folder=tmp_path),)))
    data = micro_batches(run)
    batches = [data[n] for n in range(2)]
    assert all(len(batch.pixels) <= 4 for batch in batches)
    [name] = [name for batch in batches for name in batch.skipped]
    assert "has 65 pictures; the limit is 64" in name


def test_pictures_that_find_no_room_are_left_out_and_named(tiny_run, tmp_path):
    samples = [coloured_sample(n) for n in range(8)]
    samples[2] = replace(samples[2], pictures=(picture("red"),) * 6)
    write_shards(tmp_path, samples, 1000)
    source = (SourceSettings(folder=tmp_path),)
    run = replace(tiny_run, data=replace(tiny_run.data, train=source, micro_batch_images=4))
    data = micro_batches(run)
    batches = [data[n] for n in range(2)]
    assert max(len(batch.pixels) for batch in batches) <= 4
    assert sum(batch.samples for batch in batches) == 7
    assert sum(len(batch.sample_ids) for batch in batches) == 8
    [name] = [name for batch in batches for name in batch.skipped]
    assert name.startswith("000000.tar:000002: its pictures find no room in a micro-batch of")


def test_heldout_samples_are_measured_whatever_finds_room(tiny_run):
    run = replace(tiny_run, data=replace(tiny_run.data, micro_batch_images=1))
    data = micro_batches(run, training=False)
    batches = [data[n] for n in range(data.count())]
    assert sum(batch.samples for batch in batches) == 10
    assert [name for batch in batches for name in batch.skipped] == []


def test_what_is_no_padding_is_counted(tiny_run):
    for batch in batches_of_step(tiny_run, 0, ranks=2):
        assert batch.text_tokens == int((batch.text_numbers_bt != NO_TEXT).sum())
        last_token = int(batch.image_ranges_2bt[1].max())
        assert batch.images == last_token // tiny_run.model.encoder.tokens


def test_texts_with_rows_of_their_own_are_the_same_texts(tiny_run):
    tokenizer = Tokenizer(tiny_run.data.tokenizer)
    data = replace(tiny_run.data, pack_texts=False, row_bucket_tokens=4)
    found, widths = [], []
    for run in (tiny_run, replace(tiny_run, data=data)):
        batches = batches_of_step(run, 0, ranks=2)
        found.append(sorted(text for batch in batches for text in texts_of(batch, tokenizer)))
        widths.append([batch.tokens_bt.shape[1] for batch in batches])
        rows = [len(batch.tokens_bt) for batch in batches]
    assert found[0] == found[1]
    assert set(widths[0]) == {24}
    assert max(widths[1]) < 24
    assert sum(rows) == len(found[1])


def test_positions_of_bad_samples_are_passed_over(tiny_run):
    def ids(run, steps):
        batches = [batch for step in steps for batch in batches_of_step(run, step, ranks=2)]
        return sorted(i for batch in batches for i in batch.sample_ids)

    size = tiny_run.train.samples_per_step
    skipped = replace(tiny_run.data, skip_samples=((size, 2 * size), (4 * size, 5 * size)))
    mended = replace(tiny_run, data=skipped)
    assert ids(mended, range(4)) == ids(tiny_run, (0, 2, 3, 5))


def test_captions_without_a_prompt_get_one(tiny_run, tmp_path):
    captions = [text("", f"a thing {n}", "caption", pictures=()) for n in range(8)]
    samples = [Sample(key=f"{n}", pictures=(), texts=(t,)) for n, t in enumerate(captions)]
    write_shards(tmp_path, samples, 1000)
    source = SourceSettings(folder=tmp_path, caption_prompts=("Caption:", "What is it?"))
    sources = Sources([source], 1)
    prompts = [sources.read(sources.in_order(n)).texts[0].prompt for n in range(8)]
    assert prompts == ["Caption:", "What is it?"] * 4


def test_pre_training_looks_at_the_first_picture_alone(tiny_run, tmp_path):
    samples = [coloured_sample(n) for n in range(8)]
    pictured = sum(bool(sample.pictures) for sample in samples)
    unused = (b"not a picture", b"nor this")
    samples = [replace(s, pictures=(*s.pictures, *unused) if s.pictures else ()) for s in samples]
    write_shards(tmp_path, samples, 1000)
    data = replace(tiny_run.data, heldout=SourceSettings(folder=tmp_path))
    run = replace(tiny_run, data=data, objectives={"mim": 1.0})
    heldout = micro_batches(run, training=False, collate=pairs)
    batches = [heldout[n] for n in range(heldout.count())]
    assert [name for batch in batches for name in batch.skipped] == []
    assert sum(int(batch.has_image_n.sum()) for batch in batches) == pictured
    assert all(len(batch.pixels) <= heldout.samples for batch in batches)


@pytest.mark.parametrize("collate", [texts_alone, chats, pairs])
def test_a_mixture_is_the_same_from_any_start_with_any_workers_and_ranks(
    tiny_run, coloured_squares, collate
):
    mixture = (
        SourceSettings(folder=coloured_squares / "train", parts=3),
        SourceSettings(folder=coloured_squares / "heldout", tasks=("caption",)),
    )
    run = replace(tiny_run, data=replace(tiny_run.data, train=mixture))
    if collate is pairs:
        run = replace(run, objectives={"mim": 1.0})
    whole = list(load(micro_batches(run, collate=collate), range(12), workers=0))
    assert sum(batch.without_text for batch in whole) > 0
    for start, workers in ((1, 0), (5, 1)):
        resumed = load(micro_batches(run, collate=collate), range(start, 12), workers)
        for a, b in zip(whole[start:], resumed, strict=True):
            for name in (field.name for field in fields(a)):
                ours, again = getattr(a, name), getattr(b, name)
                same = torch.equal(ours, again) if isinstance(ours, torch.Tensor) else ours == again
                assert same, name

    def pictures(batches):
        return Counter(p.numpy().tobytes() for batch in batches for p in batch.pixels if p.any())

    parts = [micro_batches(run, rank, 2, collate=collate) for rank in range(2)]
    assert pictures(part[n] for part in parts for n in range(12)) == pictures(whole)


def test_long_texts_are_cut_and_counted(tiny_run):
    run = replace(tiny_run, data=replace(tiny_run.data, row_tokens=6))
    data = micro_batches(run)
    batches = [data[n] for n in range(10)]
    assert all(batch.tokens_bt.shape[1] == 6 for batch in batches)
    assert sum(batch.truncated_texts for batch in batches) > 0
    whole = micro_batches(tiny_run)
    assert sum(whole[n].truncated_texts for n in range(10)) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that one is gone")
def test_workers_die_with_their_rank():
    """Else they keep its connections open, and other ranks wait for it."""
    asked = ctypes.c_int()
    child = os.fork()
    if child == 0:
        _heed_its_rank_alone(0)
        ctypes.CDLL(None).prctl(2, ctypes.byref(asked))  # PR_GET_PDEATHSIG
        os._exit(asked.value)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == signal.SIGKILL
