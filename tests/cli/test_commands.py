"""What each command prints and writes, on a small adapter; the numbers are the library's, tested with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from axolotl_ivon import Posterior

MEAN_FILE = "adapter_model.safetensors"


def same(a: Posterior, b: Posterior) -> bool:
    return all(torch.equal(a.mean[key], b.mean[key]) and torch.equal(a.sigma[key], b.sigma[key]) for key in a.mean)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def recommendation(folder: Path, **facts: object) -> Path:
    path = folder / "recommended.json"
    path.write_text(json.dumps({"tau": 3.0, "ratio": 0.4, **facts}))
    return path


# --- info -------------------------------------------------------------------------------------------------------


def test_info_shows_modules_facts_and_histogram(tiny_adapter: Path, ivon_post):
    text = ivon_post("info", tiny_adapter, "--ratio", 0.5)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0][:2] == ["module", "weights"]
    modules = [line for line in lines if line[0].startswith("model.layers")]
    assert [line[1] for line in modules] == ["256", "192", "256", "192"]
    assert ["weights", "896"] in lines
    assert ["prior", "empirical"] in lines
    assert "448 weights are 0 after pruning 0.5 by snr" in text
    bars = [line for line in text.splitlines() if "█" in line]
    assert bars
    shares = [float(line.split()[-1].rstrip("%")) for line in text.split("|m|/σ from\n")[1].splitlines()]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert "model.layers" not in ivon_post("info", tiny_adapter, "--summary")


def test_info_as_json(tiny_adapter: Path, ivon_post):
    facts = ivon_post.json("info", tiny_adapter)
    assert (facts["weights"], facts["would_prune"], len(facts["modules"])) == (896, 90, 4)
    assert facts["header"]["prior"] == "empirical"


def test_info_without_sigma(make_adapter: Callable, ivon_post):
    text = ivon_post("info", make_adapter(sigma=False))
    assert "`info` and `merge` work on it" in text
    assert "model.layers.1.self_attn.v_proj" in text


# --- prune ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"criterion": "magnitude"}, {"criterion": "random", "seed": 3}, {"scope": "tensor"}]
)
def test_prune(options: dict, tiny_adapter: Path, out: Path, ivon_post):
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    text = ivon_post("prune", tiny_adapter, "--ratio", 0.3, "-o", out, *words)
    assert text.splitlines()[-1] == str(out)
    q = Posterior.from_pretrained(out)
    assert same(q, Posterior.from_pretrained(tiny_adapter).prune(0.3, **options))
    assert text.startswith(f"{sum(q.pruned().values())} of 896 weights are 0")


def test_prune_as_json_and_its_default(tiny_adapter: Path, out: Path, ivon_post):
    facts = ivon_post.json("prune", tiny_adapter, "-o", out)
    expected = {"output": str(out), "ratio": 0.1, "criterion": "snr", "scope": "adapter", "pruned": 90, "weights": 896}
    assert facts == expected


def test_prune_takes_a_recommendation(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post):
    file = recommendation(tmp_path)
    assert ivon_post.json("prune", tiny_adapter, "-o", out, "--recommended", file)["ratio"] == 0.4
    again = ivon_post.json("prune", tiny_adapter, "-o", out, "--overwrite", "--recommended", file, "--ratio", 0.2)
    assert again["ratio"] == 0.2


# --- temper -----------------------------------------------------------------------------------------------------


def test_temper(tiny_adapter: Path, out: Path, ivon_post):
    assert ivon_post("temper", tiny_adapter, "--tau", 2.5, "-o", out).splitlines() == ["τ is 2.5", str(out)]
    assert same(Posterior.from_pretrained(out), Posterior.from_pretrained(tiny_adapter).temper(2.5))
    assert (out / MEAN_FILE).stat().st_size > 0
    assert ivon_post.json("temper", out, "--tau", 2, "-o", out.parent / "more")["tau"] == "5.0"


def test_temper_to_the_mean(tiny_adapter: Path, out: Path, ivon_post):
    ivon_post("temper", tiny_adapter, "--tau", "inf", "-o", out)
    q = Posterior.from_pretrained(out)
    assert q.tau == math.inf
    assert not any(sigma.any() for sigma in q.sigma.values())


# --- sample -----------------------------------------------------------------------------------------------------


def test_sample(tiny_adapter: Path, out: Path, ivon_post):
    words = ("-n", 2, "--seed", 7, "--tau", 2, "--prune-ratio", 0.3, "--dtype", "bfloat16", "--include-mean", "-o", out)
    assert ivon_post("sample", tiny_adapter, *words).splitlines() == ["3 adapters, seed 7", str(out)]
    q = Posterior.from_pretrained(tiny_adapter).prune(0.3).temper(2)
    facts = json.loads((out / "ensemble.json").read_text())
    assert facts["members"] == ["mean", "sample-0000", "sample-0001"]
    assert (facts["source"], facts["seed"], facts["tau"], facts["pruned_ratio"]) == (str(tiny_adapter), 7, 2.0, 0.3)
    for name, expected in (("mean", dict(q.mean)), ("sample-0001", q.sample(7, 1))):
        saved = load_file(out / name / MEAN_FILE)
        assert all(torch.equal(saved[key], expected[key].bfloat16()) for key in expected)


def test_sample_takes_a_recommendation(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post):
    ivon_post("sample", tiny_adapter, "-n", 1, "-o", out, "--recommended", recommendation(tmp_path, tau="inf"))
    facts = json.loads((out / "ensemble.json").read_text())
    assert (facts["tau"], facts["pruned_ratio"]) == ("inf", 0.4)
    assert ivon_post.json("sample", tiny_adapter, "-n", 1, "-o", out, "--overwrite")["members"] == ["sample-0000"]


# --- merge, combine, diff ---------------------------------------------------------------------------------------


def test_merge(make_adapter: Callable, out: Path, ivon_post):
    from transformers import AutoModelForCausalLM

    folder = make_adapter(sigma=False)
    assert ivon_post("merge", folder, "-o", out, "--dtype", "bfloat16") == f"{out}\n"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    for option in ("--prune-ratio", "--sample-seed"):
        assert "it is no posterior" in ivon_post.error("merge", folder, "-o", f"{out}2", option, 0)


def test_merge_of_draws_and_pruned_means(tiny_adapter: Path, out: Path, tmp_path: Path, ivon_post):
    weights = {}
    for name, words in {
        "mean": (),
        "pruned": ("--prune-ratio", 0.9),
        "draw": ("--sample-seed", 1),
        "again": ("--sample-seed", 1),
        "other": ("--sample-seed", 2),
    }.items():
        ivon_post("merge", tiny_adapter, "-o", tmp_path / name, *words)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(weights["draw"], weights.pop("again"))
    names = list(weights)
    assert not any(torch.equal(weights[a], weights[b]) for i, a in enumerate(names) for b in names[:i])


def test_combine(tiny_adapter: Path, make_adapter: Callable, out: Path, ivon_post):
    other = make_adapter(seed=1)
    both = [Posterior.from_pretrained(tiny_adapter), Posterior.from_pretrained(other)]
    assert ivon_post("combine", tiny_adapter, other, "-o", out) == f"{out}\n"
    assert same(Posterior.from_pretrained(out), Posterior.combine(both))
    words = ("--method", "linear", "--weights", "0.2,0.8", "--overwrite", "-o", out)
    assert ivon_post.json("combine", tiny_adapter, other, *words)["method"] == "linear"
    assert same(Posterior.from_pretrained(out), Posterior.combine(both, "linear", [0.2, 0.8]))


def test_combine_by_concatenation_is_an_adapter_again(tiny_adapter: Path, make_adapter: Callable, out: Path, ivon_post):
    ivon_post("combine", tiny_adapter, make_adapter(r=8, seed=1), "--method", "cat", "-o", out)
    facts = ivon_post.json("info", out)
    assert (facts["r"], facts["weights"], facts["header"]["combined"]) == (12, 3 * 896, "cat of 2")


def test_diff(tiny_adapter: Path, make_adapter: Callable, ivon_post):
    other = make_adapter(seed=1)
    text = ivon_post("diff", tiny_adapter, other)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert [line[0] for line in lines] == [
        "module",
        *(f"model.layers.{i}.self_attn.{n}_proj" for i in "01" for n in "qv"),
        "all",
    ]
    facts = ivon_post.json("diff", tiny_adapter, other)
    assert facts["weights"] == 896
    assert float(lines[-1][2]) == pytest.approx(facts["kl_ab"], rel=5e-3)
    assert facts["kl_ab"] == pytest.approx(sum(row["kl_ab"] for row in facts["modules"]))
