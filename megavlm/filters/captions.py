"""What captions must be like (C4, Raffel et al. 2020; Gopher, Rae et al. 2021)."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from megavlm.config.filters import CaptionRules
from megavlm.errors import ConfigError

if TYPE_CHECKING:
    from lingua import LanguageDetector

REPETITION_WORDS = 5
"""Shorter captions may repeat themselves."""
_WORD = re.compile(r"\w+")
_BOILERPLATE = re.compile(
    r"""
    https?://|\bwww\.                                               # addresses of web pages
    | (?<!@)\b[\w-]+\.(com|net|org)\b
    | [{}]|</?[a-z][^<>]*>|&(amp|nbsp|quot|lt|gt);|\bjavascript\b   # code
    | \.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic)\b                   # file names
    | ^(img|dsc[fn]?|pict?|photo|image|screenshot|screen\ shot)[\s_-]*\d[\d\s_-]*$
    | ^[0-9a-f]{16,}$
    | \blorem\ ipsum\b                                              # placeholders
    | \b(image|photo|picture)\ (is\ )?(not\ (found|available)|unavailable|coming\ soon|missing)\b
    | \bno\ (image|photo|picture)(\ available)?$
    | \bclick\ (here|to\ (enlarge|zoom|view))\b
    | ^((an?|the)\ )?(stock\ )?(image|photo|picture|photograph|thumbnail|logo|icon|banner|untitled
      |placeholder|default)s?(\ (image|photo|picture))?(\ of)?[\s.:\d]*$   # empty phrases
    """,
    re.VERBOSE | re.IGNORECASE,
)


def unfit(captions: Sequence[str], rules: CaptionRules) -> list[str | None]:
    """Of each caption, the first rule that it breaks, or None."""
    reasons = [_unfit(caption.strip(), rules) for caption in captions]
    if rules.languages:
        fit = [n for n, reason in enumerate(reasons) if reason is None]
        for n in wrong_languages([captions[n] for n in fit], rules):
            reasons[fit[n]] = "caption_language"
    return reasons


def _unfit(caption: str, rules: CaptionRules) -> str | None:
    if not rules.minimum_characters <= len(caption) <= (rules.maximum_characters or len(caption)):
        return "caption_length"
    if len(caption.split()) < rules.minimum_words:
        return "caption_length"
    if rules.boilerplate and _BOILERPLATE.search(caption):
        return "caption_boilerplate"
    if rules.minimum_letters is not None and share_of_letters(caption) < rules.minimum_letters:
        return "caption_letters"
    if rules.maximum_repeated_words is not None:
        if share_of_repeated_words(caption) > rules.maximum_repeated_words:
            return "caption_repetition"
    if rules.maximum_repeated_characters is not None:
        if longest_run(caption) > rules.maximum_repeated_characters:
            return "caption_repetition"
    return None


def share_of_letters(caption: str) -> float:
    """Of its characters that are no spaces; marks of combining scripts are letters."""
    characters = [c for c in caption if not c.isspace()]
    letters = sum(unicodedata.category(c)[0] in "LM" for c in characters)
    return letters / max(1, len(characters))


def share_of_repeated_words(caption: str) -> float:
    """Share of its words that were there before; 0 of a caption of few words."""
    words = words_of(caption)
    return 1 - len(set(words)) / len(words) if len(words) >= REPETITION_WORDS else 0.0


def longest_run(caption: str) -> int:
    """How often the same character stands in a row, at most."""
    runs = re.finditer(r"(.)\1*", caption, re.DOTALL)
    return max((match.end() - match.start() for match in runs), default=0)


def words_of(text: str) -> list[str]:
    """Words alike in all spellings of their characters and in any case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def wrong_languages(captions: Sequence[str], rules: CaptionRules) -> list[int]:
    """Which captions are in other languages than those named, as far as that is clear."""
    detector, allowed = _detector(), {code.upper() for code in rules.languages}
    wrong: list[int] = []
    for n, caption in enumerate(captions):
        by_code = {
            entry.language.iso_code_639_1.name: entry.value
            for entry in detector.compute_language_confidence_values(caption)
        }
        best = max(value for code, value in by_code.items() if code in allowed)
        other = max((v for code, v in by_code.items() if code not in allowed), default=0.0)
        if other - best > rules.language_lead:
            wrong.append(n)
    return wrong


@cache
def _detector() -> "LanguageDetector":
    """Of all languages that lingua knows; takes 1.1 GB once it has been used."""
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().build()


def check_languages(codes: Iterable[str]) -> None:
    """Raise ConfigError for a language that cannot be told."""
    from lingua import Language

    known = {language.iso_code_639_1.name.lower() for language in Language.all()}
    if unknown := sorted(set(codes) - known):
        raise ConfigError(
            f"captions: languages names {unknown[0]}, which lingua does not know; its ISO 639-1 "
            f"codes are {', '.join(sorted(known))}"
        )
