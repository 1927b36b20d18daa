"""A short soak: soak.py, which is run for its own sake, with a few kills."""

import pytest
import soak


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_killed_at_random_moments_nothing_is_lost_and_nothing_differs(place, s3, processes):
    s3.kill()  # soak starts its own
    assert soak.soak(place, 2, processes, seed=processes, pause=4)['losses compared'] > 100
