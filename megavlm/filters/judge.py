"""All rules on a batch of samples, the cheap ones first; what goes by one is not seen by the next.

Rules about pictures judge samples, rules about texts judge texts: a text that breaks one is taken
out, and a sample without any text left goes for the reason of its last.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO

from megavlm.config.filters import ClassifierRules, FilterSettings
from megavlm.data.headers import members_of, open_tar
from megavlm.data.samples import Sample, Text
from megavlm.errors import BadSampleError
from megavlm.filters import models, towers
from megavlm.filters.captions import unfit
from megavlm.filters.evaluation import EvaluationSet
from megavlm.filters.personal import find, mask
from megavlm.filters.pictures import Picture, hash_picture, open_picture, shows_face


@dataclass(kw_only=True)
class Verdict:
    """What the rules say of one sample."""

    number: int
    """In its data folder."""
    reason: str | None = None
    """Why it goes; None: it stays."""
    detail: str = ""
    sample: Sample | None = None
    """With the texts that are left; None if it could not be read."""
    pictures: tuple[Picture, ...] = ()
    removed_texts: Counter[str] = field(default_factory=Counter[str])
    masked_texts: int = 0
    picture_hash: bytes | None = None
    """Of the only picture."""

    @property
    def is_changed(self) -> bool:
        """Whether it has other texts than before."""
        return bool(self.removed_texts or self.masked_texts)


def judge(
    contents: Sequence[tuple[int, bytes]],
    parse: Callable[[int, bytes], Sample],
    rules: FilterSettings,
    evaluation: EvaluationSet | None,
) -> list[Verdict]:
    """What all rules but those about duplicates say of samples; contents: with their numbers.

    evaluation: what may not be there; None if the rules name no folder.
    """
    verdicts = [_read(number, content, parse) for number, content in contents]
    _judge_texts(verdicts, rules, evaluation)
    for verdict, sample in _left(verdicts):
        _open_pictures(verdict, sample, rules)
    hashes: list[tuple[Verdict, bytes]] = []
    compared = rules.duplicates and rules.duplicates.picture_bits is not None
    if compared or rules.evaluation:
        hashes = [(v, hash_picture(p)) for v, _ in _left(verdicts) for p in v.pictures]
    for verdict, picture_hash in hashes:
        verdict.picture_hash = picture_hash if len(verdict.pictures) == 1 else None
    if rules.evaluation and evaluation:
        held = evaluation.holds_pictures([h for _, h in hashes], rules.evaluation.picture_bits)
        for (verdict, _), is_held in zip(hashes, held, strict=True):
            if is_held:
                verdict.reason = "evaluation_picture"
    if rules.faces:
        for verdict, _ in _left(verdicts):
            if any(shows_face(picture, rules.faces) for picture in verdict.pictures):
                verdict.reason = "face"
    _judge_by_models(verdicts, rules)
    for verdict in verdicts:
        verdict.pictures = ()
    return verdicts


def _left(verdicts: Sequence[Verdict]) -> Iterator[tuple[Verdict, Sample]]:
    """Those that no rule has dropped so far."""
    return ((v, v.sample) for v in verdicts if v.reason is None and v.sample is not None)


def _read(number: int, content: bytes, parse: Callable[[int, bytes], Sample]) -> Verdict:
    try:
        sample = parse(number, content)
    except BadSampleError as error:
        return Verdict(number=number, reason="unreadable", detail=str(error))
    if names := unsafe_names(content):
        detail = f"member {names[0]!r}"
        return Verdict(number=number, reason="unsafe_name", detail=detail, sample=sample)
    return Verdict(number=number, sample=sample)


def unsafe_names(content: bytes) -> list[str]:
    """Names of a sample's members that lie outside of the folder in which they would be unpacked.

    content: the part of a tar that holds the sample. Nothing here uses names as paths; who makes
    such a tar may have made other things in it, too.
    """
    end_of_tar = bytes(-len(content) % 512 + 1024)
    names: list[str] = []
    with (
        suppress(tarfile.TarError),
        open_tar(BytesIO(content + end_of_tar)) as tar,
    ):
        names.extend(member.name for member in members_of(tar))
    parts_of = ((name, name.replace("\\", "/").split("/")) for name in names)
    return [name for name, parts in parts_of if ".." in parts or (len(parts) > 1 and not parts[0])]


TextRule = Callable[[Sequence[Text], Sequence[Verdict]], Sequence[str | None]]
"""Why texts of samples (the second, one for each text) go; None: they stay."""


def _remove_texts(verdicts: Sequence[Verdict], rule: TextRule) -> None:
    """Take out texts that break a rule, and samples that then have none."""
    left = [*_left(verdicts)]
    texts = [text for _, sample in left for text in sample.texts]
    owners = [verdict for verdict, sample in left for _ in sample.texts]
    all_reasons = iter(rule(texts, owners))
    for verdict, sample in left:
        reasons = [next(all_reasons) for _ in sample.texts]
        removed = [reason for reason in reasons if reason]
        if len(removed) == len(reasons):
            verdict.reason = removed[-1]
        elif removed:
            kept = (t for t, r in zip(sample.texts, reasons, strict=True) if not r)
            verdict.sample = replace(sample, texts=tuple(kept))
            verdict.removed_texts.update(removed)


def _judge_texts(
    verdicts: Sequence[Verdict], rules: FilterSettings, evaluation: EvaluationSet | None
) -> None:
    def captions_unfit(texts: Sequence[Text], _: Sequence[Verdict]) -> list[str | None]:
        captions = [caption_of(text, rules) for text in texts]
        reasons = iter(unfit([c for c in captions if c is not None], rules.captions))
        return [None if caption is None else next(reasons) for caption in captions]

    _remove_texts(verdicts, captions_unfit)
    if rules.evaluation and rules.evaluation.words and evaluation:
        holds = partial(evaluation.holds_text, words=rules.evaluation.words)
        _remove_texts(
            verdicts,
            lambda texts, _: [
                "evaluation_text" if any(holds(turn.answer) for turn in text.turns) else None
                for text in texts
            ],
        )
    personal = rules.personal_data
    if personal and personal.action == "drop":
        _remove_texts(
            verdicts,
            lambda texts, _: [
                "personal_data" if any(find(part, personal) for part in _parts(text)) else None
                for text in texts
            ],
        )
    elif personal:
        for verdict, sample in _left(verdicts):
            masked = tuple(_changed(text, partial(mask, rules=personal)) for text in sample.texts)
            pairs = zip(masked, sample.texts, strict=True)
            verdict.masked_texts = sum(new != old for new, old in pairs)
            verdict.sample = replace(sample, texts=masked)


def _open_pictures(verdict: Verdict, sample: Sample, rules: FilterSettings) -> None:
    pictures: list[Picture] = []
    for encoded in sample.pictures:
        picture = open_picture(encoded, rules.pictures)
        if isinstance(picture, str):
            verdict.reason = picture
            return
        pictures.append(picture)
    verdict.pictures = tuple(pictures)


def _judge_by_models(verdicts: Sequence[Verdict], rules: FilterSettings) -> None:
    device = "cuda" if rules.gpus_per_worker else "cpu"
    if rules.checkpoints and device == "cpu":
        # Ray shows all GPUs to workers that have asked for none, and our own models take what is
        # there. It must come before anything looks for GPUs.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for classifier in rules.classifiers:
        _classify(verdicts, classifier, device)
    agreement = rules.agreement
    if agreement is None:
        return

    def disagree(texts: Sequence[Text], owners: Sequence[Verdict]) -> list[str | None]:
        captions = [caption_of(text, rules) for text in texts]
        pictures, shown, places = list[Picture](), list[str](), list[int]()
        for n, (text, owner, caption) in enumerate(zip(texts, owners, captions, strict=True)):
            if caption is not None and text.turns[0].pictures:  # others have nothing to agree with
                pictures.append(owner.pictures[text.turns[0].pictures[0]])
                shown.append(caption)
                places.append(n)
        reasons: list[str | None] = [None] * len(texts)
        if towers.is_ours(agreement.checkpoint):
            scores = towers.agreement(agreement, device, [p.encoded for p in pictures], shown)
        else:
            images = [picture.image for picture in pictures]
            scores = models.agreement(agreement.checkpoint, device, images, shown)
        for n, score in zip(places, scores, strict=True):
            reasons[n] = "agreement" if score < agreement.minimum else None
        return reasons

    _remove_texts(verdicts, disagree)


def _classify(verdicts: Sequence[Verdict], rule: ClassifierRules, device: str) -> None:
    probabilities = partial(models.probabilities, rule.checkpoint, device, rule.of, rule.label)
    if rule.of == "texts":

        def sure(texts: Sequence[Text], _: Sequence[Verdict]) -> list[str | None]:
            scores = probabilities(["\n".join(_parts(text)) for text in texts])
            return [rule.name if score > rule.maximum else None for score in scores]

        _remove_texts(verdicts, sure)
        return
    owners = [verdict for verdict, _ in _left(verdicts) for _ in verdict.pictures]
    images = [picture.image for verdict, _ in _left(verdicts) for picture in verdict.pictures]
    for verdict, score in zip(owners, probabilities(images), strict=True):
        if score > rule.maximum:
            verdict.reason = rule.name


def caption_of(text: Text, rules: FilterSettings) -> str | None:
    """What a text says of its picture; None if it is no caption."""
    if text.task not in rules.caption_tasks:
        return None
    return " ".join(turn.answer for turn in text.turns)


def _parts(text: Text) -> list[str]:
    return [part for turn in text.turns for part in (turn.prompt, turn.answer) if part]


def _changed(text: Text, change: Callable[[str], str]) -> Text:
    turns = (
        replace(turn, prompt=change(turn.prompt), answer=change(turn.answer)) for turn in text.turns
    )
    return replace(text, turns=tuple(turns))
