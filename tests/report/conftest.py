from measurements import known  # noqa: F401 - a fixture
