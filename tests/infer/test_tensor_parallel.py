import torch

from megavlm.config.engines import MegatronSettings
from megavlm.infer.engine import Engine
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import TINY
from tests.infer.test_engine import LIMITS, random_requests
from tests.infer.tokens import run
from tests.model.test_vlm import random_model
from tests.ranks import alone, run_on_ranks

TP2 = MegatronSettings(tensor_parallel=2)


def test_two_ranks_answer_as_one():
    requests = random_requests(12)
    with alone():
        model = random_model().eval()
        expected = run(Engine(model, LIMITS), requests)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def on_rank(_):
        part = VisionLanguageModel(TINY, dtype=torch.float32, parallel=TP2).eval()
        ledger = part.ledger()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(part.shard(ledger[name], weights[name]))
        return run(Engine(part, LIMITS), requests)

    assert run_on_ranks(2, on_rank, parallel=TP2) == [expected, expected]
