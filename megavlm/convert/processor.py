"""What transformers needs beside an Mllama's weights: tokenizer, pictures and chats, as ours.

All of it is plain files that classes of transformers read; none of our code runs there.
"""

from pathlib import Path
from typing import Any

from megavlm.config.sizes import ModelSizes
from megavlm.convert.files import write_json
from megavlm.data.image import PIXEL_MEAN, PIXEL_STD
from megavlm.data.tokenizer import BEGIN, CONTROL_SYMBOLS, END, PADDING, SPACE, UNKNOWN
from megavlm.errors import TokenizerError
from megavlm.files.folder import Folder

TEMPLATE_FILE = "chat_template.jinja"

MARK = "\ufdd0"
"""Written after each `<` of a chat's texts, so that they spell no control symbol, and taken away by
the tokenizer before it looks for pieces. A noncharacter, which Unicode keeps for such use."""

# The order is that of `Tokenizer.turn` and `packing.tokenize`; texts are joined as in `serve.chat`.
CHAT_TEMPLATE = r"""
{#- Pictures come first in their turn, in the first one before the begin symbol. -#}
{#- "<" is marked in texts, so that they spell no control symbol; the tokenizer unmarks it. -#}
{%- macro texts(content) -%}
  {%- if content is string -%}
    {{- content | replace("<", "<\ufdd0") -}}
  {%- else -%}
    {%- for part in content if part["type"] == "text" -%}
      {{- "" if loop.first else "\n" -}}
      {{- part["text"] | replace("<", "<\ufdd0") -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set at = namespace(turn=0, instructions="") -%}
{%- for message in messages -%}
  {%- set is_instruction = at.turn == 0 and message["role"] in ["system", "developer"] -%}
  {%- if not is_instruction and message["role"] != ["user", "assistant"][at.turn % 2] -%}
    {{- raise_exception("messages must alternate: user, assistant, user, ..., after any of the "
        ~ "system; not " ~ message["role"] ~ " as number " ~ loop.index) -}}
  {%- endif -%}
  {%- if message["content"] is not string -%}
    {%- for part in message["content"] if part["type"] != "text" -%}
      {%- if part["type"] != "image" or message["role"] != "user" -%}
        {{- raise_exception("a turn of the " ~ message["role"] ~ " cannot show " ~ part["type"]) -}}
      {%- endif -%}
      {{- "<|image|>" -}}
    {%- endfor -%}
  {%- endif -%}
  {%- if is_instruction -%}
    {%- set at.instructions = at.instructions ~ texts(message["content"]) ~ "\n\n" -%}
  {%- else -%}
    {%- if at.turn == 0 -%}
      {{- bos_token -}}
    {%- endif -%}
    {{- "<|" ~ message["role"] ~ "|>" ~ ("" if at.turn else at.instructions) -}}
    {{- texts(message["content"]) -}}
    {%- if message["role"] == "assistant" -%}
      {{- eos_token -}}
    {%- endif -%}
    {%- set at.turn = at.turn + 1 -%}
  {%- endif -%}
{%- endfor -%}
{%- if at.turn == 0 or (add_generation_prompt and at.turn % 2 == 0) -%}
  {{- raise_exception("messages must end with one of the user") -}}
{%- endif -%}
{%- if add_generation_prompt -%}
  {{- "<|assistant|>" -}}
{%- endif -%}
""".lstrip()


def write_processor(folder: Folder, tokenizer: Path, sizes: ModelSizes) -> None:
    """Write what `AutoProcessor.from_pretrained` reads.

    tokenizer: a SentencePiece model that `Tokenizer` opens. Raises TokenizerError for one that
    `train_tokenizer` has not made and that computes something else than what is written.
    """
    in_tokenizers_form, symbols = _tokenizer_files(tokenizer)
    write_json(folder, "tokenizer.json", in_tokenizers_form)
    write_json(folder, "tokenizer_config.json", symbols | _TOKENIZER)
    write_json(folder, "special_tokens_map.json", symbols)
    write_json(folder, "preprocessor_config.json", _pictures(sizes.encoder.image_pixels))
    folder.write_atomically(TEMPLATE_FILE, CHAT_TEMPLATE.encode())


_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "MllamaProcessor",
    "extra_special_tokens": dict(
        zip(("image_token", "user_token", "assistant_token"), CONTROL_SYMBOLS, strict=True)
    ),
    "model_input_names": ["input_ids", "attention_mask"],
    "padding_side": "left",  # generation continues the right
    "clean_up_tokenization_spaces": False,
    "model_max_length": int(1e30),  # as transformers writes that there is no limit
}


def _pictures(side: int) -> dict[str, Any]:
    """One tile: fitted to the upper left of a square, as by `data.image.fit_square`."""
    return {
        "image_processor_type": "MllamaImageProcessor",
        "processor_class": "MllamaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 2,  # bilinear
        "size": {"height": side, "width": side},
        "do_pad": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": PIXEL_MEAN,
        "image_std": PIXEL_STD,
        "max_image_tiles": 1,
    }


def _tokenizer_files(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The contents of tokenizer.json, and how special symbols are spelled, by their roles."""
    from sentencepiece import sentencepiece_model_pb2  # wants the newest protobuf

    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore
    model.ParseFromString(path.read_bytes())
    _require_ours(model, path)
    kinds = type(model.pieces[0])
    names: list[str] = [piece.piece for piece in model.pieces]
    special = [
        number for number, piece in enumerate(model.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]  # fmt: skip
    learned = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": names[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [_replace(f"<{MARK}", "<"), _replace(" ", SPACE)],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[UNKNOWN],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": _merges(learned),
        },
    }
    roles = {"bos_token": BEGIN, "eos_token": END, "pad_token": PADDING, "unk_token": UNKNOWN}
    return content, {role: names[number] for role, number in roles.items()}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _merges(learned: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that become one, the likeliest piece first, which is SentencePiece's order.

    A piece that can be made of several pairs has all of them, one after the other.
    """
    return [
        (piece[:at], piece[at:])
        for piece in sorted(learned, key=lambda piece: -learned[piece])
        for at in range(1, len(piece))
        if piece[:at] in learned and piece[at:] in learned
    ]


def _require_ours(model: Any, path: Path) -> None:
    """Raise TokenizerError unless the model computes what is written of it."""
    trained, normal = model.trainer_spec, model.normalizer_spec
    kinds = type(model.pieces[0])
    known = (kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE)
    learned = {piece.piece for piece in model.pieces if piece.type == kinds.NORMAL}
    rules = {
        "BPE": trained.model_type == trained.BPE,
        "byte_fallback": trained.byte_fallback,
        "normalization_rule_name=identity": not normal.precompiled_charsmap,
        "no add_dummy_prefix": not normal.add_dummy_prefix,
        "no remove_extra_whitespaces": not normal.remove_extra_whitespaces,
        "escape_whitespaces": normal.escape_whitespaces,
        "no treat_whitespace_as_suffix": not trained.treat_whitespace_as_suffix,
        "no user_defined_symbols": all(piece.type in known for piece in model.pieces),
        # Chat texts are marked there.
        "a < in every control symbol": all(
            "<" in piece.piece for piece in model.pieces if piece.type == kinds.CONTROL
        ),
        "a piece for every character in pieces": all(
            character in learned for piece in learned for character in piece
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise TokenizerError(
            f"tokenizer {path} cannot be written for transformers: it must have "
            f"{', '.join(broken)}, as `megavlm tokenizer train` makes them; write weights alone "
            "with --no-tokenizer"
        )
