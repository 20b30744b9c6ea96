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
    assert len(grid_lines) == 6
    assert sum("front" in line for line in grid_lines) >= 1
    assert sum("best" in line for line in grid_lines) == 1
    written = json.loads((out / "recommended.json").read_text())
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


def test_the_default_output_is_beside_the_adapter(adapter: Path, chats: Path) -> None:
    result = run(f"{adapter}/", "--data", chats, "--tau", "1,inf", "--ratio", "0", "--samples", 1)
    assert result.exit_code == 0, result.output
    assert (adapter.parent / "adapter-sweep" / "recommended.json").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--tau", "1", "--ratio", "0"], 1, "one point is nothing to choose between"),
        (["--tau", "0,1"], 1, "tau 0.0 is not > 0"),
        (["--ratio", "0,1.5"], 1, "ratio 1.5 is outside"),
        (["--tau", "hot"], 2, "'hot' is not a number"),
        (["--limit", "3", "--choices", "A,B"], 1, "3 examples cannot be split"),
    ],
)
def test_bad_input_writes_nothing(
    adapter: Path, chats: Path, tmp_path: Path, options: list[str], status: int, message: str
) -> None:
    result = run(adapter, "--data", chats, "-o", tmp_path / "out", "-q", *options)
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()
