"""An evaluation of the tiny model, its scores and a sweep over it, made once for each test file."""

from evaluations import adapter, chats, evaluation, result, scores, swept  # noqa: F401 - fixtures
