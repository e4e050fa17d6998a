"""A run's newest checkpoint as a model of lmms-eval (docs/evaluation.md).

lmms-eval 0.7 finds `manifest` through the entry point group `lmms_eval.models`, whenever it starts;
so what is heavy is imported when the model is made.
"""

import atexit
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image

if TYPE_CHECKING:
    from megavlm.infer.prompts import Request
    from megavlm.infer.quantize import Quantization

DEFAULT_NEW_TOKENS = 256  # where a task does not say
DEFAULT_BATCH_SIZE = 16


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="megavlm", simple_class_path=f"{__name__}.Megavlm")


class Megavlm(lmms):
    """Answers what lmms-eval's tasks of the type `generate_until` ask about pictures."""

    def __init__(
        self,
        pretrained: str,
        stage: str | None = None,
        quantization: "Quantization | None" = None,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """pretrained: a run file. stage: whose newest checkpoint, if not the run's.

        quantization: int8 or int4.

        batch_size: answers that are written at the same time; of `auto` the default. device and
        max_batch_size are given by lmms-eval, and of no use: a rank has its device, and rows join
        and leave a batch.
        """
        super().__init__()
        self._batch_size = _rows(batch_size)
        from torch import distributed

        from megavlm.config.engines import UNDIVIDED
        from megavlm.config.load import load_plan
        from megavlm.data.tokenizer import Tokenizer
        from megavlm.dist import groups
        from megavlm.eval.run import newest_of
        from megavlm.infer.load import check_language, load_language

        plan = load_plan(Path(pretrained), [])
        ranks = ExitStack()
        if distributed.is_initialized():  # by lmms-eval's command line
            ranks.enter_context(groups.model_groups(plan.first.seed, UNDIVIDED))
        else:
            ranks.enter_context(groups.process_groups(plan.first.seed))
        # Not when it is cleaned: ranks exchange results after that.
        atexit.register(ranks.close)
        of_stage, checkpoint = newest_of(plan, stage)
        check_language(of_stage)
        self._model = load_language(of_stage.run, checkpoint, quantization=quantization)
        self._tokenizer = Tokenizer(of_stage.run.data.tokenizer)
        self._side = of_stage.run.model.encoder.image_pixels
        self._rank, self._world_size = groups.rank(), groups.world_size()
        self._device = groups.device()

    @property
    def device(self) -> Any:
        """Of this rank; lmms-eval asks for it."""
        return self._device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of lmms-eval's `Instance`s.

        Raises RequestError for what the model cannot do: videos, sounds, beams.
        """
        from megavlm.eval.answers import PROMPTS_AT_ONCE
        from megavlm.eval.samples import progress
        from megavlm.infer.generate import generate

        answers: list[str] = []
        repeats: Counter[int] = Counter()  # an instance that is to be repeated comes several times
        with progress("lmms-eval", len(requests)) as advance:
            for start in range(0, len(requests), PROMPTS_AT_ONCE):
                asked: list[Request] = []
                for instance in requests[start : start + PROMPTS_AT_ONCE]:
                    asked.append(self._request(*instance.args, seed=repeats[id(instance)]))
                    repeats[id(instance)] += 1
                answers += generate(
                    self._model,
                    self._tokenizer,
                    asked,
                    batch_size=self._batch_size,
                    on_progress=advance,
                )
        return answers

    def _request(
        self,
        context: str,
        settings: Mapping[str, Any],
        doc_to_visual: Any,
        doc_id: Any,
        task: str,
        split: str,
        *,
        seed: int,
    ) -> "Request":
        from megavlm.data.image import fit_square, to_rgb, to_uint8_tensor
        from megavlm.errors import RequestError
        from megavlm.infer.prompts import Request, question

        visuals: list[Any] = list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise RequestError(
                    f"task {task} shows a {type(visual).__name__}; only pictures can be shown"
                )
        pixels = [to_uint8_tensor(fit_square(to_rgb(visual), self._side)) for visual in visuals]
        stop = settings.get("until") or ()
        return Request(
            prompt=question(self._tokenizer, context, pictures=len(pixels)),
            pixels=tuple(pixels),
            max_new_tokens=int(settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
            sampling=_sampling(settings, task, seed),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise NotImplementedError(
            "megavlm answers tasks of the type generate_until; this one compares likelihoods"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError(
            "megavlm answers tasks of the type generate_until; this one has several rounds"
        )


def _rows(batch_size: int | str) -> int:
    from megavlm.errors import ConfigError

    words = str(batch_size)
    if words.partition(":")[0] == "auto":
        return DEFAULT_BATCH_SIZE
    if not words.isdecimal() or int(words) < 1:
        raise ConfigError(f"batch_size={batch_size} is not auto or a whole number of at least 1")
    return int(words)


def _sampling(settings: Mapping[str, Any], task: str, seed: int) -> Any:
    from megavlm.errors import RequestError
    from megavlm.infer.sampling import GREEDY, Sampling

    beams = settings.get("num_beams") or 1
    if beams > 1:
        raise RequestError(f"task {task} wants num_beams={beams}; there is no search by beams")
    temperature = float(settings.get("temperature") or 0)
    if settings.get("do_sample") is True and not temperature:
        temperature = 1.0
    if settings.get("do_sample") is False or not temperature:
        return GREEDY
    top_p = settings.get("top_p")
    return Sampling(
        temperature=temperature,
        top_k=settings.get("top_k"),
        top_p=1.0 if top_p is None else float(top_p),
        seed=seed,
    )
