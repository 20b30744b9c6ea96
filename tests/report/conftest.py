"""What an evaluation would have written."""

from measurements import known  # noqa: F401 - a fixture
