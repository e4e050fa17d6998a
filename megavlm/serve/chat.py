"""Chat requests in OpenAI's form, and what the engine makes of them.

Only what the model can do is taken: a field that would change the answer, and cannot, is refused.
"""

import base64
import binascii
import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, cast

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from megavlm.data.image import FORMATS, read_square
from megavlm.data.samples import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import BadSampleError, RequestError
from megavlm.infer.prompts import Request, prompt_of
from megavlm.infer.sampling import Sampling
from megavlm.serve.limits import MIB, ServeLimits
from megavlm.serve.refusals import Refusal

MOST_MESSAGES = 256
MOST_PARTS = 64
"""Of a message."""
MOST_STOPS, STOP_CHARACTERS = 4, 256
MOST_COMMAS = 100_000
"""Of a body: so few values cannot fill the memory once they are parsed. Base64 has none."""
MOST_FIELDS = 64
"""Of an object."""
QUOTED_CHARACTERS = 200
"""Of a client's own words in a message."""
PICTURE_KINDS = tuple(f"data:image/{kind};" for kind in ("png", "jpeg", "jpg", "webp"))

# Fields of OpenAI's that are taken where they ask for what is done anyway.
NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
}
# And those that never change an answer.
WITHOUT_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}


class _Form(BaseModel):
    """Strict, and null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast(dict[str, Any], given)
        if len(fields) > MOST_FIELDS:
            raise ValueError(f"more than {MOST_FIELDS} fields")
        return {name: value for name, value in fields.items() if value is not None}


class TextPart(_Form):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Form):
    """A picture in a data: URL."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Has no effect: the model sees all pictures alike."""


class ImagePart(_Form):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Tokens = Annotated[int, Field(ge=1, lt=2**31)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Form):
    """One of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=MOST_PARTS), BeforeValidator(_as_parts)]

    @property
    def text(self) -> str:
        """Its texts, one a line."""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))


class StreamOptions(_Form):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Has no effect."""


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Chat(_Form):
    """The body of a request."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    """Not OpenAI's."""
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]],
        Field(max_length=MOST_STOPS),
        BeforeValidator(_as_list),
    ] = []

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast(dict[str, Any], given)
        for name, neutral in NEUTRAL.items():
            if fields.get(name) not in (None, neutral):
                raise Refusal(
                    400,
                    f"{name} is not supported but as {neutral!r}; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        ignored = NEUTRAL.keys() | WITHOUT_EFFECT
        return {name: value for name, value in fields.items() if name not in ignored}


class Shown(NamedTuple):
    """A picture of a chat, not decoded yet."""

    place: str
    """As in `messages[0].content[1]`."""
    url: str


@dataclass(frozen=True)
class Asked:
    """A chat."""

    request: Request
    """Ready for the engine, but for the pixels of these pictures."""
    pictures: tuple[Shown, ...]
    is_streamed: bool
    with_usage: bool
    """In a stream."""


@dataclass(frozen=True)
class Reader:
    """Reads chats for one model. Thread-safe."""

    tokenizer: Tokenizer
    image_pixels: int
    model_name: str
    limits: ServeLimits

    def read(self, body: bytes | bytearray) -> Asked:
        """All but decode its pictures; raises Refusal."""
        chat = _parsed(body)
        if chat.model != self.model_name:
            raise no_model(chat.model, self.model_name)
        turns, pictures = self._turns(chat.messages)
        try:
            prompt = prompt_of(self.tokenizer, turns)
            sampling = Sampling(
                temperature=chat.temperature,
                top_k=chat.top_k,
                top_p=chat.top_p,
                seed=secrets.randbits(63) if chat.seed is None else chat.seed,
            )
        except (RequestError, BadSampleError) as error:
            raise Refusal(400, _quoted(str(error))) from None
        request = Request(
            prompt=prompt,
            pixels=(),
            max_new_tokens=self._answer_tokens(chat, len(prompt.tokens)),
            sampling=sampling,
            stop=tuple(chat.stop),
        )
        return Asked(request, pictures, chat.stream, chat.stream_options.include_usage)

    def _answer_tokens(self, chat: Chat, prompt_tokens: int) -> int:
        room = self.limits.tokens - prompt_tokens
        asked = [n for n in (chat.max_completion_tokens, chat.max_tokens) if n is not None]
        wanted = min(asked, default=max(1, min(self.limits.answer_tokens, room)))
        if wanted > room:
            raise Refusal(
                400,
                f"the prompt's {prompt_tokens} tokens and {wanted} of the answer exceed the limit "
                f"of {self.limits.tokens}; ask for less",
                param="messages",
                code="context_length_exceeded",
            )
        return wanted

    def _turns(self, messages: Sequence[Message]) -> tuple[list[Turn], tuple[Shown, ...]]:
        """Turns of a user and an assistant, and the pictures that they show."""
        characters = sum(len(message.text) for message in messages)
        if characters > self.limits.tokens * self._longest_piece:
            raise Refusal(
                400,
                f"the messages' {characters:,} characters exceed the limit of "
                f"{self.limits.tokens} tokens; ask for less",
                param="messages",
                code="context_length_exceeded",
            )
        first = next((n for n, m in enumerate(messages) if m.role in ("user", "assistant")), None)
        if first is None:
            raise Refusal(400, "messages must end with one of the user", param="messages")
        instructions = [message.text for message in messages[:first]]
        turns: list[Turn] = []
        pictures: list[Shown] = []
        for number, message in enumerate(messages):
            place = f"messages[{number}]"
            shown = [
                Shown(f"{place}.content[{at}]", part.image_url.url)
                for at, part in enumerate(message.content)
                if isinstance(part, ImagePart)
            ]
            if shown and message.role != "user":
                raise Refusal(
                    400, f"{shown[0].place} is a picture; only users show any", param=place
                )
            if number < first:
                continue
            wanted = "assistant" if (number - first) % 2 else "user"
            if message.role != wanted:
                raise Refusal(
                    400,
                    f"{place} has the role {message.role} where {wanted} is due: users and "
                    "assistants take turns, after any system messages",
                    param=place,
                )
            if wanted == "assistant":
                turns[-1] = Turn(
                    prompt=turns[-1].prompt, answer=message.text, pictures=turns[-1].pictures
                )
                continue
            text = "\n\n".join([*([] if turns else instructions), message.text])
            numbers = tuple(range(len(pictures), len(pictures) + len(shown)))
            turns.append(Turn(prompt=text, answer="", pictures=numbers))
            pictures += shown
        if messages[-1].role != "user":
            raise Refusal(400, "messages must end with one of the user", param="messages")
        if len(pictures) > self.limits.pictures:
            raise Refusal(
                400,
                f"{len(pictures)} pictures exceed the limit of {self.limits.pictures}; show fewer",
                param="messages",
                code="too_many_images",
            )
        return turns, tuple(pictures)

    def decode(self, picture: Shown) -> Tensor:
        """uint8 (3, side, side), within the limits; raises Refusal."""
        place, url = picture
        if not url[:20].lower().startswith(PICTURE_KINDS):
            raise Refusal(
                400,
                f"{place} must hold its picture itself, as data:image/png;base64,... (or jpeg, or "
                "webp); this server fetches nothing",
                param=place,
                code="invalid_image_url",
            )
        header, _, content = url.partition(",")
        if len(content) * 3 // 4 > self.limits.picture_mib * MIB + 3:
            raise _too_large(place, f"{self.limits.picture_mib} MiB")
        try:
            if not header.lower().endswith(";base64"):
                raise binascii.Error
            encoded = base64.b64decode(content, validate=True)
            is_too_large = _pixels(encoded) > self.limits.picture_megapixels * 10**6
            pixels = None if is_too_large else read_square(encoded, place, self.image_pixels)
        # Pillow raises whatever it stumbles over in a broken file; its words name its own objects.
        except Exception:
            raise Refusal(
                400,
                f"the picture of {place} cannot be used: it must be a whole PNG, JPEG or WebP file "
                "in base64",
                param=place,
                code="invalid_image",
            ) from None
        if pixels is None:
            raise _too_large(place, f"{self.limits.picture_megapixels} megapixels")
        return pixels

    @cached_property
    def _longest_piece(self) -> int:
        """Characters; no token stands for more."""
        return max(len(piece.text) for piece in self.tokenizer.pieces())


def _pixels(encoded: bytes) -> int:
    """Of a picture, by its header."""
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        return image.width * image.height


def no_model(asked: str, name: str) -> Refusal:
    """For one who asks another model than the one with this name."""
    says = f"there is no model {_quoted(asked)}; this server has {name}"
    return Refusal(404, says, param="model", code="model_not_found")


def _too_large(place: str, limit: str) -> Refusal:
    says = f"the picture of {place} exceeds the limit of {limit}; shrink it"
    return Refusal(400, says, param=place, code="image_too_large")


def _parsed(body: bytes | bytearray) -> Chat:
    if body.count(b",") > MOST_COMMAS:
        raise Refusal(400, f"the body has more than {MOST_COMMAS:,} commas", code="invalid_json")
    try:
        return Chat.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Refusal(400, "the body is not valid JSON", code="invalid_json") from None
        place = _place(first["loc"])
        where = f"{place}: " if place else ""
        raise Refusal(400, f"{where}{_quoted(first['msg'])}", param=place or None) from None


def _place(location: Sequence[int | str]) -> str:
    """As in `messages[0].content[1].text`."""
    names = [f"[{at}]" if isinstance(at, int) else f".{_quoted(at)}" for at in location]
    # What tells kinds of parts apart is no name of a field.
    names = [n for n, before in zip(names, ["", *names], strict=False) if not _is_kind(n, before)]
    return "".join(names).removeprefix(".")


def _is_kind(name: str, before: str) -> bool:
    return name in (".text", ".image_url") and before.startswith("[")


def _quoted(name: str) -> str:
    return name if len(name) <= QUOTED_CHARACTERS else f"{name[:QUOTED_CHARACTERS]}..."
