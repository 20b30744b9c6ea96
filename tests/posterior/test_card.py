"""Model cards, read back by huggingface_hub: they hold for the posterior beside them, and keep what others wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import EvalResult
from hypothesis import given
from hypothesis import strategies as st
from peft import set_peft_model_state_dict
from tiny import build_classifier, with_sigma

from axolotl_ivon import Posterior
from axolotl_ivon.posterior.card import TAGS, section, update_card, with_posterior

HEADER = {"ess": "27386.1", "gamma": "5000.0", "train_size": "30", "beta2": "0.9995", "steps": "6", "tau": "1.0"}
CONFIG = {"base_model_name_or_path": "someone/base"}


def another(q: Posterior) -> Posterior:
    return Posterior({key: value + 1 for key, value in q.mean.items()}, q.sigma, q.metadata, q.config)


def load(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


@pytest.fixture
def folder(tiny_adapter: Path, copied: Callable[..., Path]) -> Path:
    """An adapter with PEFT's card, in which somebody wrote, and what was told of the posterior after training."""
    folder = copied(tiny_adapter)
    card = load(folder)
    card.data.license, card.text = "mit", card.text + "\nSomebody's own words.\n"
    card.data.model_name = "x"
    card.data.eval_results = [EvalResult("text-generation", "theirs/data", "Theirs", "accuracy", 0.7)]
    card.save(folder / "README.md")
    update_card(folder)
    return folder


def test_a_card_keeps_what_others_wrote(folder: Path, tiny_adapter: Path) -> None:
    before, after = load(tiny_adapter), load(folder)
    assert set(after.data.tags) == {*(before.data.tags or ()), *TAGS}
    assert (after.data.license, after.data.eval_results[0].metric_value) == ("mit", 0.7)
    changed = {"tags", "license", "model-index"}
    kept = [{k: v for k, v in card.data.to_dict().items() if k not in changed} for card in (before, after)]
    assert kept[0] == kept[1]
    assert after.text.startswith(before.text.rstrip())
    for part in (
        "Somebody's own words.",
        "| effective sample size λ | 1,000 |",
        "| prior | empirical |",
        "| steps | 10 |",
        "| γ, of λ = γ·√N | 100 |",
        "β2 remembers 2,000 steps and the run had 10",
        "AutoPeftModelForCausalLM.from_pretrained",
        "posterior.sample(seed=0)",
        "--serve vllm",
    ):
        assert part in after.text
    content, stamp = (folder / "README.md").read_bytes(), (folder / "README.md").stat().st_mtime_ns
    update_card(folder)
    assert ((folder / "README.md").read_bytes(), (folder / "README.md").stat().st_mtime_ns) == (content, stamp)


@pytest.mark.parametrize(
    ("advice", "words"),
    [
        ({"tau": "inf", "temperature": 1.3}, "Recommended, by nll on v.jsonl: the mean with T 1.3; on examples that"),
        ({"tau": 2.0, "temperature": 0.8, "adapter_tau": 2.0, "samples": 3}, "draws at τ 2 with T 0.8"),
        ({"tau": 1.0, "ratio": 0.5, "samples": 2}, "draws at τ 1 with pruning ratio 0.5"),
        ({"tau": "inf", "ratio": 0.5}, "the mean with pruning ratio 0.5"),
    ],
)
def test_the_code_for_what_is_recommended_does_it(
    advice: dict[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = Posterior.from_pretrained(folder)
    own = {"ratio": 0.0, "mean_sha256": posterior.metadata["mean_sha256"], "objective": "nll", "data": ["a/v.jsonl"]}
    own |= {"reported_on": {"accuracy": 0.8, "nll": 0.5, "se": {"accuracy": 0.03}}}
    (folder / "recommended.json").write_text(json.dumps({**own, **advice}))
    update_card(folder)
    text = load(folder).text
    assert words in text
    assert "had no part in the choice: NLL 0.500, accuracy 80.0 ± 3.0 %." in text

    monkeypatch.chdir(folder)
    here: dict[str, Any] = {"inputs": {"input_ids": torch.tensor([[3, 4, 5]])}}
    load_it, predict, *_ = re.findall("```python\n(.*?)```", text, re.DOTALL)
    exec(load_it, here)
    exec(predict, here)
    ratio, samples = advice.get("ratio", 0.0), advice.get("samples", 1)
    changed = posterior.prune(ratio).temper(float(advice["tau"]) * advice.get("adapter_tau", 1.0))
    total = torch.zeros(())
    for member in range(samples):
        set_peft_model_state_dict(here["model"], changed.sample(0, member))
        total = total + here["model"](**here["inputs"]).logits.softmax(-1)
    expected = (total / samples).pow(1 / advice.get("temperature", 1.0))
    torch.testing.assert_close(here["probabilities"], expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_the_code_for_a_classifier_loads_its_head(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model says two labels, and PEFT does not resize the head by itself."""
    folder = with_sigma(build_classifier(tiny_llama, tmp_path / "head"))
    update_card(folder)
    Posterior.from_pretrained(folder).temper(2).save_pretrained(tmp_path / "tempered")
    monkeypatch.chdir(folder)
    load_it, *_ = re.findall("```python\n(.*?)```", load(folder).text, re.DOTALL)
    assert load_it in load(tmp_path / "tempered").text
    here: dict[str, Any] = {}
    exec(load_it, here)
    assert here["model"](input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3)


@given(
    st.text(max_size=200),
    st.sampled_from(
        ["", "---\nlanguage: en\n---\n", "---\r\ntags: x\r\n---\r\n", "---\n", "---\ntags: 1\nmodel-index: [3]\n---\n"]
    ),
)
def test_any_text_is_kept_around_the_section(text: str, front: str) -> None:
    once = with_posterior(front + text, HEADER, CONFIG)
    assert with_posterior(once, HEADER, CONFIG) == once
    assert section(HEADER, CONFIG) in once
    assert text.strip().partition("---")[0].rstrip() in once
    other = with_posterior(once, {**HEADER, "tau": "2.0"}, CONFIG)
    assert with_posterior(other, HEADER, CONFIG) == once


@pytest.mark.parametrize(
    ("change", "words", "same_mean"),
    [
        (lambda q: q, "| share of weights pruned | 0 |", True),
        (lambda q: q.temper(4), "temperature τ, by which σ is divided as √τ | 4 |", True),
        (lambda q: replace(q, metadata={**q.metadata, "tau": "95.4", "training_tau": "95.4"}), "| 95.4 |", True),
        (lambda q: q.prune(0.25), "| share of weights pruned | 0.25 |", False),
        (lambda q: Posterior.combine([q, another(q)]), "| effective sample size λ | 2,000 |", False),
    ],
    ids=["same", "tempered", "tempered in training", "pruned", "combined"],
)
def test_what_is_made_of_an_adapter_has_a_card_that_is_true(
    change: Callable[[Posterior], Posterior], words: str, same_mean: bool, folder: Path, tmp_path: Path
) -> None:
    posterior = Posterior.from_pretrained(folder)
    made = change(posterior)
    made.save_pretrained(tmp_path / "out")
    card = load(tmp_path / "out")
    assert words in card.text
    assert card.text.count("## Posterior") == 1
    assert "Somebody's own words." in card.text
    assert set(card.data.tags) >= set(TAGS)
    assert bool(card.data.eval_results) == same_mean, "results of others belong to the mean"
    assert ("It was changed after training" in card.text) == (made.tau != made.training_tau or made.pruned_ratio > 0)
    assert ("the rest of this card is that of the first" in card.text) == ("combined" in made.metadata)
    update_card(tmp_path / "out")
    assert load(tmp_path / "out").text == card.text


@pytest.mark.parametrize("text", [None, "---\nlanguage: [en\n---\n<!-- ivon: begin -->\n<!-- ivon: end -->\n"])
def test_a_card_without_our_section_or_damaged_goes_along_as_it_is(
    text: str | None, tiny_adapter: Path, copied: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied(tiny_adapter)
    if text:
        (folder / "README.md").write_text(text)
    Posterior.from_pretrained(folder).prune(0.5).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
