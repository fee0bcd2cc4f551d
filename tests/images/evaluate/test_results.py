"""Results of an evaluation, in a file that several processes may write to."""

from cldsde.images.evaluate.results import FAILED, SAMPLING, joined


def test_measures_are_joined_if_their_images_are_of_the_same_solver():
    own = {SAMPLING: {"solver": "SSCS()", "made": ["here"]}, "fd inception": {"samples": 8}}
    stored = {SAMPLING: {"solver": "SSCS()", "made": ["there", "here"]}, "is": 1, FAILED: "no"}
    made = {"solver": "SSCS()", "made": ["there", "here"]}
    assert joined(own, stored) == {**own, SAMPLING: made, "is": 1}
    other = {**stored, SAMPLING: {**made, "solver": "EulerMaruyama()"}}
    assert joined(own, other) == joined(own, {}) == own
