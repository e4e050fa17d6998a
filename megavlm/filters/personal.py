"""E-mail addresses, phone numbers, IP addresses and numbers of credit cards in texts.

They are found by Microsoft Presidio's recognisers of patterns, which check what can be checked:
domains, telephone plans, Luhn's digit. Names and addresses of people are not looked for.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from megavlm.config.filters import PersonalDataRules, PersonalKind
from megavlm.errors import ConfigError


class Found(NamedTuple):
    """One piece of personal data in a text, from character `start` to before `stop`."""

    start: int
    stop: int
    kind: str


def find(text: str, rules: PersonalDataRules) -> list[Found]:
    """What there is, in order; of what overlaps, the longest."""
    everything: list[Found] = []
    for kind in rules.kinds:
        if not _may_have(kind, text):
            continue
        recogniser = _recognisers(rules.phone_regions)[kind]
        for result in recogniser.analyze(text, recogniser.supported_entities, None):
            everything.append(Found(result.start, result.end, kind))
    everything.sort(key=lambda found: (found.start - found.stop, found))
    chosen: list[Found] = []
    for found in everything:
        if all(found.stop <= other.start or other.stop <= found.start for other in chosen):
            chosen.append(found)
    return sorted(chosen)


def _may_have(kind: PersonalKind, text: str) -> bool:
    """Whether it is worth asking the recognisers, which are slow."""
    digits = sum(c.isdigit() for c in text)
    match kind:
        case "email":
            return "@" in text
        case "phone":
            return digits >= 7
        case "ip":
            return digits >= 1 and ("." in text or ":" in text)
        case "credit_card":
            return digits >= 12


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
