"""A quantised model beside the same one as it is (docs/quantization.md)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional

from megavlm.checkpoint.storage import read_state
from megavlm.config.plan import Plan
from megavlm.data.tokenizer import END, Tokenizer
from megavlm.dist import groups
from megavlm.eval.answers import Asked
from megavlm.eval.run import asked_of, language_scores, newest_of, write_evaluation
from megavlm.eval.samples import progress, tell
from megavlm.eval.scores import Score
from megavlm.infer.forced import TeacherForced
from megavlm.infer.load import check_language, load_language
from megavlm.infer.prompts import question
from megavlm.infer.quantize import Quantization, check_quantization
from megavlm.model.vlm import VisionLanguageModel

ANSWERS_AT_ONCE = 16


class Forced(NamedTuple):
    """Of the tokens of held-out answers, in their order."""

    losses: list[float]
    """In nats."""
    likeliest: list[int]
    """The token that the model would have chosen, after the true ones before it."""


def evaluate_quantized(plan: Plan, stage_name: str | None, quantization: Quantization) -> None:
    """Measure a quantised model, and the same one as it is, on held-out samples.

    What comes out lies apart from the run's own results, in a folder of the quantisation's name.
    Raises as `evaluate`, and ConfigError where the model cannot be quantised.
    """
    check_quantization(quantization, plan.first.model)
    with groups.process_groups(plan.first.seed):
        stage, checkpoint = newest_of(plan, stage_name)
        check_language(stage)
        run = stage.run
        measured = ", ".join(run.measures) or "nothing is to be measured"
        tell(f"evaluating stage {stage.name} as it is and in {quantization}: {measured}")
        tokenizer = Tokenizer(run.data.tokenizer)
        asked = asked_of(run, run.measures)
        found: list[tuple[list[Score], list[Forced]]] = []
        for kind in (None, quantization):
            model = load_language(run, checkpoint, quantization=kind)
            scores, rows = language_scores(
                model, tokenizer, run, run.measures, asked, show_progress=True
            )
            found.append((scores, [forced(model, tokenizer, one) for one in asked]))
            del model  # before the next is there
        (plain, plain_forced), (quantized, quantized_forced) = found
        scores = [
            replace(row, baselines={"unquantised": before.model, **row.baselines})
            for row, before in zip(quantized, plain, strict=True)
        ]
        for one, before, after in zip(asked, plain_forced, quantized_forced, strict=True):
            scores += forced_scores(one.split.name, before, after)
        if groups.rank() == 0:
            step = 0 if checkpoint is None else read_state(checkpoint)["step"]
            title = f"stage {stage.name}, step {step}, {quantization}"
            write_evaluation(run.run_folder / quantization, stage.name, step, scores, rows, title)


def forced(model: VisionLanguageModel, tokenizer: Tokenizer, asked: Asked) -> Forced:
    """The true answers' tokens, as a model sees them; collective, in any order of ranks' shares."""
    mine = asked.prompts[groups.rank() :: groups.world_size()]
    reader = TeacherForced(model)
    losses: list[float] = []
    likeliest: list[int] = []
    with progress(f"true answers, {asked.split.name}", len(mine)) as advance:
        for start in range(0, len(mine), ANSWERS_AT_ONCE):
            some = mine[start : start + ANSWERS_AT_ONCE]
            answers = [[*tokenizer.encode(prompt.text.answer), END] for prompt in some]
            prompts = [question(tokenizer, prompt.text.prompt, pictures=1) for prompt in some]
            shown = [asked.split.show(prompt.picture.sample).pictures for prompt in some]
            pixels = [[s[p.picture.number]] for s, p in zip(shown, some, strict=True)]
            for answer, logits_tv in zip(
                answers, reader.logits(prompts, pixels, answers), strict=True
            ):
                answer_t = torch.tensor(answer, device=logits_tv.device)
                losses += functional.cross_entropy(logits_tv, answer_t, reduction="none").tolist()
                likeliest += logits_tv.argmax(-1).tolist()
            advance(len(some))
    shares = groups.from_all_ranks(Forced(losses, likeliest))
    return Forced(
        [loss for share in shares for loss in share.losses],
        [token for share in shares for token in share.likeliest],
    )


def forced_scores(split: str, plain: Forced, quantized: Forced) -> Sequence[Score]:
    """Rows of the table; none where there is no answer."""
    tokens = len(plain.losses)
    if not tokens:
        return []
    same = sum(a == b for a, b in zip(plain.likeliest, quantized.likeliest, strict=True))
    return [
        Score(
            split=split,
            measure="loss per answer token, nats",
            items=tokens,
            model=sum(quantized.losses) / tokens,
            baselines={"unquantised": sum(plain.losses) / tokens},
        ),
        Score(split=split, measure="same likeliest token", items=tokens, model=same / tokens),
    ]
