"""Who waits for whom in a session, inferred from arrivals and think times."""

import numpy as np
import pytest
from simulated import trace

from traces.sessions import followers


def test_a_session_with_a_sub_agent_that_runs_beside_it():
    """The parent (0) starts a sub-agent (1) whose second request (2) overlaps the parent's own next one (3).

    2 thought for 1 s from second 9 on, when 1 was the last to have come; 3 thought for 7 s from second 4 on, before 1
    came, so it had waited for 0. 4 is another session, 5 says nothing of its think time, 6 belongs to no session.
    """
    columns = {
        "session": [0, 0, 0, 0, 1, 1, -1],
        "think_s": [np.nan, np.nan, 1.0, 7.0, 3.0, np.nan, 2.0],
    }
    found = followers(trace([0.0, 5.0, 10.0, 11.0, 12.0, 14.5, 20.0], 100, 10, **columns))
    np.testing.assert_array_equal(found.leader, [-1, 0, 1, 0, -1, 4, -1])
    np.testing.assert_array_equal(found.after_end, [False, False, True, True, False, False, False])
    np.testing.assert_array_equal(found.delay_s, [0, 5, 1, 7, 0, 2.5, 0])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_inferred_fits_the_recording(seed):
    """No leader came after its follower began to think, and nobody else of the session came between the two."""
    rng = np.random.default_rng(seed)
    arrival_s, session = np.sort(rng.uniform(0, 50, 60)), rng.integers(-1, 4, 60)
    think_s = np.where(rng.random(60) < 0.2, np.nan, rng.exponential(8, 60))
    found = followers(trace(arrival_s, 100, 10, session=session, think_s=think_s))
    for i in range(60):
        earlier = [j for j in range(i) if session[j] == session[i] >= 0]
        by_then = [j for j in earlier if arrival_s[j] <= arrival_s[i] - think_s[i]]
        assert found.leader[i] == (by_then or earlier or [-1])[-1]
        assert found.after_end[i] == bool(by_then)
