"""Names that tests of solvers import from here; they are defined in `score.cases`."""

from score.cases import Constant, mixture
from score.cases import score_rounding as rounding

__all__ = ["Constant", "mixture", "rounding"]
