"""Figures of a step that follow from what it counted."""

from collections.abc import Mapping

import psutil
import torch

from megavlm.config.engines import UNDIVIDED
from megavlm.config.objectives import is_pretraining
from megavlm.config.run import RunSettings
from megavlm.planner.hardware import gpu_named
from megavlm.planner.work import Tokens, model_blocks, value_bytes


class StepFigures:
    """Of the steps of one stage."""

    def __init__(self, run: RunSettings, ranks: int) -> None:
        self._run = run
        self._peak_flops_per_second = _peak_flops_per_second(run, ranks)
        scales = {part: run.optimizer.scales.get(part, 1.0) for part in run.trained_parts}
        self._scales = scales if len({*scales.values(), 1.0}) > 1 else {}
        self._process = psutil.Process()

    def of(
        self, counts: Mapping[str, float], learning_rate: float, step_seconds: float
    ) -> dict[str, float | None]:
        """Of a step that took so long; None for what is not known here.

        counts: `texts`, `text_tokens` and `images` of all ranks. Memory is this rank's and host's.
        """
        image_tokens = counts["images"] * self._run.model.encoder.tokens
        flops = seen_training_flops(self._run, counts)
        rate = None if flops is None else flops / step_seconds
        peak = self._peak_flops_per_second
        return {
            **{f"learning_rate_{part}": learning_rate * s for part, s in self._scales.items()},
            "text_tokens_per_second": counts["text_tokens"] / step_seconds,
            "image_tokens_per_second": image_tokens / step_seconds,
            "images_per_second": counts["images"] / step_seconds,
            "model_flops_per_second": rate,
            "model_flops_utilisation": None if rate is None or peak is None else rate / peak,
            **self._memory(),
        }

    def _memory(self) -> dict[str, float | None]:
        host = psutil.virtual_memory()
        has_gpu = torch.cuda.is_available()
        return {
            "process_rss_bytes": self._process.memory_info().rss,
            "host_used_bytes": host.total - host.available,
            "gpu_peak_allocated_bytes": torch.cuda.max_memory_allocated() if has_gpu else None,
            "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved() if has_gpu else None,
        }


def seen_training_flops(run: RunSettings, counts: Mapping[str, float]) -> float | None:
    """Model FLOPs of a step, forward and backward, as the planner counts them.

    Recomputation and padding are left out. None in pre-training, which the planner does not count.
    """
    if is_pretraining(run.objectives):
        return None
    texts, text_tokens = counts["texts"], counts["text_tokens"]
    if not texts:
        return 0.0
    # Counts of pictures are factors, and 0 would divide by itself.
    images = counts["images"] or 1e-9
    tokens = Tokens(images, 1, text_tokens, text_tokens, texts)  # pyright: ignore[reportArgumentType]
    return sum(block.seen_training_flops for block in model_blocks(run, tokens, UNDIVIDED))


def _peak_flops_per_second(run: RunSettings, ranks: int) -> float | None:
    """Of all GPUs together, if the planner knows them."""
    if not torch.cuda.is_available():
        return None
    memory_bytes = torch.cuda.get_device_properties(0).total_memory
    gpu = gpu_named(torch.cuda.get_device_name(0), memory_bytes)
    return None if gpu is None else gpu.peak_flops_per_second(value_bytes(run)) * ranks
