import json

import pytest

from megavlm.config.filters import AgreementRules, ClassifierRules, FilterSettings
from megavlm.data.samples import Sample, text
from megavlm.errors import ConfigError
from megavlm.filters.judge import judge
from megavlm.filters.models import agreement, check_checkpoints, probabilities
from tests.filters.planted import encoded


def judged(samples, rules):
    contents = [(n, b"") for n in range(len(samples))]
    return judge(contents, lambda n, _: samples[n], rules, None)


def sample(colour: str, *captions: str) -> Sample:
    from tests.filters.checkpoints import coloured

    texts = tuple(text("", caption, "caption") for caption in captions)
    return Sample(key=colour, pictures=(encoded(coloured(colour), "PNG"),), texts=texts)


@pytest.mark.slow  # transformers takes seconds to import
def test_wrong_captions_go(tmp_path):
    from tests.filters.checkpoints import COLOURS, coloured, save_clip

    save_clip(tmp_path)
    scores = {
        (colour, word): agreement(tmp_path, "cpu", [coloured(colour)], [f"a {word} square"])[0]
        for colour in COLOURS
        for word in COLOURS
    }
    right = [score for (colour, word), score in scores.items() if colour == word]
    wrong = [score for (colour, word), score in scores.items() if colour != word]
    minimum = (min(right) + max(wrong)) / 2
    assert min(right) - max(wrong) > 0.1
    rules = FilterSettings(agreement=AgreementRules(checkpoint=tmp_path, minimum=minimum))
    check_checkpoints(rules)
    samples = [
        sample("red", "a red square"),
        sample("blue", "a red square"),
        sample("green", "a white square", "a green square"),
        Sample(key="t", pictures=(), texts=(text("", "a red square", "caption", pictures=()),)),
        sample("black", *["a black square " * 40]),  # longer than the model reads
    ]
    verdicts = judged(samples, rules)
    assert [v.reason for v in verdicts[:4]] == [None, "agreement", None, None]
    assert [t.answer for t in verdicts[2].sample.texts] == ["a green square"]
    # A score does not depend on what else is in the batch, but for rounding.
    alone = agreement(tmp_path, "cpu", [coloured("red")], ["a red square"])
    both = agreement(tmp_path, "cpu", [coloured("red")] * 2, ["a red square", "of"])
    assert both[0] == pytest.approx(alone[0], abs=1e-5)


@pytest.mark.slow
def test_classifiers(tmp_path):
    from tests.filters.checkpoints import save_classifiers

    save_classifiers(tmp_path, (0.3, 0.7))

    def rules(of, maximum, label="unsafe"):
        rule = ClassifierRules(
            name="nsfw", checkpoint=tmp_path / of, of=of, label=label, maximum=maximum
        )
        return FilterSettings(classifiers=(rule,))

    samples = [sample("red", "a red square", "of"), sample("blue", "a blue square " * 40)]
    for of in ("pictures", "texts"):
        check_checkpoints(rules(of, 0.5))
        assert [v.reason for v in judged(samples, rules(of, 0.69))] == ["nsfw", "nsfw"]
        assert [v.reason for v in judged(samples, rules(of, 0.71))] == [None, None]
        assert [v.reason for v in judged(samples, rules(of, 0.29, "safe"))] == ["nsfw", "nsfw"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_texts_are_cut_to_what_the_model_reads_if_its_tokenizer_does_not_say(tmp_path, family):
    from tests.filters.checkpoints import save_classifiers

    save_classifiers(tmp_path, (0.3, 0.7), family=family, tokenizer_limit=None)
    settings = json.loads((tmp_path / "texts/tokenizer_config.json").read_text())
    assert settings.get("model_max_length", 10**9) > 10**6
    texts = ["a blue square " * 40, "of"]
    found = probabilities(tmp_path / "texts", "cpu", "texts", "unsafe", texts)
    assert found == pytest.approx([0.7, 0.7])


def test_a_folder_that_is_no_checkpoint(tmp_path):
    rules = FilterSettings(agreement=AgreementRules(checkpoint=tmp_path, minimum=0))
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"needs a config\.json and weights in safetensors"):
        check_checkpoints(rules)


def test_a_label_that_is_not_there(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "sfw", "1": "nsfw"}}))
    rule = ClassifierRules(name="x", checkpoint=tmp_path, of="texts", label="porn", maximum=0.5)
    with pytest.raises(ConfigError, match=r"no label 'porn'; its labels are \['sfw', 'nsfw'\]"):
        check_checkpoints(FilterSettings(classifiers=(rule,)))
