"""The commands that work on adapter folders: info, check, diff; prune, temper, sample, merge and combine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from command_line import Cli
from safetensors.torch import load_file
from tiny import write_chats

from axolotl_ivon import Posterior

MEAN_FILE = "adapter_model.safetensors"


def same(a: Posterior, b: Posterior) -> bool:
    return all(torch.equal(a.mean[key], b.mean[key]) and torch.equal(a.sigma[key], b.sigma[key]) for key in a.mean)


def words_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def recommendation(folder: Path, **values: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recommended.json"
    path.write_text(json.dumps({"tau": 3.0, "ratio": 0.4, **values}))
    return path


def test_info_shows_modules_header_and_histogram_and_has_numbers_as_json(tiny_adapter: Path, ivon_post: Cli) -> None:
    text = ivon_post("info", tiny_adapter, "--ratio", 0.5)
    lines = words_of(text)
    assert lines[0][:2] == ["module", "weights"]
    assert [line[1] for line in lines if line[0].startswith("model.layers")] == ["256", "192", "256", "192"]
    assert ["weights", "896"] in lines
    assert ["prior", "empirical"] in lines
    assert "448 weights are 0 after pruning 0.5 by snr" in text
    assert "█" in text
    shares = [float(line.split()[-1].rstrip("%")) for line in text.split("|m|/σ from\n")[1].splitlines()]
    assert sum(shares) == pytest.approx(100, abs=1)
    document = ivon_post.json("info", tiny_adapter)
    assert (document["weights"], document["would_prune"], len(document["modules"])) == (896, 90, 4)
    header = document["header"]
    numbers = {"ess": 1000.0, "gamma": 100.0, "train_size": 100, "h0": 0.05, "steps": 10, "tau": 1.0}
    numbers["pruned_ratio"] = 0.0
    assert {name: header[name] for name in numbers} == numbers
    assert {name: type(header[name]) for name in numbers} == {name: type(value) for name, value in numbers.items()}
    assert all(isinstance(header[name], str) for name in ("prior", "mean_sha256", "library_version", "format"))
    assert header["prior"] == "empirical"


def test_info_of_what_is_no_posterior(tiny_adapter: Path, plain_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    text = ivon_post("info", plain_adapter)
    assert "`eval --rows base,mean` and `generate --mean` work on this adapter" in text
    assert "model.layers.1.self_attn.v_proj" in text
    ivon_post("sample", tiny_adapter, "-n", 2, "-o", tmp_path / "e")
    members = f"{tmp_path}/e/sample-0000, {tmp_path}/e/sample-0001"
    line = ivon_post.error("info", tmp_path / "e")
    assert line.endswith(f"an ensemble of 2 adapters: give one of them, {members}")


def test_check_of_an_adapter(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    data = write_chats(tmp_path / "validation.jsonl", 12)
    words = ["check", tiny_adapter, "--data", data, "--limit", 10, "-q"]
    document, text = ivon_post.json(*words), ivon_post(*words)
    [row] = document["data"]
    assert row == ivon_post.json("eval", *words[1:], "--rows", "mean,posterior")["verdicts"][0]
    assert document["findings"][-1] == {"about": "draws", "good": False, "text": f"validation.jsonl: {row['text']}"}
    assert [finding["about"] for finding in document["findings"][:-1]] == ["weights", "sigma", "draws"]
    assert all(f"{'✓' if found['good'] else '!'} {found['text']}" in text for found in document["findings"])
    assert "log_sigma_spread" in text


def test_check_of_a_yaml(tmp_path: Path, ivon_post: Cli) -> None:
    write_chats(tmp_path / "chats.jsonl", 30)
    config = tmp_path / "train.yaml"
    keys = {
        "optimizer": "ivon_lora",
        "adapter": "lora",
        "learning_rate": 0.1,
        "datasets": [{"path": str(tmp_path / "chats.jsonl")}],
    }
    config.write_text(yaml.safe_dump({**keys, "num_epochs": 2, "ivon_preset": "paper"}))
    text = ivon_post("check", config)
    assert "! in this run a weight can move by" in text
    assert ["train_size", "30"] in words_of(text)
    assert ["learning_rate", "(α)", "0.1"] in words_of(text)
    assert ivon_post.json("check", config, "--processes", 2)["steps"] == 30
    config.write_text("optimizer: sgd")
    assert "no posterior is trained" in ivon_post.error("check", config)


def test_diff(tiny_adapter: Path, other_adapter: Path, out: Path, ivon_post: Cli) -> None:
    result = ivon_post.run("diff", tiny_adapter, other_adapter)
    assert result.stderr == f"next: ivon-post combine {tiny_adapter} {other_adapter}\n"
    ivon_post("prune", tiny_adapter, "-o", out)  # of the same data, so that there is nothing to combine
    assert ivon_post.run("diff", tiny_adapter, out).stderr == ""
    lines = words_of(result.stdout)
    modules = [f"model.layers.{i}.self_attn.{n}_proj" for i in "01" for n in "qv"]
    assert [line[0] for line in lines] == ["module", *modules, "all"]
    document = ivon_post.json("diff", tiny_adapter, other_adapter)
    assert document["weights"] == 896
    assert float(lines[-1][2]) == pytest.approx(document["kl_ab"], rel=5e-3)
    assert document["kl_ab"] == pytest.approx(sum(row["kl_ab"] for row in document["modules"]))


@pytest.mark.parametrize("options", [{}, {"criterion": "magnitude"}, {"criterion": "random"}, {"scope": "tensor"}])
def test_prune(options: dict[str, str], tiny_adapter: Path, out: Path, ivon_post: Cli) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    text = ivon_post("prune", tiny_adapter, "--ratio", 0.3, "-o", out, *words)
    assert text.splitlines()[-1] == str(out)
    q = Posterior.from_pretrained(out)
    assert same(q, Posterior.from_pretrained(tiny_adapter).prune(0.3, **options))
    assert text.startswith(f"{sum(q.pruned().values())} of 896 weights are 0")


def test_prune_by_default_and_as_recommended(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post: Cli) -> None:
    expected = {"output": str(out), "ratio": 0.1, "criterion": "snr", "scope": "adapter", "pruned": 90, "weights": 896}
    assert ivon_post.json("prune", tiny_adapter, "-o", out) == expected
    words = ["prune", tiny_adapter, "-o", out, "--overwrite", "--recommended", recommendation(tmp_path)]
    assert ivon_post.json(*words)["ratio"] == 0.4
    assert ivon_post.json(*words, "--ratio", 0.2)["ratio"] == 0.2


def test_what_changes_nothing_or_everything_says_so(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    def told(command: str, source: Path, option: str, value: float, name: str) -> str:
        return str(ivon_post.run(command, source, option, value, "-o", tmp_path / name).stderr)

    assert "ratio 0 prunes nothing: " in told("prune", tiny_adapter, "--ratio", 0, "a")
    assert "prunes" not in told("prune", tiny_adapter, "--ratio", 0.1, "b")
    before = "ratio 0.1 prunes nothing; 90 of 896 weights were 0 before: "
    assert before in told("prune", tmp_path / "b", "--ratio", 0.1, "c")
    # A tenth of every tensor is more than the tenth of the whole left in some of them.
    command = ["prune", tmp_path / "b", "--ratio", 0.1, "--scope", "tensor", "-o", tmp_path / "e"]
    result = ivon_post.run(*command)
    assert "prunes" not in result.stderr
    assert sum(Posterior.from_pretrained(tmp_path / "e").pruned().values()) > 90
    assert same(Posterior.from_pretrained(tmp_path / "b"), Posterior.from_pretrained(tmp_path / "c"))
    assert "ratio 1 prunes every weight" in told("prune", tiny_adapter, "--ratio", 1, "d")
    assert "changes nothing" in told("temper", tiny_adapter, "--tau", 1, "one")
    assert "changes nothing" not in told("temper", tiny_adapter, "--tau", math.inf, "inf")
    assert "changes nothing" in told("temper", tmp_path / "inf", "--tau", 2, "more")
    shown = ivon_post("info", tmp_path / "inf")
    assert "σ is 0 everywhere" in shown
    assert "pruned at" not in shown


def test_temper(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post: Cli) -> None:
    assert ivon_post("temper", tiny_adapter, "--tau", 2.5, "-o", out).splitlines() == ["τ is 2.5", str(out)]
    assert same(Posterior.from_pretrained(out), Posterior.from_pretrained(tiny_adapter).temper(2.5))
    assert ivon_post.json("temper", out, "--tau", 2, "-o", tmp_path / "more")["tau"] == 5.0
    ivon_post("temper", tiny_adapter, "--tau", "inf", "-o", tmp_path / "mean")
    q = Posterior.from_pretrained(tmp_path / "mean")
    assert q.tau == math.inf
    assert ivon_post.json("temper", tmp_path / "mean", "--tau", 2, "-o", tmp_path / "still")["tau"] == "inf"
    assert not any(sigma.any() for sigma in q.sigma.values())


@pytest.mark.parametrize("order", ["prune temper", "temper prune", "prune temper prune temper"])
def test_recommended_steps_go_in_any_order(order: str, tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    file = recommendation(tmp_path, mean_sha256=Posterior.from_pretrained(tiny_adapter).metadata["mean_sha256"])
    source = tiny_adapter
    for step, command in enumerate(order.split()):
        ivon_post(command, source, "--recommended", file, "-o", tmp_path / str(step))
        source = tmp_path / str(step)
    q = Posterior.from_pretrained(source)
    assert same(q, Posterior.from_pretrained(tiny_adapter).prune(0.4).temper(3))
    assert (q.tau, q.pruned_ratio) == (3, 0.4)


def test_sample(tiny_adapter: Path, out: Path, ivon_post: Cli) -> None:
    words = ("-n", 2, "--seed", 7, "--tau", 2, "--ratio", 0.3, "--include-mean", "-o", out)
    assert ivon_post("sample", tiny_adapter, *words).splitlines() == ["3 adapters, seed 7", str(out)]
    q = Posterior.from_pretrained(tiny_adapter).prune(0.3).temper(2)
    ensemble = json.loads((out / "ensemble.json").read_text())
    assert ensemble["members"] == ["mean", "sample-0000", "sample-0001"]
    found = [ensemble[name] for name in ("source", "seed", "tau", "pruned_ratio")]
    assert found == [str(tiny_adapter), 7, 2.0, 0.3]
    for name, expected in (("mean", dict(q.mean)), ("sample-0001", q.sample(7, 1))):
        saved = load_file(out / name / MEAN_FILE)
        assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_sample_takes_a_recommendation_and_tells_the_size_of_a_large_ensemble(
    tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sample", tiny_adapter, "-n", 2, "-o", out, "--overwrite"]
    assert " take " not in ivon_post.run(*words).stderr
    assert ivon_post.json(*words)["members"] == ["sample-0000", "sample-0001"]
    monkeypatch.setattr("ivon_post.sample._LARGE", 7000)
    words += ["--recommended", recommendation(tmp_path, tau="inf")]
    assert ivon_post.run(*words).stderr.splitlines() == [
        f"{tmp_path / 'recommended.json'} has no τ for draws; τ is 1",
        f"2 adapters take 7.17 kB in {out}",
    ]
    ensemble = json.loads((out / "ensemble.json").read_text())
    assert (ensemble["tau"], ensemble["pruned_ratio"]) == (1.0, 0.4)
    assert ivon_post.run(*words, "-q").stderr == ""


def test_merge_of_an_adapter_without_sigma(plain_adapter: Path, out: Path, ivon_post: Cli) -> None:
    from transformers import AutoModelForCausalLM

    assert ivon_post("merge", plain_adapter, "-o", out, "--dtype", "bfloat16") == f"{out}\n"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    for option in ("--ratio", "--sample-seed"):
        assert "it is no posterior" in ivon_post.error("merge", plain_adapter, "-o", f"{out}2", option, 0)


def test_merge_of_draws_and_pruned_means(tiny_adapter: Path, tmp_path: Path, ivon_post: Cli) -> None:
    file, weights = recommendation(tmp_path, tau=4.0, ratio=0.3), {}
    for name, words in {
        "mean": (),
        "pruned": ("--ratio", 0.9),
        "draw": ("--sample-seed", 1),
        "again": ("--sample-seed", 1),
        "other": ("--sample-seed", 2),
        "tempered": ("--sample-seed", 1, "--tau", 4, "--ratio", 0.3),
        "recommended": ("--sample-seed", 1, "--recommended", file),
        "pruned draw": ("--sample-seed", 1, "--prune-ratio", 0.3),
    }.items():
        ivon_post("merge", tiny_adapter, "-o", tmp_path / name, *words)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weights["draw"], weights.pop("again"))
    assert torch.equal(weights["tempered"], weights.pop("recommended"))
    names = list(weights)
    assert not any(torch.equal(weights[a], weights[b]) for i, a in enumerate(names) for b in names[:i])


def test_combine(
    tiny_adapter: Path, other_adapter: Path, make_adapter: Callable[..., Path], out: Path, ivon_post: Cli
) -> None:
    both = [Posterior.from_pretrained(tiny_adapter), Posterior.from_pretrained(other_adapter)]
    assert ivon_post("combine", tiny_adapter, other_adapter, "-o", out) == f"{out}\n"
    assert same(Posterior.from_pretrained(out), Posterior.combine(both))
    words = ("--method", "linear", "--weights", "0.2,0.8", "--overwrite", "-o", out)
    assert ivon_post.json("combine", tiny_adapter, other_adapter, *words)["method"] == "linear"
    assert same(Posterior.from_pretrained(out), Posterior.combine(both, "linear", [0.2, 0.8]))
    ivon_post("combine", tiny_adapter, make_adapter(r=8, seed=1), "--method", "cat", "-o", out, "--overwrite")
    document = ivon_post.json("info", out)
    assert (document["r"], document["weights"], document["header"]["combined"]) == (12, 3 * 896, "cat of 2")
