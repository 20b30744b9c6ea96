"""`ivon-post sweep` as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny import write_chats

from ivon_post import cli


@pytest.fixture(scope="module")
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter()


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", count=20)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["sweep", *map(str, arguments)])


def test_a_sweep_writes_what_eval_takes(adapter: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = ["--data", chats, "--tau", "0.2,1", "--tau", "inf", "--ratio", "0,0.5", "--samples", 2, "-o", out]
    result = run(adapter, *grid)
    assert result.exit_code == 0, result.output
    assert "no reliability diagram" in result.stderr  # a handful of examples fill no two bins
    names = ["recommended.json", "trade-off.png", "trade-off.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert str(out / name) in result.stdout
    grid_lines = [line.split() for line in result.stdout.splitlines() if line[:6].strip() in ("0.2", "1", "inf")]
    written = json.loads((out / "recommended.json").read_text())
    assert len(grid_lines) == 6 + len(written["scaled"])
    assert sum("front" in line for line in grid_lines) >= 1
    assert sum("best" in line for line in grid_lines) == 1
    # Ten examples tell nothing: the mean stays.
    assert [line[:3] for line in grid_lines if "recommended" in line] == [["inf", "0", "1"]]
    assert "too few examples: keep the default, the mean" in result.stdout
    assert "10 examples choose and 10 report: few differences are more than noise; 100 each are better" in result.stderr
    assert len(written["grid"]) == 6
    assert written["data"] == [str(chats)]

    taken = CliRunner().invoke(
        cli,
        ["eval", str(adapter), "--data", str(chats), "--recommended", str(out / "recommended.json"), "--json",
         "--samples", "2", "--rows", "posterior-pruned"],
    )  # fmt: skip
    found = json.loads(taken.stdout)
    assert (found["tau"], found["prune_ratio"]) == (written["tau"], written["ratio"])
    # All the data is both halves, ten examples each.
    both = (written["chosen_on"]["nll"] + written["reported_on"]["nll"]) / 2
    assert found["rows"][0]["nll"] == pytest.approx(both, rel=1e-6)

    again = run(adapter, *grid)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert run(adapter, *grid, "--overwrite", "--objective", "brier").exit_code == 0
    assert json.loads((out / "recommended.json").read_text())["objective"] == "brier"


def test_json_and_nothing_else(adapter: Path, chats: Path, tmp_path: Path) -> None:
    result = run(
        adapter, "--data", chats, "--tau", "1,inf", "--ratio", "0", "-n", 1, "-o", tmp_path / "o", "--json", "-q"
    )
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result.stderr == ""
    assert sorted(found["files"]) == sorted(str(path) for path in (tmp_path / "o").iterdir())
    assert found["tau"] in (1.0, "inf")
    assert found["mean_reported_on"] == found["grid"][1]["reported_on"]
    assert found["verdict"]["outcome"] == "too few examples"
    assert "threshold" not in found


def test_a_risk_gives_a_threshold_that_eval_keeps_to(adapter: Path, tmp_path: Path) -> None:
    # A model that has learned nothing is wrong half of the time.
    chats = write_chats(tmp_path / "chats.jsonl", count=80)
    grid = ["--data", chats, "--tau", "1,inf", "--ratio", "0", "-n", 1, "-q", "-o", tmp_path / "o"]
    result = run(adapter, *grid, "--risk", "0.9", "--json")
    found = json.loads(result.stdout)
    assert found["examples"] == {"chosen_on": 20, "reported_on": 20}
    assert found["certified_on"]["examples"] == 40
    assert (found["risk"], found["confidence"], found["score"]) == (0.9, 0.9, "probability")
    assert found["certified_on"]["bound"] <= 0.9
    assert found["coverage"] == found["certified_on"]["answered"] / 40

    path = tmp_path / "o" / "recommended.json"
    document = json.loads(path.read_text())
    document.update(threshold=0.55, temperature=0.7)
    path.write_text(json.dumps(document))
    options = ["eval", adapter, "--data", chats, "--recommended", path, "-q", "--samples", 1, "--rows", "mean"]
    rows = json.loads(CliRunner().invoke(cli, [*map(str, options), "--json"]).stdout)["rows"]
    assert [row["name"] for row in rows] == ["mean", "recommended", "recommended, answered"]
    _, whole, answered = rows
    assert whole["temperature"] == 0.7
    assert answered["coverage"] == answered["examples"] / 80
    assert 0 < answered["coverage"] < 1
    assert answered["threshold"] == 0.55
    # What is answered is what --output says is sure enough.
    CliRunner().invoke(cli, [*map(str, options), "-o", str(tmp_path / "examples.jsonl")])
    each = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    sure = [one for one in each if one["rows"]["recommended"]["confidence"] >= 0.55]
    assert len(sure) == answered["examples"]
    table = CliRunner().invoke(cli, list(map(str, options))).stdout
    assert f"chats.jsonl: {100 * answered['coverage']:.1f} % answered, from confidence 0.55 on" in table


def test_no_promise_says_how_many_examples_would_do(adapter: Path, chats: Path, tmp_path: Path) -> None:
    result = run(
        adapter, "--data", chats, "--tau", "1,inf", "--ratio", "0", "-n", 1, "--risk", "0.01", "-o", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.stdout.splitlines() if line.startswith("no threshold can promise")]
    assert "at most 1 % wrong, with 90 % confidence, from 10 examples: about 460 would" in line
    assert json.loads((tmp_path / "o" / "recommended.json").read_text())["threshold"] is None


def test_the_default_output_is_beside_the_adapter(adapter: Path, chats: Path) -> None:
    result = run(f"{adapter}/", "--data", chats, "--tau", "1,inf", "--ratio", "0", "--samples", 1)
    assert result.exit_code == 0, result.output
    assert (adapter.parent / "adapter-sweep" / "recommended.json").exists()


def test_the_weights_of_a_product(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    adapters = [make_adapter(seed=seed) for seed in (1, 2)]
    data = [write_chats(tmp_path / f"{name}.jsonl", 12, seed) for seed, name in enumerate("ab")]
    files = [word for path in data for word in ("--data", path)]
    result = run("--combine", *adapters, *files, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "a.jsonl: NLL" in result.stdout
    assert sum("front" in line for line in result.stdout.splitlines()[:20]) >= 1
    assert f"next: ivon-post eval {tmp_path / 'out'} --data TEST.jsonl" in result.stderr
    evaluated = CliRunner().invoke(
        cli, ["eval", str(tmp_path / "out"), "--data", str(data[0]), "--rows", "mean", "--json"]
    )
    assert evaluated.exit_code == 0, evaluated.output
    again = run("--combine", *adapters, *files, "-o", tmp_path / "out", "--overwrite", "--json")
    assert again.exit_code == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["weights"] == [1, 1]
    assert found["adapters"] == list(map(str, adapters))
    assert len(found["points"]) == 9
    assert all(Path(path).exists() for path in found["files"])
