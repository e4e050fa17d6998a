from dataclasses import replace

import pytest

from megavlm.errors import ConfigError
from megavlm.train.preflight import check_stage


def test_a_limit_of_images_that_every_step_exceeds_is_refused(tiny_run):
    def limited(most):
        return replace(tiny_run, data=replace(tiny_run.data, micro_batch_images=most))

    check_stage(limited(3), ranks=1)
    check_stage(limited(2), ranks=2)
    told = "micro_batch_images=1 would leave samples out of every step.* raise it to at least 3,"
    with pytest.raises(ConfigError, match=told):
        check_stage(limited(1), ranks=1)
