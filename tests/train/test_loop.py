import pytest

from megavlm.errors import LaunchError
from megavlm.train.loop import _alone_in


def test_two_runs_cannot_share_a_folder(tmp_path):
    with _alone_in(tmp_path):
        with pytest.raises(LaunchError, match="another run is writing to"), _alone_in(tmp_path):
            pass
    with _alone_in(tmp_path):
        pass  # free again
