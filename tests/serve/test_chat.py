import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from megavlm.data.image import read_square
from megavlm.data.samples import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.infer.prompts import prompt_of
from megavlm.infer.sampling import GREEDY, Sampling
from megavlm.serve.chat import MOST_COMMAS, MOST_FIELDS, MOST_MESSAGES, Reader
from megavlm.serve.limits import ServeLimits
from megavlm.serve.refusals import Refusal
from tests.conftest import picture
from tests.serve.server import MODEL, chat, shown, with_pixels, words

SIDE = 32


@pytest.fixture
def reader(coloured_squares):
    limits = ServeLimits(
        tokens=64, answer_tokens=20, pictures=2, picture_mib=1, picture_megapixels=1
    )
    return Reader(Tokenizer(coloured_squares / "tokenizer.model"), SIDE, MODEL, limits)


def read(reader, body):
    """A chat with its pictures."""
    return with_pixels(reader, body if isinstance(body, bytes) else json.dumps(body).encode())


def in_format(kind, **options):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_chat_becomes_turns_with_pictures(reader):
    red, blue = picture("red"), in_format("JPEG")
    body = chat(
        [words("Caption:"), shown(red), words("Say it.")],
        "a red square",
        [shown(blue, "jpeg"), words("Which colour?")],
    )
    asked = read(reader, body).request
    turns = [
        Turn(prompt="Caption:\nSay it.", answer="a red square", pictures=(0,)),
        Turn(prompt="Which colour?", answer="", pictures=(1,)),
    ]
    assert asked.prompt == prompt_of(reader.tokenizer, turns)
    expected = [read_square(encoded, "", SIDE) for encoded in (red, blue)]
    assert torch.equal(torch.stack(asked.pixels), torch.stack(expected))
    assert asked.sampling == replace(GREEDY, seed=asked.sampling.seed)
    assert (asked.max_new_tokens, asked.stop) == (20, ())


def test_system_messages_begin_the_first_question(reader):
    body = chat("Caption:", "a", "Say it.")
    system = [{"role": "system", "content": "Be short."}, {"role": "developer", "content": "Now."}]
    body["messages"] = system + body["messages"]
    expected = read(reader, chat("Be short.\n\nNow.\n\nCaption:", "a", "Say it."))
    assert read(reader, body).request.prompt == expected.request.prompt


def test_settings_of_a_request(reader):
    body = chat("a", temperature=0.5, top_p=0.9, top_k=3, seed=7, stop=["x", "y"], max_tokens=9)
    asked = read(reader, body)
    assert asked.request.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=3, seed=7)
    assert (asked.request.stop, asked.request.max_new_tokens) == (("x", "y"), 9)
    assert not asked.is_streamed
    more = chat("a", max_completion_tokens=5, stop="x", stream=True, seed=None, n=1, user="me")
    more |= {"stream_options": {"include_usage": True}, "presence_penalty": 0.0, "tools": None}
    asked = read(reader, more)
    assert (asked.request.stop, asked.request.max_new_tokens) == (("x",), 5)
    assert (asked.is_streamed, asked.with_usage) == (True, True)
    # Without a seed, each draw is another.
    seeds = {read(reader, chat("a", temperature=1)).request.sampling.seed for _ in range(3)}
    assert len(seeds) == 3
    # What is left of the limit on tokens.
    asked = read(reader, chat("a" * 50)).request
    assert len(asked.prompt.tokens) + asked.max_new_tokens == 64


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpg", "webp"])
def test_pictures_of_all_formats_are_read(reader, kind):
    encoded = in_format("jpeg" if kind == "jpg" else kind)
    [pixels] = read(reader, chat([shown(encoded, kind)])).request.pixels
    assert pixels.shape == (3, SIDE, SIDE)


def huge_picture(side):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def with_url(url):
    return chat([{"type": "image_url", "image_url": {"url": url}}, words("a")])


def roles(*names):
    return {"model": MODEL, "messages": [{"role": name, "content": "a"} for name in names]}


RED = picture("red")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":' + b"[" * 5_000, "not valid JSON"),
        (b"[1" + b",1" * (MOST_COMMAS + 1) + b"]", "commas"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "valid JSON"),
        (b"[]", "Input should be an object"),
        ({"messages": [{"role": "user", "content": "a"}]}, "model: Field required"),
        (chat("a") | {"model": "other"}, "there is no model other; this server has tiny"),
        (chat("a") | {"model": 5}, "model: Input should be a valid string"),
        (chat(), "messages: List should have at least 1 item"),
        (roles(*["user", "assistant"] * MOST_MESSAGES), "at most 256 items"),
        (roles("assistant"), r"messages\[0\] has the role assistant where user is due"),
        (roles("user", "user"), r"messages\[1\] has the role user where assistant is due"),
        (roles("user", "system"), r"messages\[1\] has the role system where assistant is due"),
        (roles("user", "assistant"), "messages must end with one of the user"),
        (roles("system"), "messages must end with one of the user"),
        (roles("tool"), r"messages\[0\].role: Input should be 'system'"),
        (chat(None), r"messages\[0\].content: Field required"),
        (chat([{"type": "text"}]), r"messages\[0\].content\[0\].text: Field required"),
        (chat([{"type": "input_audio"}]), "expected tags: 'text', 'image_url'"),
        (chat([words("a")] * 65), "at most 64 items"),
        (chat("a", "b", "c") | {"unknown": 1}, "unknown: Extra inputs are not permitted"),
        (chat("a") | {f"x{n}": 1 for n in range(MOST_FIELDS)}, "more than 64 fields"),
        (chat("a", n=2), "n is not supported but as 1"),
        (chat("a", tools=[{"type": "function"}]), "tools is not supported"),
        (chat("a", logprobs=True), "logprobs is not supported but as False"),
        (chat("a", response_format={"type": "json_object"}), "response_format is not supported"),
        (chat("a", temperature=-1), "temperature=-1.0 must lie between 0 and 100"),
        (chat("a", temperature=float("nan")), "temperature=nan must lie between"),
        (chat("a", temperature="hot"), "temperature: Input should be a valid number"),
        (chat("a", top_p=0), "top_p=0.0 must lie above 0"),
        (chat("a", top_k=0), "top_k=0 must lie between 1 and"),
        (chat("a", seed=2**63), "seed=.* must lie between"),
        (chat("a", seed=True), "seed: Input should be a valid integer"),
        (chat("a", stop=["x"] * 5), "stop: List should have at most 4 items"),
        (chat("a", stop=["x" * 257]), r"stop\[0\]: String should have at most 256 characters"),
        (chat("a", stop=""), r"stop\[0\]: String should have at least 1 character"),
        (chat("a" * 10_000), "10,000 characters exceed the limit of 64 tokens"),
        (chat([shown(RED)] * 3), "3 pictures exceed the limit of 2"),
        (chat("a", [shown(RED)], "b"), r"messages\[1\].content\[0\] is a picture; only users"),
        (with_url("https://example.org/a.png"), "this server fetches nothing"),
        (with_url("file:///etc/passwd"), "this server fetches nothing"),
        (with_url("data:image/svg+xml;base64,AAAA"), "must hold its picture itself"),
        (with_url("data:image/png;base64,%%%"), "must be a whole PNG, JPEG or WebP"),
        (with_url("data:image/png;base64,\u00e9"), "must be a whole PNG, JPEG or WebP"),
        (with_url("data:image/png;base64"), "must be a whole PNG, JPEG or WebP"),
        (with_url("data:image/png;charset=x,AAAA"), "must be a whole PNG, JPEG or WebP"),
        (chat([shown(RED[:60])]), r"picture of messages\[0\].content\[0\] cannot be used"),
        (chat([shown(in_format("GIF"))]), "must be a whole PNG, JPEG or WebP"),
        (chat([shown(huge_picture(1_001))]), "exceeds the limit of 1 megapixels"),
        (chat([shown(huge_picture(20_000))]), "must be a whole PNG"),  # a bomb, says Pillow
        (chat([shown(b"0" * (2**20 + 9))]), "exceeds the limit of 1 MiB"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_refused(reader, body, says):
    with pytest.raises(Refusal, match=says) as refused:
        read(reader, body)
    assert refused.value.status == (404 if "no model" in says else 400)
    error = refused.value.body["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "seed"])
@pytest.mark.parametrize("value", [0, -1, int("9" * 4_300), 2**31 - 1])
def test_lengths_that_are_refused_are_told_apart(reader, name, value):
    try:
        read(reader, chat("a", **{name: value}))
    except Refusal as refused:
        error = refused.body["error"]
        is_too_long = value == 2**31 - 1
        assert error["code"] == ("context_length_exceeded" if is_too_long else None)
        assert len(error["message"]) < 400
    else:
        assert name == "seed" and value in (0, 2**31 - 1)


def test_a_prompt_that_leaves_no_room_is_refused_before_its_pictures(reader):
    body = json.dumps(chat([shown(b"no picture"), words("a " * 70)])).encode()
    with pytest.raises(Refusal, match=r"tokens and 1 of the answer exceed the limit of 64") as told:
        reader.read(body)
    assert told.value.body["error"]["code"] == "context_length_exceeded"


def test_a_picture_may_be_of_the_largest_size_allowed(reader):
    padded = RED + b"\0" * (2**20 - len(RED))
    assert len(base64.b64encode(padded)) > 2**20
    assert len(read(reader, chat([shown(padded)])).request.pixels) == 1
