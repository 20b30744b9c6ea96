"""Fixtures of the commands' tests."""

from bad_inputs import bad_inputs  # noqa: F401 - a fixture
