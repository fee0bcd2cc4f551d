"""The check of tolerances in ``bare_tolerances.py``."""

import pytest

from bare_tolerances import findings

SOURCES = "from tolerances import rounding\nSAMPLING = 1e-3\n"


@pytest.mark.parametrize(
    "line",
    [
        "assert x == pytest.approx(1.0)",
        "assert x == pytest.approx(1.0, 1e-9)",
        "assert x == pytest.approx(1.0, abs=0.25)",
        "assert x == pytest.approx(1.0, rel=1e-12 * size)",
        "assert torch.allclose(x, y)",
        "torch.testing.assert_close(x, y, rtol=0, atol=1e-12)",
        "np.testing.assert_allclose(x, y)",
        "assert error <= 1e-12",
        "assert 1e-12 * size > error",
        "assert all(x < 1e-9 for x in errors)",
    ],
)
def test_bare_tolerances_are_found(line):
    assert len(list(findings(SOURCES + line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "assert x == pytest.approx(1.0, abs=SAMPLING)",
        "assert x == pytest.approx(1.0, rel=0, abs=4 / math.sqrt(n))",
        "assert torch.allclose(x, y, rtol=rounding(8, 1e-4), atol=0)",
        "np.testing.assert_allclose(x, y, **options)",
        "assert error <= rounding(64) * size",
        "assert error > 1e-4  # the fault is seen",
        "solve_ivp(slope, ends, y, rtol=1e-9, atol=1e-12)",
        "def assert_close(x, y):\n    pass\nassert_close(x, y)",
    ],
)
def test_named_tolerances_and_other_numbers_are_left_alone(line):
    assert not list(findings(SOURCES + line))
