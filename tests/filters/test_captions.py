import pytest

from megavlm.config.filters import CaptionRules
from megavlm.errors import ConfigError
from megavlm.filters.captions import (
    check_languages,
    longest_run,
    share_of_letters,
    share_of_repeated_words,
    unfit,
    words_of,
)


@pytest.mark.parametrize(
    "caption",
    [
        "see https://example.org/a",
        "www.shop.example",
        "cheap shoes at shoes-shop.com",
        "IMG_2034",
        "DSC 00012",
        "dscn1234",
        "photo-12.jpeg",
        "3f2a9c0d11e5b7a8c6d4",
        "Image of",
        "a photo of",
        "Untitled",
        "stock photo",
        "image 3",
        "No image available",
        "this picture is not available",
        "Click to enlarge",
        "lorem ipsum dolor",
        "<b>Sale</b>",
        "{{ product.name }}",
        "salt &amp; pepper",
    ],
)
def test_boilerplate(caption):
    assert unfit([caption], CaptionRules(boilerplate=True)) == ["caption_boilerplate"]
    assert unfit([caption], CaptionRules()) == [None]


@pytest.mark.parametrize(
    "caption",
    [
        "image of a red car",
        "a photo of two dogs",
        "picture frames on a wall",
        "the logo of a bank above a door",
        "a banner hangs across the street",
        "write to ann@example.com",
        "5 < 7 and 8 > 3",
        "a decade of photographs",
        "an icon of Saint Nicholas",
        "coffee, 3 cups",
        "the facade",
    ],
)
def test_what_is_no_boilerplate(caption):
    assert unfit([caption], CaptionRules(boilerplate=True)) == [None]


def test_lengths():
    rules = CaptionRules(minimum_characters=3, maximum_characters=6, minimum_words=2)
    captions = ["a b", "ab", "  a b  ", "abcdef", "a bcdef"]
    kept = [None, "caption_length", None, "caption_length", "caption_length"]
    assert unfit(captions, rules) == kept


def test_letters_of_any_script():
    assert share_of_letters("赤い車") == share_of_letters("हिन्दी में") == 1
    assert share_of_letters("ab 12") == 0.5
    assert share_of_letters("") == 0
    assert unfit(["50% 24/7 a"], CaptionRules(minimum_letters=0.5)) == ["caption_letters"]


def test_repetition():
    assert share_of_repeated_words("Sale sale SALE sale") == 0  # of few words
    assert share_of_repeated_words("sale Sale SALE sale sale") == 0.8
    assert longest_run("coool!!!!") == 4
    assert longest_run("") == 0
    rules = CaptionRules(maximum_repeated_words=0.5, maximum_repeated_characters=4)
    assert unfit(["so so so so so", "wowwwww", "a cat and a dog"], rules) == [
        "caption_repetition",
        "caption_repetition",
        None,
    ]


def test_words_do_not_depend_on_spelling():
    assert words_of("\uff26ull Straße, CAFE\u0301") == words_of("full strasse café")


@pytest.mark.slow  # lingua reads its models
def test_languages_of_short_captions():
    captions = {
        "two dogs play in the snow": "en",
        "a red car": "en",
        "Sunset over the lake": "en",
        "red apple": "en",
        "zwei Hunde spielen im Schnee": "de",
        "une voiture rouge garée dans la rue": "fr",
        "красная машина": "ru",
        "赤い車": "ja",
    }
    wrong = unfit([*captions], CaptionRules(languages=("en",)))
    assert wrong == [None if code == "en" else "caption_language" for code in captions.values()]
    wrong = unfit([*captions], CaptionRules(languages=("en", "de", "ja", "ru", "fr")))
    assert wrong == [None] * len(captions)


def test_an_unknown_language():
    with pytest.raises(ConfigError, match="names xx, which lingua does not know"):
        check_languages(["en", "xx"])
