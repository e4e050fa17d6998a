"""The one place that knows which engines there are."""

import torch

from megavlm.config.run import RunSettings
from megavlm.engine.base import Engine


def start_engine(run: RunSettings, device: torch.device) -> Engine:
    """Build the run's model, with its initial weights, under the run's engine; collective."""
    match run.engine:
        case "zero3":
            from megavlm.engine.zero3 import Zero3Engine

            return Zero3Engine(run, device)
        case "fsdp2":
            from megavlm.engine.fsdp2 import Fsdp2Engine

            return Fsdp2Engine(run, device)
        case "megatron":
            from megavlm.engine.megatron import MegatronEngine

            return MegatronEngine(run, device)
