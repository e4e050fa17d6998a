import re
from pathlib import Path

import pytest

from megavlm.config.filters import REASONS, FilterSettings, load_rules, rules_as_tree
from megavlm.errors import ConfigError


def test_no_rules_filter_nothing_but_what_cannot_be_used(tmp_path):
    (tmp_path / "rules.yaml").write_text("{}")
    rules = load_rules(tmp_path / "rules.yaml")
    assert rules == FilterSettings()
    assert rules.duplicates is None and rules.checkpoints == ()


def test_rules_come_back_from_plain_data(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(
        "captions: {languages: [en], minimum_letters: 0.5}\n"
        "evaluation: {folders: [a, s3://b/c]}\n"
        "classifiers: [{name: nsfw, checkpoint: m, of: texts, label: x, maximum: 0.5}]\n"
        "agreement: {checkpoint: n, minimum: 0.2}\n"
        "duplicates: {picture_bits: null, caption_similarity: 0.9}\n"
    )
    rules = load_rules(path)
    assert [str(folder) for folder in rules.checkpoints] == ["m", "n"]
    tree = rules_as_tree(rules)
    assert tree["evaluation"] == {"folders": ["a", "s3://b/c"], "picture_bits": 31, "words": 8}
    assert hash(rules) == hash(load_rules(path))  # workers keep what they load by it


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("captions: {minimum_leters: 1}", "captions.minimum_leters .*did you mean minimum_letters"),
        ("classifiers: [{lable: x}]", r"classifiers\.0\.\w+ is missing|did you mean label"),
        ("duplicate: {}", "did you mean duplicates"),
        ("personal_data:", "personal_data is empty; write `personal_data: {}` for its defaults"),
        ("captions: {minimum_letters: 50}", "minimum_letters=50.0 must be in 0 to 1"),
        (
            "captions: {minimum_characters: 9, maximum_characters: 8}",
            "maximum_characters=8 must be at least 9",
        ),
        ("captions: {minimum_letters: .nan}", "minimum_letters=nan must be in 0 to 1"),
        ("pictures: {maximum_pixels: 65000000}", "maximum_pixels=65000000 must be in 1 to"),
        ("pictures: {minimum_side: 0}", "minimum_side=0 must be at least 1"),
        ("duplicates: {picture_bits: null}", "duplicates compares nothing"),
        ("evaluation: {folders: []}", "names no folder"),
        ("personal_data: {kinds: []}", "names nothing"),
        ("personal_data: {kinds: [name]}", r"personal_data\.kinds\.0='name'"),
        ("gpus_per_worker: -1", "gpus_per_worker=-1.0 must be at least 0"),
        (
            "classifiers: [{name: a b, checkpoint: m, of: texts, label: x, maximum: 0.5}]",
            "name='a b' must be of letters",
        ),
        (
            "classifiers: [{name: kept, checkpoint: m, of: texts, label: x, maximum: 0.5}]",
            "name='kept' is what the report calls something else; name it otherwise, kept_by_model",
        ),
        (
            "captions: {languages: en}",
            r"captions\.languages='en' must be a list, each entry a string; "
            r"write `languages: \[en\]`",
        ),
        (
            "captions: {languages: [no]}",
            r"captions\.languages\.0=false must be a string; YAML reads no, "
            r"off, yes and on as false and true: put it in quotes, as in 'no'",
        ),
        (
            "faces: true",
            r"faces=true must be a section of settings \(minimum_share, neighbours\); "
            r"write `faces: \{\}` for its defaults, or leave it out",
        ),
        ("agreement: 1", r"write `agreement: \{checkpoint: ..., minimum: ...\}`, or leave it out"),
        ("classifiers: {name: x}", r"label, maximum\); put it in \[ \]"),
        ("captions: {boilerplate: 7}", r"captions\.boilerplate=7 must be true or false"),
        ("duplicates: {picture_bits: none}", r"='none' must be a whole number or null$"),
        ("duplicates: {picture_bits: no}", r"=false must be a whole number or null; YAML reads no"),
        ("agreement: {checkpoint: x, minimum: .nan}", r"agreement\.minimum=nan must be in -1 to 1"),
        ("1: 2", "1 is not a known setting; known: caption_tasks"),
        ("minimum_letters: 1", "minimum_letters belongs to captions"),
        ("captions: [", r"not valid YAML: .* in \".*rules.yaml\", line 1"),
        ("captions: {a: 1, a: 2}", "a stands there twice"),
        ("[]", "must hold a mapping"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, text, says):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as told:
        load_rules(path)
    assert "\n" not in str(told.value) and str(path) in str(told.value)


def test_every_reason_that_users_read_about_is_taken():
    page = (Path(__file__).parents[2] / "docs/filtering.md").read_text()
    table = page.partition("| reason |")[2].partition("\n\n")[0]
    named = {
        name for row in table.splitlines() for name in re.findall("`(.*?)`", row.split(" | ")[0])
    }
    assert REASONS == named - {"classifiers"} | {"kept"}


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read rules .*none\.yaml"):
        load_rules(tmp_path / "none.yaml")
