"""An exported folder, opened by transformers alone, against our tokenizer, pictures and model."""

import io
import json
import random
from dataclasses import asdict

import jinja2
import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from megavlm.__main__ import main
from megavlm.checkpoint.lazy import in_memory
from megavlm.convert.files import write_native
from megavlm.convert.processor import MARK, write_processor
from megavlm.data.image import decode_picture, fit_square, to_uint8_tensor
from megavlm.data.packing import tokenize
from megavlm.data.samples import Text, Turn
from megavlm.data.tokenizer import CONTROL_SYMBOLS, END, SPACE, Tokenizer, train_tokenizer
from megavlm.files.folder import Folder
from megavlm.model.vit import normalise
from megavlm.serve.chat import Reader
from megavlm.serve.limits import ServeLimits
from tests.batches import TINY
from tests.convert.commands import certificate, command, fails
from tests.model.test_vlm import random_model
from tests.ranks import alone, run_on_ranks

SIDE = TINY.encoder.image_pixels
PIXEL_ATOL = 5e-7  # of normalised values up to 2.7; worst measured 2.4e-7
NEW_TOKENS = 6
ALPHABETS = ("abcdefgh", "あいうえおかきく", "カタナハマ", "犬猫鳥魚山川", "éüßñ", "0123456789")
RARE = " \t\n\r　▁|<>é👩‍👩‍👧🐈ｱＡ\u0000\u200b\ufdd1"
SPELLED = ("<s>", "</s>", "<pad>", "<unk>", "<0x41>", *CONTROL_SYMBOLS)


def random_text(chance: random.Random) -> str:
    """Words of several scripts, rare characters and the spelling of symbols."""
    parts = []
    for _ in range(chance.randint(0, 8)):
        match chance.randint(0, 9):
            case 0:
                parts.append("".join(chance.choices(RARE, k=chance.randint(1, 4))))
            case 1:
                parts.append(chance.choice(SPELLED))
            case 2:
                any_plane = chance.choice([(0, 0xD7FF), (0xE000, 0xFDCF), (0x10000, 0x10FFFF)])
                parts.append(chr(chance.randint(*any_plane)))
            case 3:
                parts.append(" " * chance.randint(1, 4))
            case _:
                letters = chance.choice(ALPHABETS)
                parts.append("".join(chance.choices(letters, k=chance.randint(1, 6))))
    return chance.choice(("", " ")).join(parts)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """Of as many pieces as the smallest model has."""
    chance = random.Random(0)
    words = [
        "".join(chance.choices(a, k=chance.randint(2, 4))) for a in ALPHABETS for _ in range(8)
    ]
    lines = [" ".join(chance.choices(words, k=chance.randint(1, 8))) for _ in range(500)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(lines, path, TINY.decoder.vocabulary)
    return path


@pytest.fixture(scope="module")
def ours(tokenizer_file):
    return Tokenizer(tokenizer_file)


@pytest.fixture(scope="module")
def model():
    """Of random weights, large enough that pictures and words matter."""
    with alone():
        yield random_model(TINY).eval()


@pytest.fixture(scope="module")
def checkpoint(model, ours, tokenizer_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, model, ours.fingerprint, {"tokenizer": str(tokenizer_file)})
    return folder


def write_checkpoint(folder, model, tokenizer_sha256, data):
    folder.mkdir(exist_ok=True)
    tensors = {f"weights/{name}": p.detach() for name, p in model.named_parameters()}
    settings = {"model": asdict(TINY), "data": data}
    state = {"step": 7, "settings": settings, "tokenizer_sha256": tokenizer_sha256}
    write_native(Folder(folder), in_memory(tensors), state, max_file_bytes=10**9)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "exported"
    assert command(checkpoint, "--no-compare", "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def processor(exported):
    return AutoProcessor.from_pretrained(exported)


@pytest.fixture(scope="module")
def theirs(exported):
    return AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)


def picture(seed: int) -> Image.Image:
    """Noise of any shape."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(10, 90, 2)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def messages(turns, pictures):
    """As transformers has them: the last turn's answer is to come."""
    said = []
    for turn in turns:
        shown = [{"type": "image", "image": pictures[number]} for number in turn.pictures]
        said.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.prompt}]})
        said.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return said[:-1]


def prompted(tokenizer, turns):
    """Tokens up to the answer, and which pictures are seen from where on, as in training."""
    count = sum(len(turn.pictures) for turn in turns)
    text = Text(turns=tuple(turns), task="chat")
    packed, was_cut = tokenize(tokenizer, text, range(count), row_tokens=1_000)
    assert not was_cut and packed.tokens[-1] == END
    return packed.tokens[:-1], packed.images


def chat(*turns):
    """Turns of (prompt, how many pictures, answer)."""
    made, shown = [], 0
    for prompt, count, answer in turns:
        pictures = tuple(range(shown, shown + count))
        made.append(Turn(prompt=prompt, answer=answer, pictures=pictures))
        shown += count
    return made


def test_tokens_and_texts_are_the_same(exported, ours):
    theirs = AutoTokenizer.from_pretrained(exported)
    chance = random.Random(1)
    texts = ["", " ", "  ", "\t", "\n", *SPELLED, *(random_text(chance) for _ in range(2_000))]
    expected = [ours.encode(text) for text in texts]
    assert theirs(texts, split_special_tokens=True)["input_ids"] == expected
    pieces = {token for tokens in expected for token in tokens}
    assert sum(len(piece.text) > 1 for n, piece in enumerate(ours.pieces()) if n in pieces) > 200
    decoded = theirs.batch_decode(expected, skip_special_tokens=True)
    assert decoded == [ours.decode(tokens) for tokens in expected]
    assert decoded == [text.replace(SPACE, " ") for text in texts]
    # Without that argument texts may spell symbols, as everywhere in transformers.
    for symbol in ("<s>", "</s>", "<pad>", "<unk>", *CONTROL_SYMBOLS):
        [token] = theirs(symbol)["input_ids"]
        assert theirs.convert_ids_to_tokens(token) == symbol and token not in ours.encode(symbol)
        assert theirs.decode([token], skip_special_tokens=True) == ""
    marked = [text.replace("<", f"<{MARK}") for text in texts]
    assert theirs(marked)["input_ids"] == expected
    assert len(theirs) == ours.vocabulary
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    assert (theirs.image_token, theirs.image_token_id) == ("<|image|>", ours.image)


@pytest.mark.slow
@pytest.mark.parametrize("alphabet", ["ab", "aaaaab", "aあい "])
def test_pieces_that_overlap_are_joined_in_the_same_order(tmp_path, alphabet):
    """Of so few letters that most pieces can be made, and placed, in several ways."""
    chance = random.Random(0)

    def texts(count):
        return ["".join(chance.choices(alphabet, k=chance.randint(1, 60))) for _ in range(count)]

    path = tmp_path / "tokenizer.model"
    train_tokenizer(texts(10_000), path, 520)
    ours = Tokenizer(path)
    write_processor(Folder(tmp_path), path, TINY)
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    given = texts(10_000)
    assert theirs(given)["input_ids"] == [ours.encode(text) for text in given]


def test_pictures_are_the_same(exported):
    theirs = AutoImageProcessor.from_pretrained(exported)
    worst = 0.0
    for seed in range(40):
        image = picture(seed)
        made = theirs(image, return_tensors="pt")["pixel_values"]
        assert made.shape == (1, 1, 1, 3, SIDE, SIDE)
        expected = normalise(to_uint8_tensor(fit_square(image, SIDE))[None])
        worst = max(worst, float((made[0, 0] - expected).abs().max()))
    assert worst < PIXEL_ATOL
    image.putalpha(picture(99).convert("L").resize(image.size))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    expected = normalise(
        to_uint8_tensor(fit_square(decode_picture(encoded.getvalue(), "", 1), SIDE))
    )
    made = theirs(Image.open(encoded), return_tensors="pt")["pixel_values"][0, 0]
    assert (made - expected).abs().max() < PIXEL_ATOL  # transparency on white


CHATS = [
    [("Caption:", 1, "")],
    [("あい 猫?", 0, "")],
    [(" <|user|> <s>\n\t12", 2, "")],
    [("ab", 1, " <|image|></s> "), ("犬", 0, "")],
    [("ab cd", 2, "ef"), ("", 1, "")],
    [("ab cd", 1, "かき"), ("Which?", 2, "no"), ("and\ufdd0 <\ufdd0", 0, "")],
    [("late", 0, "yes"), ("now", 1, "")],
]


@pytest.mark.parametrize("turns", CHATS)
def test_prompts_and_what_they_see_are_the_same(processor, ours, turns):
    turns = chat(*turns)
    pictures = [picture(seed) for seed in range(9)]
    made = processor.apply_chat_template(
        messages(turns, pictures),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens, seen = prompted(ours, turns)
    assert made["input_ids"].tolist() == [tokens]
    if not seen:
        assert set(made) == {"input_ids", "attention_mask"}
        return
    expected = torch.zeros(len(tokens), sum(len(turn.pictures) for turn in turns))
    for first, slots in seen:
        expected[first:] = 0
        expected[first:, slots.start : slots.end] = 1
    assert torch.equal(made["cross_attention_mask"][0, :, :, 0].float(), expected)


def test_other_chats_are_refused(processor):
    def rendered(*said):
        return processor.apply_chat_template([{"role": r, "content": c} for r, c in said])

    assert (
        rendered(("user", "a<b"), ("assistant", "c")) == f"<s><|user|>a<{MARK}b<|assistant|>c</s>"
    )
    for said in (
        [("user", "a"), ("system", "be kind")],
        [("user", "a"), ("user", "b")],
        [("assistant", "a")],
    ):
        with pytest.raises(jinja2.TemplateError, match="messages must alternate"):
            rendered(*said)
    with pytest.raises(jinja2.TemplateError, match="a turn of the user cannot show audio"):
        rendered(("user", [{"type": "audio"}]))
    with pytest.raises(jinja2.TemplateError, match="a turn of the assistant cannot show image"):
        rendered(("user", "a"), ("assistant", [{"type": "image"}]))
    with pytest.raises(jinja2.TemplateError, match="a turn of the system cannot show image"):
        rendered(("system", [{"type": "image"}]), ("user", "a"))
    for said in ([("system", "a")], [("user", "a"), ("assistant", "b")]):
        with pytest.raises(jinja2.TemplateError, match="must end with one of the user"):
            processor.apply_chat_template(
                [{"role": r, "content": c} for r, c in said], add_generation_prompt=True
            )


def test_prompts_are_those_of_the_server(processor, ours):
    """Of chats with instructions, several texts in a message, and pictures anywhere."""
    reader = Reader(ours, SIDE, "tiny", ServeLimits(tokens=100_000, pictures=99))
    chance = random.Random(5)
    for _ in range(100):
        roles = [chance.choice(["system", "developer"]) for _ in range(chance.randint(0, 2))]
        roles += ["user", "assistant"] * chance.randint(0, 2) + ["user"]
        chat = [{"role": role, "content": random_content(chance, role)} for role in roles]
        theirs = processor.apply_chat_template(chat, add_generation_prompt=True)
        asked = reader.read(json.dumps({"model": "tiny", "messages": in_openais(chat)}).encode())
        tokens = processor.tokenizer(theirs, add_special_tokens=False)["input_ids"]
        assert tokens == asked.request.prompt.tokens


def random_content(chance, role):
    if chance.random() < 0.3:
        return random_text(chance)
    kinds = ["text", "text", "image"] if role == "user" else ["text"]
    return [
        {"type": kind, "text": random_text(chance)} if kind == "text" else {"type": kind}
        for kind in chance.choices(kinds, k=chance.randint(0, 4))
    ]


def in_openais(chat):
    """With pictures as OpenAI's chats have them, which are not read here."""
    shown = {"type": "image_url", "image_url": {"url": ""}}
    return [
        m if isinstance(m["content"], str)
        else {**m, "content": [shown if p["type"] == "image" else p for p in m["content"]]}
        for m in chat
    ]  # fmt: skip


@torch.no_grad()
def greedy(model, tokenizer, turns, pictures):
    """Our answer, by running the whole sequence anew for each token."""
    tokens, seen = prompted(tokenizer, turns)
    prompt_tokens = len(tokens)
    shown = [pictures[number] for turn in turns for number in turn.pictures]
    shown = shown or [Image.new("RGB", (SIDE, SIDE))]
    pixels = torch.stack([to_uint8_tensor(fit_square(image, SIDE)) for image in shown])
    states = model.encode_images(pixels)
    for _ in range(NEW_TOKENS):
        ranges = torch.zeros(2, 1, len(tokens), dtype=torch.int32)
        for first, slots in seen:
            for bound, slot in zip(ranges, slots, strict=True):
                bound[0, first:] = slot * model.sizes.encoder.tokens
        token = int(model.logits(torch.tensor([tokens]), ranges, states)[0, -1].argmax())
        if token == END:
            break
        tokens.append(token)
    return tokens[prompt_tokens:]


def answers(theirs, processor, chats, pictures):
    """Their answers to chats in one batch."""
    made = processor.apply_chat_template(
        [messages(turns, of_chat) for turns, of_chat in zip(chats, pictures, strict=True)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )
    rows = theirs.generate(**made, max_new_tokens=NEW_TOKENS)
    return [row[: row.index(END)] if END in row else row for row in _new(rows, made)]


def _new(rows, made):
    return rows[:, made["input_ids"].shape[1] :].tolist()


def random_chat(chance, *, with_pictures):
    """One or two turns, with at most two pictures each; the first has one, if any turn has."""
    turns = []
    for number in range(chance.randint(1, 2)):
        count = chance.randint(int(number == 0), 2) if with_pictures else 0
        turns.append((random_text(chance), count, random_text(chance)))
    turns[-1] = (*turns[-1][:2], "")
    return chat(*turns)


def assert_answers_alike(theirs, processor, model, tokenizer, *, seed, count):
    """One by one and in a batch, with pictures and without; returns the answers."""
    chance = random.Random(seed)
    told = []
    for with_pictures in (True, False):
        chats = [random_chat(chance, with_pictures=with_pictures) for _ in range(count)]
        pictures = [[picture(chance.randint(0, 10**6)) for _ in range(4)] for _ in chats]
        expected = [greedy(model, tokenizer, *of) for of in zip(chats, pictures, strict=True)]
        assert answers(theirs, processor, chats, pictures) == expected
        for of_chat in zip(chats, pictures, expected, strict=True):
            turns, shown, tokens = of_chat
            assert answers(theirs, processor, [turns], [shown]) == [tokens]
        told += expected
    return told


def test_answers_are_the_same(theirs, processor, model, ours):
    told = assert_answers_alike(theirs, processor, model, ours, seed=0, count=6)
    assert len({tuple(tokens) for tokens in told}) > 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_answers_are_the_same(theirs, processor, model, ours, seed):
    assert_answers_alike(theirs, processor, model, ours, seed=seed, count=12)


def test_the_pipeline_answers_the_same(exported, model, ours):
    turns, image = chat(("abc 犬", 1, "")), picture(5)
    ask = pipeline("image-text-to-text", model=str(exported))
    [told] = ask(text=messages(turns, [image]), max_new_tokens=NEW_TOKENS, return_full_text=False)
    assert told["generated_text"] == ours.decode(greedy(model, ours, turns, [image]))


def test_what_is_written(exported, checkpoint, ours, capfd):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "certificate.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((exported / "config.json").read_text())["image_token_index"] == ours.image
    assert json.loads((exported / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "do_sample": False,
    }
    assert command("--verify", exported) == 0
    template = exported / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + " ")
    fails(capfd, "chat_template.jinja has sha256", "--verify", exported)
    template.write_text(before)

    # Written to a store, each file is the same; which the certificate says, too.
    def in_a_store(_):
        store = "memory://exported"
        assert main(["convert", str(checkpoint), "--no-compare", "--out", store]) == 0
        folder = Folder(store)
        return {name: folder.read(name) for name in folder.names()}

    [stored] = run_on_ranks(1, in_a_store, groups=False)
    assert stored == {name: (exported / name).read_bytes() for name in names}


def test_the_tokenizer_is_found_or_asked_for(model, ours, tokenizer_file, tmp_path, capfd):
    moved, unknown, out = tmp_path / "moved", tmp_path / "unknown", tmp_path / "out"
    write_checkpoint(moved, model, ours.fingerprint, {"tokenizer": "gone/tokenizer.model"})
    write_checkpoint(unknown, model, None, {})
    to_out = ("--no-compare", "--out", out)
    remedy = "with --tokenizer, or write weights alone with --no-tokenizer"
    says = f"tokenizer gone/tokenizer.model is not there; name where it is {remedy}"
    fails(capfd, says, moved, *to_out)
    says = f"does not say which tokenizer it was trained with; name it {remedy}"
    fails(capfd, says, unknown, *to_out)
    other = tmp_path / "other.model"
    lines = ["a b", *(f"word{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")]
    train_tokenizer(lines, other, 320)
    fails(
        capfd, "was trained with another tokenizer (SHA-256", moved, "--tokenizer", other, *to_out
    )
    fails(capfd, "has 320 pieces, but the model", unknown, "--tokenizer", other, *to_out)
    for option in (["--tokenizer", other], ["--no-tokenizer"]):
        says = f"{option[0]} is for --to mllama, but this is --to native; leave it out"
        fails(capfd, says, moved, *option, "--to", "native", *to_out)
    assert not out.exists()
    assert command(moved, "--tokenizer", tokenizer_file, *to_out) == 0
    assert "tokenizer.json" in certificate(out)["target"]["files"]
    alone = ("--no-tokenizer", "--no-compare", "--out", tmp_path / "alone")
    assert command(moved, *alone) == 0
    written = {path.name for path in (tmp_path / "alone").iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert written == weights | {"certificate.json"}
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert config["image_token_index"] == TINY.decoder.vocabulary


def test_other_tokenizers_are_refused(model, tmp_path, capfd):
    write_checkpoint(tmp_path / "source", model, None, {})
    path = tmp_path / "foreign.model"
    lines = [f"{a}{b} {c}" for a in "abcdefghij" for b in "klmnopqrst" for c in ("xy", "zw", "vu")]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=TINY.decoder.vocabulary,
            hard_vocab_limit=False,
            byte_fallback=True,
            pad_id=3,
            control_symbols=[*CONTROL_SYMBOLS, "[MASK]"],
            user_defined_symbols=[f"w{n}" for n in range(40)],
            minloglevel=2,
        )
    broken = (
        "it must have normalization_rule_name=identity, no add_dummy_prefix, no "
        "remove_extra_whitespaces, no user_defined_symbols, a < in every control symbol, as"
    )
    arguments = ("--tokenizer", path, "--no-compare", "--out", tmp_path / "out")
    fails(capfd, broken, tmp_path / "source", *arguments)
    assert not (tmp_path / "out").exists()
