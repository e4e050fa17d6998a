"""The reference recipe on its machine, without a secondary partition: searched once for all."""

from functools import cache

from megavlm.planner.hardware import cluster_of
from megavlm.planner.search import Candidate, Found, candidate_of, search
from tests.planner.test_cut import RUN
from tests.runs import load_run

CLUSTER = cluster_of("h100-80", 16, 8)
TOKENS_PER_TEXT = 64
PLAIN = load_run(RUN, ["zero3.secondary_partition=1"])


@cache
def searched() -> Found:
    return search(PLAIN, CLUSTER, TOKENS_PER_TEXT)


def candidate(*overrides: str) -> Candidate:
    """The recipe's run as overrides change it."""
    return candidate_of(load_run(RUN, overrides), CLUSTER, TOKENS_PER_TEXT)
