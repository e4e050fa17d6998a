"""Real servers, asked as clients ask them."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import httpx
import openai
import pytest
import uvicorn
from uvicorn.server import ServerState

from megavlm.__main__ import main
from megavlm.data.tokenizer import Tokenizer
from megavlm.infer.generate import generate
from megavlm.serve import chat as chat_module
from megavlm.serve import server
from megavlm.serve.chat import Reader
from megavlm.serve.limits import ServeLimits
from tests.conftest import picture
from tests.model.test_vlm import random_model
from tests.ranks import alone, run_on_ranks
from tests.serve.server import MODEL, chat, serving, shown, slowly, with_pixels, words

KEY = "sk-a-secret-key"
SECRET = "nobody may log this question"
LIMITS = {"rows": 4, "tokens": 100, "answer_tokens": 12, "pictures": 2, "body_mib": 1}


@pytest.fixture(scope="module")
def tokenizer(coloured_squares):
    return coloured_squares / "tokenizer.model"


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    with serving(tokenizer, tmp_path_factory.mktemp("serve"), key=KEY, **LIMITS) as running:
        yield running


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def slow(tokenizer, tmp_path_factory):
    """One answer at a time, each of which takes a while."""
    folder = tmp_path_factory.mktemp("slow")
    limits = {"rows": 1, "answer_tokens": 1_000}
    with serving(tokenizer, folder, before_step=slowly, **limits) as running:
        yield running


def kept_going(streamed):
    """The events of a stream that has begun."""
    lines = streamed.iter_lines()
    assert "assistant" in next(lines)
    return lines


@contextmanager
def streaming(served, body):
    body = {**body, "stream": True}
    url = f"{served.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as streamed:
        assert streamed.status_code == 200
        yield kept_going(streamed)


def text_and_finish(lines):
    """Of the rest of a stream."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    return "".join(c["delta"].get("content", "") for c in choices), choices[-1]["finish_reason"]


CHATS = [
    chat([shown(picture("red")), words("Caption:")]),
    chat("Say it."),
    chat([shown(picture("blue")), words("Which?")], "a", [shown(picture("red")), words("And?")]),
    chat(
        [words("Caption:"), shown(picture("green")), shown(picture("red"))], temperature=1.5, seed=3
    ),
    chat("a", temperature=2.0, top_k=50, top_p=0.9, seed=11, max_tokens=30),
    chat("Caption:", stop=["i"], max_tokens=30),
]


def test_answers_are_those_of_generate(client, tokenizer):
    reader = Reader(Tokenizer(tokenizer), 32, MODEL, ServeLimits(**LIMITS))
    requests = [with_pixels(reader, json.dumps(body).encode()).request for body in CHATS]
    with alone():
        expected = generate(random_model().eval(), Tokenizer(tokenizer), requests, batch_size=1)
    assert len(set(expected)) == len(expected)
    for body, text, request in zip(CHATS, expected, requests, strict=True):
        options = dict(body)
        if "top_k" in options:
            options["extra_body"] = {"top_k": options.pop("top_k")}
        whole = client.chat.completions.create(**options)
        assert whole.choices[0].message.content == text
        assert whole.usage.prompt_tokens == len(request.prompt.tokens)
        assert whole.choices[0].finish_reason in ("stop", "length")

        parts = [*client.chat.completions.create(**options, stream=True)]
        assert "".join(p.choices[0].delta.content or "" for p in parts) == text
        assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert all(part.usage is None for part in parts)
        assert len(parts) > 2 or not text

        options["stream_options"] = {"include_usage": True}
        *parts, last = client.chat.completions.create(**options, stream=True)
        assert (last.choices, last.usage) == ([], whole.usage)


def test_a_stop_string_ends_an_answer(client):
    body = {**CHATS[1], "max_tokens": 12}
    text = client.chat.completions.create(**body).choices[0].message.content
    stopped = client.chat.completions.create(**body, stop=[text[4:6]]).choices[0]
    assert stopped.message.content == text[: text.index(text[4:6])]
    assert stopped.finish_reason == "stop"


def test_an_assistants_message_is_taken_back(client):
    first = client.chat.completions.create(**chat("Caption:"))
    messages = [{"role": "user", "content": "Caption:"}, first.choices[0].message]
    messages.append({"role": "user", "content": "And?"})
    assert client.chat.completions.create(model=MODEL, messages=messages).choices


def test_models(client):
    [model] = client.models.list()
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="there is no model org/other") as told:
        client.models.retrieve("org/other")
    assert told.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        (chat("a") | {"model": "other"}, openai.NotFoundError, "there is no model other"),
        (chat("a", n=2), openai.BadRequestError, "n is not supported"),
        (chat("a", temperature=-1), openai.BadRequestError, "temperature=-1.0 must lie"),
        (chat([shown(b"no picture")]), openai.BadRequestError, "cannot be used"),
        (chat([shown(picture("red"))] * 3), openai.BadRequestError, "3 pictures exceed"),
        (chat("a b " * 60), openai.BadRequestError, "tokens and 1 of the answer exceed"),
        (chat("a", max_tokens=0), openai.BadRequestError, "max_tokens: Input should be"),
        (chat("a" * 2**20), openai.APIStatusError, "exceeds the limit of 1 MiB"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_clients_understand_refusals(client, body, error, says, stream):
    with pytest.raises(error, match=says):
        client.chat.completions.create(**body, stream=stream)


def test_the_key_is_needed(served):
    for header in (None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        for path in ("models", "chat/completions"):
            method = "POST" if "chat" in path else "GET"
            answer = httpx.request(method, f"{served.url}/v1/{path}", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_what_http_can_get_wrong(served):
    right = {"authorization": f"Bearer {KEY}"}
    broken = served.post("{", **right)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    plain = served.post("{}", **{**right, "content-type": "text/plain"})
    assert (plain.status_code, plain.json()["error"]["type"]) == (415, "invalid_request_error")
    chunks = (b" " * 2**16 for _ in range(17))  # no length is declared
    url = f"{served.url}/v1/chat/completions"
    headers = {**right, "content-type": "application/json"}
    assert httpx.post(url, content=chunks, headers=headers).status_code == 413
    assert "no such path" in httpx.get(f"{served.url}/v2").json()["error"]["message"]
    wrong_method = httpx.get(url)
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "POST")
    assert httpx.get(f"{served.url}/docs").status_code == 404
    with connected(served) as raw:
        raw.sendall(b"\x16\x03\x01\0\r\n\r\n")
        head, _, content = everything(raw).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert json.loads(content)["error"]["code"] == "invalid_http"


def test_the_page_may_do_little(served):
    page = httpx.get(served.url)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in page.text.replace("http-equiv", ""), "it names nothing outside"


def test_counts(served, client):
    names = ("pictures_encoded_total", "pictures_reused_total", "prompt_tokens_total")
    names += ("generated_tokens_total", "time_to_first_token_seconds_count")
    names += ("time_per_output_token_seconds_count", "requests_total")
    before = [served.count(name) for name in names]
    body = chat([shown(picture("purple", 52)), words("Caption:")], max_tokens=5)
    usages = [client.chat.completions.create(**body).usage for _ in range(2)]
    prompt, written = (
        sum(getattr(usage, name) for usage in usages)
        for name in ("prompt_tokens", "completion_tokens")
    )
    more = [served.count(name) - count for name, count in zip(names, before, strict=True)]
    *counts, requests = more
    assert counts == [1, 1, prompt, written, 2, written - 2]
    # Asking for the counts is asking, too.
    assert requests == 2 + len(names)
    assert served.count("running_requests") == served.count("waiting_requests") == 0


def test_one_that_goes_away_makes_room(slow):
    before = slow.count("cancelled_requests_total")
    with streaming(slow, chat("a")) as lines:
        next(lines)
        assert slow.count("running_requests") == 1
    slow.wait_until("running_requests", 0)
    with pytest.raises(httpx.ReadTimeout):
        url = f"{slow.url}/v1/chat/completions"
        httpx.post(url, json=chat("a"), timeout=httpx.Timeout(5, read=0.3))
    slow.wait_until("running_requests", 0)
    assert slow.count("cancelled_requests_total") == before + 2
    assert slow.post(chat("a", max_tokens=3)).json()["usage"]["completion_tokens"] == 3


def test_requests_that_find_no_room(tokenizer, tmp_path):
    def very_slowly(_):
        time.sleep(0.3)

    limits = {"rows": 1, "queue": 2, "request_seconds": 1}
    body = json.dumps(chat("a")).encode()
    with (
        serving(tokenizer, tmp_path, before_step=very_slowly, **limits) as served,
        ExitStack() as all_,
    ):
        asking = [all_.enter_context(connected(served)) for _ in range(4)]
        for raw in asking:
            raw.sendall(request_head(len(body)) + body)
        told = [everything(raw, until=b"}}").partition(b"\r\n\r\n") for raw in asking]
        assert sorted(head[9:12] for head, *_ in told) == [b"200", b"429", b"504", b"504"]
        for head, _, content in told:
            match head[9:12]:
                case b"200":  # as much as could be written
                    assert json.loads(content)["choices"][0]["finish_reason"] == "length"
                case b"429":
                    assert b"retry-after: 2" in head
                    assert json.loads(content)["error"]["type"] == "rate_limit_error"
                case _:
                    assert json.loads(content)["error"]["code"] == "timeout"


def connected(served):
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def request_head(length):
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def everything(raw, until=b""):
    """What a connection brings until it is closed, or has brought this."""
    received = b""
    while not until or until not in received:
        try:
            part = raw.recv(65_536)
        except ConnectionResetError:
            break
        if not part:
            break
        received += part
    return received


def test_slow_senders_are_cut_off(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.4)
    health = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    limits = {"receive_seconds": 1, "connections": 5}
    with serving(tokenizer, tmp_path, **limits) as served, ExitStack() as open_:
        silent, head, body, later = (open_.enter_context(connected(served)) for _ in range(4))
        head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: ")
        body.sendall(request_head(1_000) + b'{"model":')
        for _ in range(2):  # kept open between requests
            later.sendall(health)
            assert b'{"status":"ok"}' in everything(later, until=b"}")
        later.sendall(health[:20])
        crowd = [open_.enter_context(connected(served)) for _ in range(5)]
        told = [everything(raw) for raw in crowd[1:]]
        assert all(answer.startswith(b"HTTP/1.1 503") for answer in told)
        for _ in range(3):  # a byte now and then does not help
            time.sleep(0.2)
            head.sendall(b"x")
            body.sendall(b" ")
        assert everything(body).startswith(b"HTTP/1.1 408")
        assert everything(silent) == everything(head) == everything(later) == b""
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_client_that_takes_nothing_is_cut_off():
    async def stall(seconds):
        config = uvicorn.Config(Mock(), log_level="error")
        config.load()
        limits = ServeLimits(send_seconds=0)
        connection = server._Connection(limits, config, ServerState(), {})
        transport = Mock()
        transport.get_extra_info.return_value = None
        connection.connection_made(transport)
        connection.pause_writing()
        if not seconds:
            connection.resume_writing()
        await asyncio.sleep(0.1)
        connection.connection_lost(None)
        return transport.abort.called

    async def both():
        return await asyncio.gather(stall(1), stall(0))

    assert asyncio.run(both()) == [True, False]


@pytest.mark.parametrize(("patience", "tokens"), [(30, 30), (1, 1_000)])
def test_the_end_waits_for_answers(tokenizer, tmp_path, patience, tokens):
    with serving(tokenizer, tmp_path, before_step=slowly, drain_seconds=patience) as served:
        with streaming(served, chat("a", max_tokens=tokens)) as lines:
            os.kill(served.process, signal.SIGINT if patience == 1 else signal.SIGTERM)
            time.sleep(0.1)
            refused = served.post(chat("a"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert httpx.get(f"{served.url}/health").json() == {"status": "draining"}
            started = time.monotonic()
            text, finish = text_and_finish(lines)
            assert finish == "length"
            assert text
        assert served.wait() == 0
        assert "1 answers have" in served.log.read_text()
        took = time.monotonic() - started
        assert took < 10
        with pytest.raises(httpx.ConnectError):
            served.post(chat("a"))


PICTURES = chat([shown(picture("red") + b"\0" * 2**23), words("a")])
"""Of 11 MiB."""
MOST_MIB = 140  # of the two that are being decoded; 101 were seen, and 197 with all 12 in memory


@pytest.fixture
def stuck(tokenizer, tmp_path, monkeypatch):
    """Starts a server whose decoders never come to an end."""
    monkeypatch.setattr(chat_module, "read_square", lambda *_: time.sleep(1_000))
    return partial(serving, tokenizer, tmp_path, answer_tokens=3)


def test_pictures_hold_up_no_texts_and_no_memory(stuck):
    body = json.dumps(PICTURES).encode()
    with stuck(request_seconds=1) as served:
        assert served.post(chat("a")).status_code == 200
        before = resident_mib(served.process)
        with connected(served) as patient:
            patient.sendall(request_head(len(body)) + body)
            for _ in range(12):  # who leave while they wait for a decoder
                with connected(served) as raw:
                    raw.sendall(request_head(len(body)) + body)
                    time.sleep(0.05)
            assert served.post(chat("a")).status_code == 200
            assert b'"code":"timeout"' in everything(patient, until=b"}}")
        assert resident_mib(served.process) - before < MOST_MIB


def resident_mib(process):
    status = Path(f"/proc/{process}/status").read_text()
    [kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(kib) / 1024


def test_the_end_waits_for_no_decoder(stuck):
    with stuck(drain_seconds=1) as served, connected(served) as raw:
        body = json.dumps(PICTURES).encode()
        raw.sendall(request_head(len(body)) + body)
        time.sleep(0.2)
        os.kill(served.process, signal.SIGTERM)
        assert b'"code":"shutting_down"' in everything(raw, until=b"}}")
        assert served.wait() == 0
        assert "1 answers have 1 seconds left" in served.log.read_text()


def test_while_the_model_is_loaded(tokenizer, tmp_path):
    with serving(tokenizer, tmp_path, load_seconds=60, host="0.0.0.0") as served:
        refused = served.post(chat("a"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert refused.json()["error"]["code"] == "loading"
        health = httpx.get(f"{served.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert httpx.get(served.url).status_code == 200
        assert served.end() == 0
        assert "whoever reaches 0.0.0.0 may ask" in served.log.read_text()


def test_the_engine_fails_and_starts_anew(tokenizer, tmp_path):
    def fail(engine):
        waiting = [row.asked.max_new_tokens for row in engine._waiting]
        if 13 in waiting:
            raise RuntimeError(SECRET)

    with serving(tokenizer, tmp_path, before_step=fail) as served:
        expected = served.post(chat("a", max_tokens=4)).json()["choices"]
        failed = served.post(chat("a", max_tokens=13))
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "engine_failed")
        assert served.post(chat("a", max_tokens=4)).json()["choices"] == expected
        log = served.log.read_text()
        assert "the engine failed (RuntimeError)" in log
        assert SECRET not in log


def test_nothing_of_a_request_is_logged(tokenizer, tmp_path):
    with serving(tokenizer, tmp_path, key=KEY) as served:
        right = {"authorization": f"Bearer {KEY}"}
        asked = chat([shown(picture("red")), words(SECRET)], max_tokens=4)
        assert served.post(asked, **right).status_code == 200
        assert served.post(chat(SECRET) | {SECRET: SECRET}, **right).status_code == 400
        assert served.post(chat([shown(SECRET.encode())]), **right).status_code == 400
        assert served.post(asked, authorization=f"Bearer {SECRET}").status_code == 401
        httpx.get(f"{served.url}/{SECRET}")
        assert served.end() == 0
        log = served.log.read_text()
        assert log.count("\n") == 3
        assert SECRET not in log
        assert KEY not in log


def test_mistakes_of_the_command(capsys, tiny_run_file, tmp_path, monkeypatch):
    key = tmp_path / "key"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        key.write_text(f" {KEY}\n")
        assert (
            main(["serve", str(tiny_run_file), "--port", str(port), f"--api-key-file={key}"]) == 2
        )
        assert "Address already in use; choose others" in capsys.readouterr().err
    for content, says in (("", "must hold one key"), ("a b", "must hold one key")):
        key.write_text(content)
        assert main(["serve", str(tiny_run_file), "--api-key-file", str(key)]) == 2
        assert says in capsys.readouterr().err
    assert main(["serve", str(tiny_run_file), "--api-key-file", str(tmp_path / "no")]) == 2
    assert "cannot read --api-key-file" in capsys.readouterr().err
    monkeypatch.setenv(server.KEY_VARIABLE, "\u00e9")
    assert main(["serve", str(tiny_run_file)]) == 2
    assert "MEGAVLM_API_KEY must hold one key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "holds no checkpoint; train first"),
        (["--quantization", "int4"], "int4 takes 16 outputs and groups of 32 inputs"),
    ],
)
def test_a_run_without_a_model_is_told(tiny_run_file, tmp_path, options, says):
    told = tmp_path / "told"

    def serve(_):
        sys.stderr = told.open("w", buffering=1)
        return main(["serve", str(tiny_run_file), "--port", "0", *options])

    assert run_on_ranks(1, serve, groups=False) == [2]
    assert says in told.read_text()
