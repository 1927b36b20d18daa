"""A short soak: soak.py, which is run for its own sake, with a few kills."""

import pytest
import soak


@pytest.mark.parametrize('processes', [1, 2])
def test_killed_at_random_moments_nothing_is_lost_and_nothing_differs(place, s3, processes):
    s3.kill()  # soak starts its own
    assert soak.soak(place, 4, processes, seed=processes)['losses compared'] > 100
