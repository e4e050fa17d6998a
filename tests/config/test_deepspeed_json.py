import json
from pathlib import Path

import pytest

from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.load import load_run

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_checked_in_json_is_what_the_run_file_gives(path):
    checked_in = json.loads((CONFIGS / "ds" / f"{path.stem}.json").read_text())
    assert checked_in == deepspeed_config(load_run(path)), "run `make configs`"
