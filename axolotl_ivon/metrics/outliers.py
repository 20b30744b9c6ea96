"""Values that stand out from the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

# The distance from the median, in robust standard deviations, from which a value stands out (Iglewicz and Hoaglin,
# 1993), and the number of values below which there is no telling.
STANDS_OUT, _FEWEST = 3.5, 10


def outliers(values: ArrayLike) -> np.ndarray:
    """Return a mask, [values], of the positive values that are far above the others.

    Scores of training rows are skewed, so their cube roots are compared, which takes most of the skew away (Wilson and
    Hilferty, 1931): those that are `STANDS_OUT` robust standard deviations (1.4826 times the median absolute deviation)
    above the median. Of exponential values that is about one in five thousand.
    """
    roots = np.cbrt(np.asarray(values, dtype=float))
    if len(roots) < _FEWEST:
        return np.zeros(len(roots), bool)
    median = float(np.median(roots))
    spread = 1.4826 * float(np.median(np.abs(roots - median)))
    return roots > max(median + STANDS_OUT * spread, 0.0)
