"""benchmarks/fidelity: the methods against closed forms, the plan and the tables from made-up results."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from texts import two_classes as examples
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from axolotl_ivon import IVONLoRA
from axolotl_ivon.fitting import ivon
from axolotl_ivon.metrics.calibration import fit_temperature
from axolotl_ivon.settings.presets import PRESETS
from benchmarks.fidelity import data as fidelity_data
from benchmarks.fidelity import methods, rows
from benchmarks.fidelity import page as pages
from benchmarks.fidelity import run as fidelity
from benchmarks.fidelity.__main__ import PAGES
from benchmarks.fidelity.blocks import BlockIVON, Correlated
from benchmarks.fidelity.causal import Causal
from benchmarks.fidelity.configs import HUB, as_chat, write_configs
from benchmarks.fidelity.data import Encoder, Example, Task, collate, labels_of, predict, training_batches
from benchmarks.fidelity.methods import TRAINERS, BlobLinear, Predictions, as_posterior, kl_weight, predict_posterior
from benchmarks.fidelity.report import Results, cell, main_table, report, verdict_table
from benchmarks.temperature import RULES, measure

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SUITES = yaml.safe_load((BENCHMARKS / "fidelity/experiments.yaml").read_text(encoding="utf-8"))["suites"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def encoder(folder: Path, dropout: float = 0.1) -> Any:
    return Encoder(folder, 2, 0, 2, ["query", "value"], dropout, 2)


def task(**sets: Any) -> Any:
    return Task(**{"train": examples(32), "validation": [], "test": [], "shifted": {}, "classes": 2, **sets})


SETTINGS = {
    "steps": 6, "batch": 4, "seed": 0, "lr": 1e-2, "gamma": 50, "h0": 0.05, "clip": 0.01, "beta2": 0.999,
    "weight_decay": 1e-4, "width": 0.05, "kl_lr": 0.02, "prior_sigma": 0.2,
}  # fmt: skip


def test_encoder_equals_the_model_that_it_shortens(bert: Path) -> None:
    model = encoder(bert).eval()
    for name, value in model.trained().items():
        if "lora_B" in name:
            nn.init.normal_(value)
    batch = collate(examples(5))
    expected = model.peft(input_ids=batch["input_ids"], attention_mask=batch["mask"].long()).logits
    torch.testing.assert_close(model(batch), expected)
    torch.testing.assert_close(predict(model, examples(5), size=2), expected.double(), atol=1e-6, rtol=1e-5)
    assert {name.split(".layer.")[1][0] for name in model.trained() if "lora_B" in name} == {"1", "2"}
    frozen = model.freeze(examples(5), size=2)
    torch.testing.assert_close(model(collate(frozen)), expected)
    torch.testing.assert_close(model({**collate(frozen), "input_ids": batch["input_ids"] + 1}), expected)  # unread then


def causal(folder: Path, choices: Sequence[int]) -> Any:
    """A tiny Llama with LoRA, that is not 0, on the upper two of four layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    model = Causal(folder, choices, 0, 2, ["q_proj", "v_proj"], 0.1, 2, torch.float32).eval()
    for name, value in model.trained().items():
        if "lora_B" in name:
            nn.init.normal_(value)
    return model


def test_causal_equals_transformers_and_the_kept_trunk_changes_nothing(tmp_path: Path) -> None:
    model = causal(tmp_path, [7, 9])
    assert {name.split(".layers.")[1][0] for name in model.trained()} == {"2", "3"}
    texts = [*examples(4), Example([0, 3, 0, 5], 1)]  # 0 is a token as any other: Qwen's "!"
    batch = collate(texts)
    ids, mask = batch["input_ids"], batch["mask"].long()
    whole = model.peft(input_ids=ids, attention_mask=mask).logits
    expected = whole[torch.arange(5), mask.sum(1) - 1][:, [7, 9]]
    torch.testing.assert_close(model(batch), expected)
    kept = collate(model.freeze(texts, size=2))
    torch.testing.assert_close(model(kept), expected)
    of_batch, of_kept, of_whole = (
        torch.autograd.grad(F.cross_entropy(logits, batch["labels"]), list(model.trained().values()))
        for logits in (model(batch), model(kept), expected)
    )
    torch.testing.assert_close(of_batch, of_whole)
    torch.testing.assert_close(of_kept, of_whole)


def test_of_an_answer_every_token_is_a_class(tmp_path: Path) -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1 + words.index(word) for word in text.split()]}

    words = ["Negative", "Positive", "review:", "so", "good", "a", "film", "dull"]
    rows = [("so good a film", 1), ("a dull film", 0), ("film", 1), ("so so so so so so", 0)]
    texts, tokens = fidelity_data._written(Words(), rows, 6)
    assert tokens == (4, 5, 6, 7, 8)
    assert texts[0] == Example([2, 3, 4, 5, 6], 1, answer=(0, 1, 2, 3))  # all but the last word, and what follows each
    assert len(texts) == 3
    assert labels_of(texts).tolist() == [0, 1, 2, 3, 2, 4, 3, 3]

    model = causal(tmp_path, tokens)
    logits = [model.peft(input_ids=torch.tensor([text.ids])).logits[0, -len(text.answer) :] for text in texts]
    expected = torch.cat(logits)[:, list(tokens)]
    torch.testing.assert_close(model(collate(texts)), expected)
    torch.testing.assert_close(predict(model, model.freeze(texts), size=2), expected.double())


def test_training_batches_hold_every_example_once_an_epoch() -> None:
    texts = examples(10)
    batches = training_batches(texts, 4, seed=3)
    for _ in range(2):
        seen = [tuple(row[row != 0].tolist()) for _ in range(3) for row in next(batches)["input_ids"]]
        assert sorted(seen) == sorted(tuple(text.ids) for text in texts)


def test_questions_become_pairs_of_the_answer_and_another_choice(tmp_path: Path) -> None:
    prompt = "Select one of the choices that answers the following question: {} Choices: {} Answer:"
    rows = [
        ("The most reasonable goal of 'Dig. A. hole' is", "A. Plant Trees B. Fly to A.B. C. Swim", "A"),
        ("Is it so?", "A. No B. Yes C. Well", "B"),
    ]
    path = tmp_path / "made.train.jsonl"
    with path.open("w") as file:
        for question, choices, answer in rows:
            messages = [{"content": prompt.format(question, choices)}, {"content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    assert fidelity_data._choices(path) == [(rows[0][0], 0), ("Is it so?", 1)]
    pairs = fidelity_data._pairs(path)
    assert {text for text, label in pairs if label} == {"Dig. A. hole: Plant Trees", "Is it so?: Yes"}
    wrong = {"Dig. A. hole": {"Fly to A.B.", "Swim"}, "Is it so?": {"No", "Well"}}
    found = [text.split(": ") for text, label in pairs if not label]
    assert len(found) == 2
    assert all(choice in wrong[question] for question, choice in found)


def test_a_snippet_may_be_asked_for_its_source_or_its_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ratings 0.1 to 3.9 of either sign; 0.1, 0.3 and 0.4 are near zero, so the median distance is that of the others.
    rated = [(sign * size / 10, f"{size} {sign}") for size in (1, 3, 4, *range(6, 40)) for sign in (1, -1)]
    sizes = {"movieReviewSnippets": 68, "amazonReviewSnippets": 40, "nytEditorialSnippets": 50, "tweets": 60}
    monkeypatch.setattr(
        fidelity_data.prepare_demo,
        "read_snippets",
        lambda sdist, name: [(rating, f"{name} {text}") for rating, text in rated[: sizes[name] + 6]],
    )
    strengths = dict(fidelity_data._snippets(Path("sdist"), "movieReviewSnippets", strength=True))
    assert len(strengths) == 68
    middle = (22 + 23) / 2  # of 6 to 39
    assert all(label == (int(text.split()[1]) > middle) for text, label in strengths.items())
    signs = dict(fidelity_data._snippets(Path("sdist"), "movieReviewSnippets"))
    assert all(label == (text.split()[2] == "1") for text, label in signs.items())
    sources = fidelity_data._sources(Path("sdist"))
    names = list(sizes)
    assert all(names[label] == text.split()[0] for text, label in sources)
    assert [sum(label == i for _, label in sources) for i in range(4)] == [40] * 4
    assert sources != sorted(sources, key=lambda row: row[1])


def test_blob_kl_is_that_of_torch_distributions() -> None:
    torch.manual_seed(1)
    layer = BlobLinear(nn.Linear(5, 3, bias=False), 0.05, torch.Generator().manual_seed(0))
    q = torch.distributions.Normal(layer.weight, layer.g.square())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 0.2)).sum()
    torch.testing.assert_close(layer.kl(0.2), expected)


def test_blob_flipout_has_the_moments_of_a_draw_of_the_weights() -> None:
    torch.manual_seed(2)
    layer = BlobLinear(nn.Linear(4, 2, bias=False), 0.9, torch.Generator().manual_seed(0)).train()
    x = torch.randn(1, 1, 4).expand(1, 2, 4)  # two tokens, whose noise is independent
    with torch.no_grad():
        noise = torch.stack([layer(x) for _ in range(20000)]) - F.linear(x, layer.weight)
        variance = F.linear(x.square(), layer.g.square().square())
    torch.testing.assert_close(noise.mean(0), torch.zeros(1, 2, 2), atol=4 * variance.max().sqrt().item() / 141, rtol=0)
    torch.testing.assert_close(noise.var(0), variance, atol=0, rtol=0.06)
    assert abs(torch.corrcoef(noise[:, 0, :, 0].T)[0, 1]) < 0.06
    torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.weight))


@pytest.mark.parametrize("cycle", [1, 3, 10])
def test_kl_weights_of_a_cycle_double_and_sum_to_one_less_the_first_term(cycle: int) -> None:
    weights = [kl_weight(step, cycle) for step in range(2 * cycle)]
    assert weights[:cycle] == weights[cycle:]
    assert weights[0] * 2 ** (cycle - 1) == pytest.approx(weights[cycle - 1])
    # The paper's 2^i / (2^(M+1) − 1), i = 0 … M, sums to 1; i = 0 is not used.
    assert sum(weights[:cycle]) == pytest.approx(1 - 1 / (2 ** (cycle + 1) - 1))


def test_scaling_the_average_of_equal_draws_is_scaling_the_weights_themselves(bert: Path) -> None:
    model = encoder(bert).eval()
    q, data = as_posterior(model.trained()), task(validation=examples(40))
    temperature = fit_temperature(predict(model, data.validation).softmax(-1), labels_of(data.validation))
    expected = (predict(model, examples(9)) / temperature).softmax(-1)
    for row in (rows.posterior_scaled, rows.temperature_scaling):
        ours, facts = row(model, q, data, examples(9), 3)
        assert facts["temperature"] == pytest.approx(temperature, rel=1e-3)
        torch.testing.assert_close(ours.probabilities, expected, atol=1e-4, rtol=0)


def test_draws_are_made_once_for_a_run_and_anew_for_another(bert: Path) -> None:
    model, texts = encoder(bert).eval(), examples(9)
    mean = {name: value.detach() for name, value in model.trained().items()}
    wide, narrow = (as_posterior(mean, {k: torch.full_like(v, s) for k, v in mean.items()}) for s in (0.3, 0.1))
    for q in (wide, narrow, wide):
        for tau, draws in ((1.0, 2), (4.0, 2), (1.0, 3), (math.inf, 0)):
            ours = rows.drawn(model, q, texts, draws, tau)
            expected = predict_posterior(model, q.temper(tau) if draws else q, texts, draws)
            torch.testing.assert_close(ours.probabilities, expected.probabilities)
            assert rows.drawn(model, q, texts, draws, tau) is ours


@pytest.mark.parametrize(("right", "temperature"), [(200, 0.3), (150, 1.0)])
def test_the_end_of_training_recommends_the_mean_at_a_temperature_that_helps(
    right: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [replace(text, label=int(n >= right)) for n, text in enumerate(examples(200))]
    sure = torch.tensor([math.log(3), 0.0], dtype=torch.float64)  # of the first class, by 3 to 1
    monkeypatch.setattr(rows, "drawn", lambda *given: Predictions.of([sure.repeat(len(given[2]), 1)]))
    ours, facts = rows.calibrated(None, None, task(validation=texts), examples(9), 3)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.probabilities, (sure.repeat(9, 1) / facts["temperature"]).softmax(-1))
    assert (facts["tau"], facts["temperature"]) == (math.inf, pytest.approx(temperature, abs=0.05))
    assert (facts["temperature"] == 1) == (temperature == 1)


def test_rules_for_a_temperature_are_measured_on_what_had_no_part_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(900, 3, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    needed, not_needed = (measure((s * logits).log_softmax(1), target, 500, 4) for s in (4.0, 1.0))
    loss = torch.nn.functional.cross_entropy
    assert needed["never"] == pytest.approx(loss(4 * logits, target).item(), rel=0.1)
    for name in RULES.keys() - {"never"}:
        assert needed[name] == pytest.approx(loss(logits, target).item(), rel=0.05), name
        assert not_needed[name] == pytest.approx(not_needed["never"], rel=0.01), name


def test_averaged_predictions_and_their_entropy() -> None:
    logits = [torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(3), 0.0]])]
    found = Predictions.of(logits)
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(found.expected_entropy, torch.tensor([-0.25 * math.log(0.25) - 0.75 * math.log(0.75)]))


def test_learning_rate_from_travel_is_what_the_schedule_adds_up_to() -> None:
    rate = methods.learning_rate({"travel": 0.2}, 400, clip=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler, travelled = methods.schedule(optimizer, 400), 0.0
    for _ in range(400):
        travelled += 0.01 * optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    assert travelled == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("method", ["adamw", "lion", "ivon-lora", "algorithm-1", "ivon-opt", "blob"])
def test_every_method_trains_and_its_posterior_has_the_encoders_names(bert: Path, method: str) -> None:
    model = encoder(bert)
    names = set(model.trained())
    run = TRAINERS[method](model, task(), {**SETTINGS, **({"travel": 0.05} if method == "lion" else {})})
    sigma = dict(run.posterior.sigma)
    assert set(run.posterior.mean) == set(sigma) == names
    uncertain = {name for name, value in sigma.items() if (value > 0).all()}
    of_some = {"adamw": set(), "lion": set(), "blob": {name for name in names if "lora_A" in name}}
    assert uncertain == of_some.get(method, names)
    fresh = encoder(bert).trained()
    assert any(not torch.equal(value, fresh[name]) for name, value in dict(run.posterior.mean).items())
    assert run.state_bytes >= (4 if method == "lion" else 8) * sum(value.numel() for value in fresh.values())


def test_rank_correlations_are_over_all_weights_and_within_tensors() -> None:
    mean = {"a": torch.zeros(50), "b": torch.zeros(50), "c": torch.zeros(3)}
    low, high = torch.linspace(1, 2, 50), torch.linspace(10, 20, 50)
    one = as_posterior(mean, {"a": low, "b": high})
    other = as_posterior(mean, {"a": high.square(), "b": low.flip(0)})
    assert rows.rank_correlations(one, one) == pytest.approx(
        {"rank_correlation": 1, "rank_correlation_within_tensors": 1}
    )
    found = rows.rank_correlations(one, other)
    assert found["rank_correlation_within_tensors"] == pytest.approx(0)
    assert found["rank_correlation"] < -0.4
    assert rows.rank_correlations(one, as_posterior(mean)) == {}


@pytest.mark.parametrize("row", ["fit=ivon", "fit=fisher,validated", "fit=tfb,scaled"])
def test_sigma_is_fitted_around_the_weights(bert: Path, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivon, "FEWEST", 4)
    monkeypatch.setattr(ivon, "MOST", 4)
    model = encoder(bert).eval()
    with torch.no_grad():
        for value in model.trained().values():
            value.add_(torch.randn_like(value) * 0.1)
    q = methods.as_posterior(model.trained())
    task = Task(examples(24), examples(12, 1), examples(12, 2), {}, 2)
    before = {name: value.clone() for name, value in model.trained().items()}
    found, facts = rows.ROWS["fit"](model, q, task, task.test, 2, row.partition("=")[2])
    assert found.probabilities.shape == (12, 2)
    assert facts["fit_seconds"] >= 0
    assert all(value.equal(before[name]) for name, value in model.trained().items())
    [(_, (posterior, _))] = rows._FITS.values()
    widths = {name: value for name, value in posterior.sigma.items() if "tfb" not in row or "lora_A" in name}
    assert all((value > 0).all() for value in widths.values())


def test_ivon_lora_with_a_fixed_prior_moves_as_ivon_opt_does(bert: Path) -> None:
    # σ as good as 0 and a precision that stands still: what the draws change is then lost in rounding.
    settings = {**SETTINGS, "gamma": 1e11, "prior": 1e-4, "beta2": 1 - 1e-12}
    means = []
    for method in ("ivon-lora", "ivon-opt"):
        torch.manual_seed(0)
        means.append(dict(TRAINERS[method](encoder(bert, dropout=0.0), task(), settings).posterior.mean))
    torch.testing.assert_close(*means, atol=2e-6, rtol=1e-3)


class Recorded:
    """In place of a learning curve: the trained weights after every step."""

    def __init__(self, model: nn.Module, *_: Any) -> None:
        self.model, self.after = model, list[dict[str, torch.Tensor]]()
        self.points, self.seconds = list[Any](), 0.0
        Recorded.last = self

    last: Recorded

    def __call__(self, step: int) -> None:
        self.after.append({name: value.detach().clone() for name, value in self.model.trained().items()})


def test_the_last_means_are_averaged(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "Curve", Recorded)
    model = encoder(bert)
    run = methods.train_ivon_auto(model, task(), {**SETTINGS, "steps": 8, "averaged": 0.25})
    *_, before, last = Recorded.last.after
    for name, value in dict(run.posterior.mean).items():
        torch.testing.assert_close(value, (before[name] + last[name]) / 2)
    assert any(not torch.equal(before[name], last[name]) for name in last)


@pytest.mark.parametrize("antithetic", [False, True])
def test_micro_batches_see_one_draw_or_also_its_mirror_image(
    bert: Path, antithetic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "Curve", Recorded)
    model = encoder(bert, dropout=0.0)
    before = {name: value.detach().clone() for name, value in model.trained().items()}
    seen = []

    def record(*_: Any) -> None:
        seen.append({name: value.detach().clone() for name, value in model.trained().items()})

    model.register_forward_pre_hook(record)
    settings = {**SETTINGS, "steps": 2, "accumulate": 2, "one_draw": True, "antithetic": antithetic}
    methods.train_ivon_auto(model, task(), settings)
    assert len(seen) == 4
    for mean, (one, other) in zip([before, Recorded.last.after[0]], [seen[:2], seen[2:]], strict=True):
        for name, value in mean.items():
            expected = 2 * value - one[name] if antithetic else one[name]
            torch.testing.assert_close(other[name], expected, rtol=0, atol=2e-6)
            assert not torch.equal(one[name], value)


@pytest.mark.parametrize("gradients", ["flat", "mean"])
def test_gradients_are_taken_at_draws_of_one_width_or_at_the_mean(
    bert: Path, gradients: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a σ that is told, of which the flat one is the root mean square, and by the draw of a run that is as usual."""
    told: dict[torch.Size, torch.Tensor] = {}

    def sigma(_: Any, value: torch.Tensor) -> torch.Tensor:
        return told.setdefault(value.shape, torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) + 0.5)

    monkeypatch.setattr("axolotl_ivon.IVONLoRA.sigma", sigma)
    seen = []
    for own in ({}, {"gradients": gradients}):
        model = encoder(bert, dropout=0.0)
        before = {name: value.detach().clone() for name, value in model.trained().items()}
        model.register_forward_pre_hook(
            lambda module, _: seen.append({name: value.detach().clone() for name, value in module.trained().items()})
        )
        methods.train_ivon_auto(model, task(), {**SETTINGS, "steps": 1, **own})
    draw, found = seen
    for name, mean in before.items():
        wide = told[mean.shape]
        flat = mean + (draw[name] - mean) / wide * float(wide.square().mean()) ** 0.5
        torch.testing.assert_close(found[name], flat if gradients == "flat" else mean, rtol=1e-4, atol=1e-6)
        assert not torch.equal(found[name], draw[name])


def test_early_stopping_keeps_the_weights_of_the_lowest_validation_loss(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.4, 0.6])
    monkeypatch.setattr(methods.Curve, "measure", lambda *_: {"accuracy": 0.5, "nll": next(losses), "ece": 0.1})
    seen: list[dict[str, torch.Tensor]] = []

    def watched(*arguments: Any, after_step: Any, **options: Any) -> float:
        def after(step: int) -> None:
            after_step(step)
            seen.append({name: value.detach().clone() for name, value in arguments[0].trained().items()})

        return loop(*arguments, after_step=after, **options)

    loop = methods.loop
    monkeypatch.setattr(methods, "loop", watched)
    settings = {**SETTINGS, "steps": 3, "curve": 3, "keep_best": True, "lr": 0.01}
    kept = dict(methods.train_adamw(encoder(bert), task(validation=examples(4)), settings).posterior.mean)
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())
    assert any(not torch.equal(kept[name], value) for name, value in seen[2].items())


def of_rank(rank: int) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"A": nn.Parameter(torch.randn(rank, 5)), "B": nn.Parameter(torch.randn(6, rank))}


def test_blocks_of_rank_one_are_ivon_lora() -> None:
    # λ so large that the draws are the mean, but for rounding, and κ so that the prior has its share of p.
    shared = {"lr": 0.1, "ess": 1e12, "h0": 0.3, "clip": 0.5, "prior_strength": 1e11, "h0_steps": 10.0, "seed": 0}
    target = torch.randn(6, 5)
    found = []
    for name in ("blocks", "diagonal"):
        parameters = of_rank(1)
        optimizer: Any = (
            BlockIVON(parameters, beta2=0.9, **shared)
            if name == "blocks"
            else IVONLoRA(parameters.items(), betas=(0.9, 0.9), hessian="squared_gradients", batch_size=7, **shared)
        )
        optimizer.param_groups[0]["batch_size"] = 7
        for _ in range(5):
            with optimizer.sampled_params():
                (parameters["B"] @ parameters["A"] - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        q = optimizer.posterior() if name == "blocks" else None
        mean = {key: q.mean[key] if q else optimizer.mean(value) for key, value in parameters.items()}
        sigma = {key: q.sigma[key] if q else optimizer.sigma(value) for key, value in parameters.items()}
        found.append((mean, sigma))
    torch.testing.assert_close(*found)


def test_draws_of_blocks_have_the_covariance_of_the_information() -> None:
    parameters = of_rank(2)
    optimizer = BlockIVON(
        parameters, lr=0.0, ess=50.0, beta2=0.5, h0=1.0, clip=1.0, prior_strength=0.1, h0_steps=1.0, seed=0
    )
    for value in parameters.values():
        value.grad = torch.randn(value.shape)
    optimizer.step()
    q = optimizer.posterior()
    expected = torch.linalg.inv(50 * optimizer.P)  # 5 columns of A, then 6 rows of B
    draws = [q.sample(0, member) for member in range(4000)]
    columns = torch.stack([draw["A"].T - q.mean["A"].T for draw in draws])
    rows = torch.stack([draw["B"] - q.mean["B"] for draw in draws])
    blocks = torch.cat([columns, rows], 1)
    covariance = torch.einsum("nbi,nbj->bij", blocks, blocks) / len(draws)
    variance = expected.diagonal(dim1=-2, dim2=-1)
    error = ((variance[:, :, None] * variance[:, None, :] + expected.square()) / len(draws)).sqrt()
    assert ((covariance - expected).abs() / error).max() < 5
    assert (expected[:, 0, 1].abs() / error[:, 0, 1]).max() > 15  # they are correlated
    torch.testing.assert_close(q.sigma["B"], expected[5:].diagonal(dim1=-2, dim2=-1).sqrt())


def test_correlated_draws_survive_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_read_task", lambda *_: task())
    monkeypatch.setattr(fidelity, "_model", lambda *_: causal(tmp_path / "model", [7, 9]))
    settings = fidelity.canonical({"trainer": "ivon-auto", "blocks": True, "steps": 2, "batch": 4, "seed": 0})
    places = fidelity.Places(tmp_path, None, tmp_path / "results.jsonl.gz", "abc", 2, "{}")
    model, q, facts = fidelity.trained("movie", settings, places)
    assert isinstance(q, Correlated)
    assert facts["ivon_ess"] == 250_000  # few examples, few weights
    drawn = q.sample(0, 1)
    assert drawn.keys() == model.trained().keys()
    for name, root in q.roots.items():
        away = (drawn[name] - q.mean[name]).abs()
        assert 0 < float(away.max()) < 6 * float(root.norm(dim=(1, 2)).max())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_losses_of_a_step_are_the_tokens_of_its_answers(
    tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Spied(methods.IVONLoRA):
        def step(self, closure: Any = None) -> Any:
            sizes.extend(group["batch_size"] for group in self.param_groups)
            return super().step(closure)

    monkeypatch.setattr(methods, "IVONLoRA", Spied)
    given = (([2, 3, 4, 5], 1, (0, 1, 2)), ([2, 3], 1, (0,)), ([2, 4], 0, (1, 2)))
    texts = [Example(ids, label, answer=answer) for ids, label, answer in given]
    settings = {**SETTINGS, "steps": 2, "batch": 3, "accumulate": accumulate}
    del settings["lr"]
    methods.train_ivon_auto(causal(tmp_path, [4, 5, 6]), task(train=texts), settings)
    assert sizes == [6, 6]


def suite() -> dict[str, Any]:
    return yaml.safe_load("""
steps: 4
batch: 4
rank: 2
targets: [query, value]
dropout: 0.1
upper: 2
max_tokens: 24
draws: 2
seeds: [0, 1]
domains: [amazon]
tasks: {movie: {source: movie, train: 16, validation: 8, test: 8, shifted: 8}}
methods:
  adamw: {trainer: adamw, grid: {lr: [0.1, 0.2]}, select: mean, choose_by: [nll, 0.1], rows: [mean, ensemble]}
  ivon-lora: {trainer: ivon-lora, grid: {gamma: [5, 50]}, lr: 0.1, select: posterior, rows: [mean, posterior]}
stages:
  - {tasks: [movie], methods: [adamw, ivon-lora], seeds: [0, 1]}
  - {ablation: [prior]}
ablations:
  prior: {task: movie, method: ivon-lora, seeds: [0], rows: [mean, tau=2], variants: [{}, {prior: 0.001}]}
""")


def record(job: Any, row: str, data: str, facts: dict[str, Any], **metrics: float) -> dict[str, Any]:
    return {"run": job.key, "row": row, "data": data, "metrics": metrics, "facts": facts}


def finish(jobs: list[Any], records: list[dict[str, Any]], losses: dict[float, float] | None = None) -> None:
    """Pretend to run jobs: the NLL is that of the grid's value, plus a hundredth for each seed."""
    for job in jobs:
        settings = json.loads(job.settings)
        value = settings["gamma"] if job.method == "ivon-lora" else settings["lr"]
        nll = (losses or {}).get(value, 1.0) + 0.01 * settings["seed"]
        for row, data in job.rows:
            facts = {"train_seconds": 1.0, "state_mb": 0.5}
            records.append(record(job, row, data, facts, nll=nll, accuracy=nll / 2, ece=nll / 4))


def test_plan_chooses_on_validation_data_and_then_runs_all_seeds() -> None:
    records: list[dict[str, Any]] = []
    stages = fidelity.plan(suite(), records)
    grid = next(stages)
    assert [(job.method, json.loads(job.settings)["seed"]) for job in grid] == [
        ("adamw", 0), ("adamw", 0), ("ivon-lora", 0), ("ivon-lora", 0),
    ]  # fmt: skip
    assert all(("mean", "validation") in job.rows or ("posterior", "validation") in job.rows for job in grid)
    finish(grid, records, {0.1: 0.6, 0.2: 0.5, 5: 0.4, 50: 0.7})
    seeds = next(stages)
    # 0.2 has the lowest NLL; 0.1 is asked for.
    settings = [(job.method, json.loads(job.settings)) for job in seeds]
    chosen = {(method, s["lr"] if method == "adamw" else s["gamma"], s["seed"]) for method, s in settings}
    assert chosen == {
        (method, x, seed) for method, x in (("adamw", 0.2), ("adamw", 0.1), ("ivon-lora", 5)) for seed in (0, 1)
    }
    ensembles = [json.loads(job.settings)["seed"] for job in seeds if ("ensemble", "test") in job.rows]
    assert set(ensembles) == {1}
    finish(seeds, records, {0.1: 0.6, 0.2: 0.5, 5: 0.4, 50: 0.7})
    ablation = next(stages)
    assert [json.loads(job.settings).get("prior") for job in ablation] == [None, 0.001]
    assert {json.loads(job.settings)["gamma"] for job in ablation} == {5}
    # The default variant of the ablation is a run that the table has already.
    assert ablation[0].key in {record["run"] for record in records}
    assert fidelity.missing_rows(ablation[0], records) == [("tau=2", "test")]


@pytest.mark.parametrize("name", ["continual.jsonl", "grpo.jsonl", "influence.jsonl", "fidelity/results.jsonl.gz"])
def test_the_results_of_every_benchmark_are_read_and_continued(name: str, tmp_path: Path) -> None:
    records = fidelity.read_results(BENCHMARKS / name)
    assert records
    path = tmp_path / Path(name).name
    path.write_bytes((BENCHMARKS / name).read_bytes())
    fidelity.append(path, {"run": "a"})
    assert fidelity.read_results(path) == [*records, {"run": "a"}]


def test_results_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl.gz"
    assert fidelity.read_results(path) == []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: fidelity.append(path, {"run": "a", "row": row, "data": "test"}), ("mean", *"bcdefg")))
    assert sorted(record["row"] for record in fidelity.read_results(path)) == [*"bcdefg", "mean"]
    monkeypatch.setattr(fidelity.gzip, "compress", lambda *_, **__: b"cut short"[: 1 // 0])
    with pytest.raises(ZeroDivisionError):
        fidelity.append(path, {"run": "a", "row": "posterior", "data": "test"})
    assert len(fidelity.read_results(path)) == 7
    job = SimpleNamespace(key="a", rows=(("mean", "test"), ("mean", "amazon")))
    assert fidelity.missing_rows(job, fidelity.read_results(path)) == [("mean", "amazon")]  # type: ignore[arg-type]


def test_settings_that_decide_the_outcome_change_the_run() -> None:
    one = fidelity.settings_of(suite(), "movie", "adamw", 0, lr=0.1)
    assert fidelity.run_key(one) == fidelity.run_key(fidelity.settings_of(suite(), "movie", "adamw", 0, lr=0.1))
    assert fidelity.settings_of({**suite(), "steps": 5}, "movie", "adamw", 0, lr=0.1) != one
    assert fidelity.settings_of({**suite(), "draws": 20}, "movie", "adamw", 0, lr=0.1) == one


def test_tables_hold_means_and_standard_errors(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for jobs in fidelity.plan(suite(), records):
        finish(jobs, records, {0.1: 2.0, 0.2: 1.0, 5: 0.4, 50: 0.7})
    results = Results(suite(), records)
    # Seeds 0 and 1 have NLL 1.00 and 1.01: mean 1.005, standard error 0.01/√2/√2.
    assert results.values("nll", "movie", "adamw", "mean") == {0: 1.0, 1: pytest.approx(1.01)}
    assert cell([1.0, 1.01], "nll") == "1.005 ± 0.005"
    assert cell([0.5], "accuracy") == "50.0"
    assert "| AdamW | 1.005 ± 0.005 | 1.005 ± 0.005 |" in main_table(results)
    assert "| **IVON-LoRA, 10 draws** | 0.405 ± 0.005 | 0.405 ± 0.005 |" in main_table(results)
    lines = verdict_table(results).splitlines()
    name = "| IVON-LoRA, 10 draws: NLL |"
    assert any(line.startswith(name) and "0.40 of AdamW's" in line and line.endswith("| yes |") for line in lines)
    assert any("IVON-LoRA, mean: accuracy" in line and line.endswith("| no |") for line in lines)
    text = report(suite(), records, tmp_path)
    assert "prior 0.001" in text
    assert (tmp_path / "fidelity-methods.png").stat().st_size > 1000


def causal_records() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A suite of AdamW, the preset and signs, and results: AdamW's NLL is 1 at 2e-4 and 2 at 5e-4, the others' 0.8."""
    made = suite() | {"model": "SmolLM2-135M-Instruct"}
    made["methods"] = {
        "adamw": {
            "trainer": "adamw", "grid": {"lr": [2.0e-4, 5.0e-4]}, "select": "mean",
            "choose_by": ["nll", 2.0e-4, 5.0e-4], "rows": ["mean", "temperature-scaling", "ensemble"],
        },
        "ivon-auto": {
            "trainer": "ivon-auto", "grid": {"travel": [0.125]}, "select": "posterior",
            "rows": ["mean", "posterior"],
        },
        "ivon-adam": {
            "trainer": "ivon-auto", "direction": "adam", "grid": {"lr": [2.0e-4, 1.0e-3]}, "select": "mean",
            "choose_by": ["usual", 2.0e-4],
            "rows": ["mean", "posterior", "temperature-scaling", "sigma=as-is", "sigma=permuted"],
        },
    }  # fmt: skip
    made["stages"] = [{"tasks": ["movie"], "methods": ["adamw", "ivon-auto", "ivon-adam"], "seeds": [0, 1]}]
    made["ablations"] = {}
    records: list[dict[str, Any]] = []
    for jobs in fidelity.plan(made, records):
        for job in jobs:
            settings = json.loads(job.settings)
            of_adamw, usual = {2.0e-4: 1.0, 5.0e-4: 2.0}, settings.get("lr") in (None, 1.0e-3)
            nll = of_adamw[settings["lr"]] if job.method == "adamw" else 0.8 if usual else 0.9
            nll += 0.01 * settings["seed"]
            for row, data in job.rows:
                worse = 0.1 * (row == "sigma=permuted")
                metrics = {"nll": nll + worse, "accuracy": 0.5, "ece": nll / 4, "auroc": 0.8, "aurc": 0.1}
                points = [{"step": 1, "draws": metrics, **metrics}]
                facts = {"train_seconds": 1.0, "state_mb": 0.5, "curve": points}
                records.append(record(job, row, data, facts, **metrics))
    return made, records


def test_promises_are_held_against_each_baseline_by_their_own_margin() -> None:
    made, records = causal_records()
    results = Results(made, records)
    # 0.8 and 0.81 against 1 and 1.01 at the chosen rate, 1.5 and 1.51 over both: ratios of 1.61/2.01 and 1.61/3.01.
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in pages.promises(results).splitlines()[2:]]
    found = {(line[0].rpartition("AdamW")[2].split(",")[0], line[1]): line[3:] for line in lines}
    assert found[" at 2e-4 and 5e-4", "NLL"] == ["0.53", "yes"]
    assert found[" at 2e-4 and 5e-4", "ECE"] == ["0.53", "no"]
    assert found["", "NLL"] == ["0.80", "yes"]
    assert found["", "accuracy"] == ["+0.0 ± 0.0 points", "yes"]
    assert "+0.100 ± 0.000" in pages.shape(results)
    summary = pages.summary(results)
    assert "| AdamW, rate by validation | 50.0 ± 0.0 | 25.1 ± 0.1 | 1.005 ± 0.005 |" in summary
    assert "| **IVON-LoRA, untuned, mean** | 50.0 ± 0.0 | 20.1 ± 0.1 | 0.805 ± 0.005 |" in summary
    given = "| **IVON-LoRA, mean**, rate 2e-4 | 50.0 ± 0.0 | 22.6 ± 0.1 | 0.905 ± 0.005 |"
    assert given in summary
    headline = pages.headline(results)
    assert set(headline.splitlines()) < set(summary.splitlines())
    assert given not in headline
    assert "by signs" not in headline
    # One task, no other domains: 1 and 1.01 at the chosen rate, 0.8 and 0.81 of the draws, 0.2 apart in both seeds.
    [line] = pages.beyond(results).splitlines()[2:]
    assert line.startswith("| movie | draws | 1.005 → 0.805 (-0.200 ± 0.000) | 25.1 → 20.1 (-5.0 ± 0.0) |")
    ours, theirs = ([cell.strip() for cell in line.split("|")[1:-1]] for line in pages.work(results).splitlines()[2:])
    assert ours == ["signs at draws", "2", "50.0 ± 0.0", "0.805 ± 0.005", "–", "0.805 ± 0.005", "20.1 ± 0.1"]
    assert theirs == ["AdamW", "2", "50.0 ± 0.0", "1.005 ± 0.005", "1.005 ± 0.005", "–", "–"]
    calibrated = [{**r, "row": "calibrated"} for r in records if r["row"] == "mean" and r["data"] == "test"]
    change = "1.005 → 0.805 (-0.200 ± 0.000) | 50.0 → 50.0 (+0.0 ± 0.0)"
    [line] = pages.recommended(Results(made, [*records, *calibrated])).splitlines()[2:]
    assert line == f"| SmolLM2-135M, r 2 on q and v, movie, 4 steps, 1 epochs | none | 2 | {change} | wins |"
    for one in calibrated:
        one["metrics"] = {**one["metrics"], "accuracy": 0.4}
    [line] = pages.recommended(Results(made, [*records, *calibrated])).splitlines()[2:]
    assert line.endswith("| 50.0 → 40.0 (-10.0 ± 0.0) | no |")
    [line] = pages.peers(results).splitlines()[2:]  # an ensemble at the chosen rate, beside a mean of 0.805
    assert line.endswith("| movie | 50.0 (50.0 ± 0.0) | 25.2 (20.1 ± 0.1) | 1.010 (0.805 ± 0.005) | no |")
    # 4 steps of 4 are one epoch of 16; of twice the steps there are no results, and no line.
    longer = Results({**made, "steps": 8}, records)
    [line] = pages.training(results, longer).splitlines()[2:]
    changes = "1.005 → 0.805 | 25.1 → 20.1 | 50.0 → 50.0 | 1.005 → 0.805"
    assert line == f"| movie | 4 (1 epochs) | 2 | {changes} |"
    heads, _, first, *_ = pages.stage(results, longer).splitlines()
    assert heads == "| accuracy (%) / ECE (%) / NLL | SmolLM2-135M, movie, 1 epochs |"
    assert first == "| AdamW, rate by validation | 50.0 ± 0.0 / 25.1 ± 0.1 / 1.005 ± 0.005 |"
    assert "AdamW, rate 2e-4" not in pages.stage(results)  # which is what validation has chosen
    page = "a\n<!-- table: s summary -->\nold\n<!-- end of table -->\nb"
    assert pages.fill(page, {"s": made}, records) == page.replace("old", pages.summary(results))
    figure = pages.learning_curves(results, "ivon-adam", "usual")
    assert len(figure.axes) == 3
    assert "IVON-LoRA, untuned, mean" in {line.get_label() for line in figure.axes[0].lines}


def test_a_line_of_the_stage_has_run_on_half_of_the_tasks() -> None:
    made, records = causal_records()
    made["tasks"] |= {name: {**made["tasks"]["movie"], "train": size} for name, size in (("b", 8), ("c", 12))}
    made["stages"] = [{"tasks": ["b", "c"], "methods": ["ivon-adam"], "seeds": [0]}]
    for jobs in fidelity.plan(made, records):
        for job in jobs:
            records += [record(job, row, data, {}, nll=0.7, accuracy=0.5, ece=0.1) for row, data in job.rows]
    heads, _, *lines = pages.stage(Results(made, records)).splitlines()
    assert heads.count("SmolLM2") == 3
    assert any("IVON-LoRA, untuned, mean" in line for line in lines)
    assert not any("AdamW" in line for line in lines)


def test_ablations_are_held_against_the_same_seeds_of_the_method_as_it_is() -> None:
    made, records = causal_records()
    of_all = {"task": "movie", "method": "ivon-auto", "rows": ["mean", "posterior"], "seeds": [0, 1]}
    made["ablations"] = {
        "memory": {**of_all, "variants": [{}, {"memory": 0.05}]},
        "λ": {**of_all, "variants": [{"per_weight": 3, "targets": ["q", "v"]}]},
        "others": {**of_all, "rows": ["sigma=as-is"], "variants": [{"memory": 1.0}]},
    }
    for name, nlls in (("memory", (0.7, 0.9)), ("λ", (0.5,))):
        jobs = [job for job in fidelity.ablation_jobs(made, name, records) if "memory" in job.settings or name == "λ"]
        for job, nll in zip(jobs, nlls, strict=False):  # of λ the second seed has not run
            facts = {"ivon_ess": 12345.0}
            records += [record(job, row, "test", facts, nll=nll, accuracy=0.6, ece=0.1) for row, _ in job.rows]
    # A variant whose draws have not run has no line.
    made["ablations"]["half"] = {**of_all, "variants": [{"memory": 0.5}]}
    for job in fidelity.ablation_jobs(made, "half", records):
        records.append(record(job, "mean", "test", {}, nll=0.1, accuracy=0.6, ece=0.1))
    # The method has NLL 0.8 and 0.81, ECE 20 and 20.25 %, accuracy 50 %.
    memory, ess = pages.ablations(Results(made, records)).splitlines()[2:]
    assert memory == (
        "| memory of the precision, as a share of the run: 0.05, by signs | movie | 2 | 60.0 (+10.0 ± 0.0) | "
        "0.800 (-0.005 ± 0.095) | 10.0 (-10.1 ± 0.1) | 0.800 (-0.005 ± 0.095) |"
    )
    assert ess.startswith("| λ: 12,345; matrices: q, v, by signs | movie | 1 | 60.0 (+10.0) | 0.500 (-0.300) |")


def test_the_tables_of_the_pages_are_those_of_the_results() -> None:
    records = fidelity.read_results(BENCHMARKS / "fidelity/results.jsonl.gz")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert pages.PLACE.search(text)
        assert pages.fill(text, SUITES, records) == text, "python -m benchmarks.fidelity write"
        for place in pages.PLACE.finditer(text):
            assert place[0].count("\n| ") > 2, f"{place[2]} {place[3]}: no line below the heads"


def test_a_run_is_trained_once_and_evaluated_row_by_row(bert: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "minilm").symlink_to(bert)
    data = task(validation=examples(8, 1), test=examples(8, 2))
    monkeypatch.setattr(fidelity, "_read_task", lambda *_: data)
    made = suite()
    made["methods"]["ivon-lora"].update({"h0": 0.05, "clip": 0.01, "beta2": 0.999})
    settings = fidelity.settings_of(made, "movie", "ivon-lora", 0, gamma=50)
    places = fidelity.Places(tmp_path, None, tmp_path / "results.jsonl.gz", "abc", 2, "{}")
    job = fidelity.Job("movie", "ivon-lora", settings, (("mean", "test"), ("posterior", "test")))
    fidelity.work_off(job, [("posterior", "test")], places)
    monkeypatch.setitem(methods.TRAINERS, "ivon-lora", None)  # a second training would fail
    fidelity.work_off(job, fidelity.missing_rows(job, fidelity.read_results(places.results)), places)
    records = fidelity.read_results(places.results)
    assert [record["row"] for record in records] == ["posterior", "mean"]
    assert fidelity.missing_rows(job, records) == []
    assert records[0]["metrics"] != records[1]["metrics"]


def test_the_experiment_file_is_complete() -> None:
    encoder_suite = SUITES["encoder"]
    for task_name in encoder_suite["tasks"]:
        for method, spec in encoder_suite["methods"].items():
            of_grid = 1 if method == "ivon-lora-preset" else 3
            assert len(fidelity.grid_jobs(encoder_suite, task_name, method)) == of_grid
            assert {row.split("=")[0] for row in spec["rows"]} <= set(rows.ROWS)
    for stage in encoder_suite["stages"]:
        assert set(stage.get("ablation", [])) <= set(encoder_suite["ablations"])
        assert set(stage.get("tasks", [])) <= set(encoder_suite["tasks"])


def test_lambda_and_pruning_are_drawn_from_their_ablations() -> None:
    made, records = causal_records()
    made["tasks"] = {"movie-256": made["tasks"]["movie"]}
    made["ablations"] = {
        "per-weight": {"task": "movie-256", "method": "ivon-auto", "seeds": [0], "rows": ["mean", "posterior"],
                       "variants": [{"per_weight": 0.5}, {"per_weight": 5}]},
        "pruning": {"task": "movie-256", "method": "ivon-adam", "seeds": [0], "variants": [{}],
                    "rows": ["mean-pruned=snr,0.9", "mean-pruned=magnitude,0.9"]},
    }  # fmt: skip
    jobs = [job for name in made["ablations"] for job in fidelity.ablation_jobs(made, name, records)]
    jobs += fidelity.grid_jobs(made, "movie-256", "ivon-auto")
    jobs += fidelity.seed_jobs(made, "movie-256", "ivon-auto", 0, records)
    jobs += fidelity.seed_jobs(made, "movie-256", "ivon-adam", 0, records)
    records = []
    for job in jobs:
        ess = 100 * json.loads(job.settings).get("per_weight", 1)
        for row, data in job.rows:
            nll = {"mean": 0.5, "posterior": 0.4}.get(row, 0.7 if "magnitude" in row else 0.6)
            records.append(record(job, row, data, {"ivon_ess": ess}, nll=nll, accuracy=0.5))
    left, right = pages.knobs(Results(made, records)).axes
    mean, draws = (line.get_xydata().tolist() for line in left.lines)
    assert mean == [[50, 0.5], [100, 0.5], [500, 0.5]]
    assert draws == [[50, 0.4], [100, 0.4], [500, 0.4]]
    snr, magnitude = (line.get_xydata().tolist() for line in right.lines)
    assert snr == [[0, 0.5], [90, 0.6]]
    assert magnitude == [[0, 0.5], [90, 0.7]]


@pytest.mark.parametrize("name", ["causal", "causal-quick", "causal-long", "causal-half", "causal-write"])
def test_what_is_said_of_the_preset_is_measured_with_it(name: str) -> None:
    suite = SUITES[name]
    measured = {key: value for key, value in suite["methods"]["ivon-auto"].items() if key in PRESETS["auto"]._fields}
    assert not measured
    assert suite["methods"]["ivon-auto"]["grid"] == {"travel": [PRESETS["auto"].travel]}


def test_the_usual_rate_is_among_those_of_each_suite_that_has_it() -> None:
    suites = {name: suite for name, suite in SUITES.items() if "ivon-adam" in suite.get("methods", {})}
    assert len(suites) > 5
    for suite in suites.values():
        spec = suite["methods"]["ivon-adam"]
        assert "usual" in spec["choose_by"]
        for task in suite["tasks"]:
            assert fidelity.chosen(suite, task, "ivon-adam", [], "usual") in spec["grid"]["lr"]


@pytest.mark.parametrize("name", ["causal-axolotl", "paper", "paper-8b", "paper-70b", "code", "multilingual"])
def test_configs_of_the_other_suites(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    write_configs(suite, tmp_path / "out", tmp_path / "tasks")
    written = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "out").glob("*.yaml")}
    values = sum(len(next(iter(spec["grid"].values()))) for spec in suite["methods"].values())
    assert len(written) == len(suite["tasks"]) * values * len(suite["seeds"])
    for config in written.values():
        processes = 8 if name == "paper-70b" else 1
        assert config["max_steps"] * config["micro_batch_size"] * processes == 40000
        assert ("plugins" in config) == (config["optimizer"] == "ivon_lora")
        assert not {"grid", "rows"} & set(config)
    outputs = {config["output_dir"] for config in written.values()}
    assert len(outputs) == len(written)
    # With programs that only say what they are called with, every run is trained, evaluated, and not run again.
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("axolotl", "ivon-post", "python"):
        # lm-evaluation-harness writes into a folder under what it is given.
        written_by = 'mkdir -p "${@: -1}/model"; echo {} > "${@: -1}/model/results_1.json"'
        said = f'echo "{program} $*" | tee -a {tmp_path / "log"}\n[[ "$*" != *--output_path* ]] || {{ {written_by}; }}'
        (programs / program).write_text(f"#!/bin/bash\n{said}\n")
        (programs / program).chmod(0o755)
    for _ in range(2):
        subprocess.run(["bash", str(tmp_path / "out/run.sh")], check=True, env={"PATH": f"{programs}:/usr/bin:/bin"})
    called = (tmp_path / "log").read_text().splitlines()
    assert sum(line.startswith("axolotl train") for line in called) == len(written)
    evaluates = "python -m axolotl_ivon.lm_eval --model" if "harness" in suite else "ivon-post eval"
    assert sum(line.startswith(evaluates) for line in called) == len(written)


def test_the_papers_data_sets_become_lettered_questions() -> None:
    rows = {
        "winogrande_s": {"sentence": "A _ B", "option1": "x", "option2": "y", "answer": "2"},
        "arc_easy": {"question": "Q?", "choices": {"text": [*"pqr"], "label": [*"123"]}, "answerKey": "3"},
        "openbookqa": {"question_stem": "S", "choices": {"text": ["p", "q"], "label": ["A", "B"]}, "answerKey": "A"},
        "boolq": {"question": "is it", "passage": "P.", "answer": True},
    }
    answers = {name: as_chat(HUB[name][3](row))["messages"][1]["content"] for name, row in rows.items()}
    assert answers == {"winogrande_s": "B", "arc_easy": "C", "openbookqa": "A", "boolq": "B"}
    prompt = as_chat(HUB["arc_easy"][3](rows["arc_easy"]))["messages"][0]["content"]
    assert prompt == "Select one of the choices that answers the following question: Q? Choices: A. p B. q C. r Answer:"
