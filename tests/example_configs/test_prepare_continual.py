"""The tweets that `example_configs/smollm2/continual-2.yaml` trains on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "example_configs" / "smollm2"


def test_the_tweets_are_drawn_from_the_package_and_are_where_the_yaml_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import prepare_continual
    import prepare_demo

    (tmp_path / "vaderSentiment").mkdir()
    (tmp_path / "vaderSentiment" / "sdist").touch()
    rated = [(4.0 * (-1) ** i, f"tweet {i}") for i in range(400)]
    monkeypatch.setattr(prepare_demo, "read_snippets", lambda sdist, name: rated if name == "tweets" else [])
    prepare_continual.prepare_tweets(tmp_path)
    sizes = {path.stem: len(path.read_text().splitlines()) for path in (tmp_path / "continual").iterdir()}
    assert sizes == prepare_continual.SETS["tweets"]
    train, test = ((tmp_path / "continual" / f"{name}.jsonl").read_text().splitlines() for name in sizes)
    assert not set(train) & set(test)
    second = yaml.safe_load((FOLDER / "continual-2.yaml").read_text())
    assert second["datasets"][0]["path"] == ".demo/continual/tweets-train.jsonl"


def test_the_second_yaml_goes_on_from_the_first_and_differs_in_nothing_else() -> None:
    first, second = (yaml.safe_load((FOLDER / f"continual-{i}.yaml").read_text()) for i in (1, 2))
    assert second.pop("ivon_prior") == first["output_dir"]
    assert {key for key in first if first[key] != second[key]} == {"datasets", "output_dir"}
