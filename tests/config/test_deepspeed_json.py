import json
from pathlib import Path

import pytest

from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.load import load_plan
from megavlm.planner.zero3 import with_bucket_sizes

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = [path for path in sorted(CONFIGS.glob("*.yaml")) if load_plan(path).last.engine == "zero3"]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_the_checked_in_json_is_what_the_run_file_gives(path):
    checked_in = json.loads((CONFIGS / "ds" / f"{path.stem}.json").read_text())
    assert checked_in == deepspeed_config(with_bucket_sizes(load_plan(path).last)), (
        "run `make configs`"
    )
