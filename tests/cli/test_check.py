"""`ivon-post check`: of an adapter, of data, of a YAML."""

from __future__ import annotations

from pathlib import Path

import yaml
from tiny import write_chats


def test_an_adapter(tiny_adapter: Path, ivon_post):
    text = ivon_post("check", tiny_adapter)
    assert "✓ the weights moved" in text
    assert "log_sigma_spread" in text
    facts = ivon_post.json("check", tiny_adapter)
    assert [one["about"] for one in facts["findings"]] == ["weights", "sigma", "draws"]
    assert all(line in text for line in (f"! {one['text']}" for one in facts["findings"] if not one["good"]))


def test_data(tiny_adapter: Path, tmp_path: Path, ivon_post):
    data = write_chats(tmp_path / "validation.jsonl", 12)
    facts = ivon_post.json("check", tiny_adapter, "--data", data, "--limit", 10, "-q")
    (row,) = facts["data"]
    assert (row["data"], row["examples"]) == (str(data), 10)
    assert facts["findings"][-1] == row["finding"]
    assert row["finding"]["text"] in ivon_post("check", tiny_adapter, "--data", data, "--limit", 10, "-q")


def test_a_yaml(tmp_path: Path, ivon_post):
    write_chats(tmp_path / "chats.jsonl", 30)
    config = tmp_path / "train.yaml"
    facts = {"optimizer": "ivon_lora", "learning_rate": 0.1, "datasets": [{"path": str(tmp_path / "chats.jsonl")}]}
    config.write_text(yaml.safe_dump({**facts, "num_epochs": 2, "ivon_preset": "paper"}))
    text = ivon_post("check", config)
    assert "! no weight can travel farther than" in text
    assert ["train_size", "30"] in [line.split() for line in text.splitlines()]
    assert ivon_post.json("check", config, "--processes", 2)["steps"] == 30
    result = ivon_post.run("check", config, "--data", config)
    assert result.exit_code == 2
    assert "--data goes with an adapter" in result.stderr
    config.write_text("optimizer: sgd")
    assert "no posterior is trained" in ivon_post.error("check", config)
