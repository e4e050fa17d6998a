"""E-mail addresses, phone numbers, IP addresses and numbers of credit cards in texts.

They are found by Microsoft Presidio's recognisers of patterns, which check what can be checked:
domains, telephone plans, Luhn's digit. Names and addresses of people are not looked for.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from megavlm.config.filters import PersonalDataRules
from megavlm.errors import ConfigError

_FEWEST_DIGITS = {"email": 0, "phone": 7, "ip": 1, "credit_card": 12}
"""A text with fewer has none of a kind; the recognisers are slow."""


class Found(NamedTuple):
    """One piece of personal data in a text, from character `start` to before `stop`."""

    start: int
    stop: int
    kind: str


def find(text: str, rules: PersonalDataRules) -> list[Found]:
    """What there is, in order; of what overlaps, the longest."""
    digits = sum(c.isdigit() for c in text)
    everything: list[Found] = []
    for kind, recogniser in _recognisers(rules.phone_regions).items():
        if kind not in rules.kinds or digits < _FEWEST_DIGITS[kind]:
            continue
        if kind == "email" and "@" not in text:
            continue
        for result in recogniser.analyze(text, recogniser.supported_entities, None):
            everything.append(Found(result.start, result.end, kind))
    everything.sort(key=lambda found: (found.start - found.stop, found))
    chosen: list[Found] = []
    for found in everything:
        if all(found.stop <= other.start or other.stop <= found.start for other in chosen):
            chosen.append(found)
    return sorted(chosen)


def mask(text: str, rules: PersonalDataRules) -> str:
    """The text with a mark such as `<EMAIL>` in place of each piece."""
    for found in reversed(find(text, rules)):
        text = f"{text[: found.start]}<{found.kind.upper()}>{text[found.stop :]}"
    return text


@cache
def _recognisers(phone_regions: tuple[str, ...]) -> dict[str, Any]:
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        EmailRecognizer,
        IpRecognizer,
        PhoneRecognizer,
    )
    from tldextract import TLDExtract

    domains = TLDExtract(suffix_list_urls=())  # the list that it brings; it would download one

    class OfflineEmailRecognizer(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(domains(pattern_text).fqdn)

    return {
        "email": OfflineEmailRecognizer(),
        "phone": PhoneRecognizer(supported_regions=phone_regions),
        "ip": IpRecognizer(),
        "credit_card": CreditCardRecognizer(),
    }


def check_regions(codes: Iterable[str]) -> None:
    """Raise ConfigError for a region without a known telephone plan."""
    import phonenumbers

    known: Sequence[str] = sorted(phonenumbers.SUPPORTED_REGIONS)
    if unknown := sorted(set(codes) - set(known)):
        raise ConfigError(
            f"personal_data: phone_regions names {unknown[0]}, which is no ISO 3166 code of a "
            "region with a telephone plan; write GB for Great Britain, say"
        )
