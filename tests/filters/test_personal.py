import socket

import pytest

from megavlm.config.filters import PersonalDataRules
from megavlm.errors import ConfigError
from megavlm.filters.personal import check_regions, find, mask

ALL = PersonalDataRules()


@pytest.mark.slow  # Presidio takes seconds to import
def test_personal_data_is_masked(monkeypatch):
    # Nothing is looked up: the list of domains is the one that comes with the package.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("no network"))
    cases = {
        "write to jane.doe@example.com now": "write to <EMAIL> now",
        "call +44 20 7946 0958 or (212) 555-0187": "call <PHONE> or <PHONE>",
        "server 192.168.10.4 is down": "server <IP> is down",
        "card 4111 1111 1111 1111": "card <CREDIT_CARD>",
        "card 4111 1111 1111 1112": "card 4111 1111 1111 1112",  # Luhn's digit is wrong
        "me@nowhere.notadomain": "me@nowhere.notadomain",
        "two dogs in 2019 at 10:45:30": "two dogs in 2019 at 10:45:30",
        "500 x 400 pixels, 1 200 000 copies": "500 x 400 pixels, 1 200 000 copies",
        "std::vector": "std::vector",
        "a@example.com and b@example.com": "<EMAIL> and <EMAIL>",
        "": "",
    }
    assert {text: mask(text, ALL) for text in cases} == cases


@pytest.mark.slow
def test_only_what_is_asked_for_is_found():
    text = "jane@example.com, +44 20 7946 0958"
    [found] = find(text, PersonalDataRules(kinds=("phone",)))
    assert (found.kind, text[found.start : found.stop]) == ("phone", "+44 20 7946 0958")
    national = "call 030 12345678 today"
    assert not find(national, PersonalDataRules(phone_regions=("US",)))
    assert find(national, PersonalDataRules(phone_regions=("DE",)))


def test_an_unknown_region():
    with pytest.raises(ConfigError, match=r"names UK, .* write GB"):
        check_regions(["DE", "UK"])
