"""What an evaluation would have written."""

from __future__ import annotations

import pytest
from measurements import measurements

from axolotl_ivon.report.measured import Measured


@pytest.fixture
def known() -> Measured:
    return measurements()
