"""The influence of training rows against leaving them out and against autograd, and the rows ranked by it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import row_gradients
from heard import Heard
from safetensors.torch import load_file
from tiny import build_classifier, chat, write_chats
from torch import Tensor, nn
from transformers import AutoTokenizer

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.chats import read_examples
from axolotl_ivon.data.encode import encode_turns
from axolotl_ivon.influence.attribution import influence, log_odds_variance, products
from axolotl_ivon.influence.ranking import check_same, flagged, save_without, standing_out, suspicious
from axolotl_ivon.models.gradients import ExampleGradients, adapter_parameters, example_losses
from axolotl_ivon.models.session import load_model, load_tokenizer
from axolotl_ivon.posterior.adapter import save_sigma
from axolotl_ivon.records.influence import SCORES, InfluenceRecord

MakeAdapter = Callable[..., Path]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(np.asarray(x))) for x in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def linear_products(loss: Callable[[Tensor, Tensor], Tensor], m: Any, x: Any, y: Any, sigma2: Any, on: Any) -> Any:
    """Return the products of a model with one output, m·x, and the direction `on`."""
    m, x, y, sigma2, on = (torch.tensor(value, dtype=torch.float32) for value in (m, x, y, sigma2, on))
    model = nn.Linear(len(m), 1, bias=False)
    model.weight.data = m[None]

    def losses(some: Sequence[int]) -> Tensor:
        return loss(model(x[list(some)])[:, 0], y[list(some)])

    with ExampleGradients(model, {"w": model.weight}, losses) as gradients:
        return products(gradients, range(len(y)), {"w": sigma2[None]}, {"w": on[None]})


def test_leaving_one_out_is_exact_in_a_linear_gaussian_model_with_a_diagonal_hessian() -> None:
    """y = x·w + noise, each x along one axis: q is the posterior itself, and leaving out has a closed form.

    λ is not N: an example's loss weighs λ/N, also when another is left out. Of the library's two numbers, ℓ and gᵀσ²g,
    the leverage h = (λ/N)·x²σ² follows, and with it Sherman and Morrison's 1/(1 − h) exactly what refitting gives.
    """
    draw = np.random.default_rng(0)
    count, size, ess, delta = 24, 4, 60.0, 0.05
    axis, length, y = np.arange(count) % size, draw.uniform(0.5, 2, count), draw.normal(size=count)
    x = np.zeros((count, size))
    x[np.arange(count), axis] = length
    val_x, val_y = draw.normal(size=(9, size)), draw.normal(size=9)

    def fit(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        precision = ess / count * x[used].T @ x[used] + ess * delta * np.eye(size)
        return np.linalg.solve(precision, ess / count * x[used].T @ y[used]), precision

    m, precision = fit(np.arange(count))
    sigma2 = 1 / np.diag(precision)
    np.testing.assert_allclose(np.diag(1 / sigma2), precision)
    towards = val_x.T @ (val_x @ m - val_y) / len(val_y)
    found = linear_products(lambda output, y: (output - y).square() / 2, m, x, y, sigma2, towards)
    weight = ess / count
    h = weight * (found.own / (2 * found.losses)).numpy()
    for i in range(count):
        without, _ = fit(np.delete(np.arange(count), i))
        real = (x[i] @ without - y[i]) ** 2 / 2
        assert float(found.losses[i]) / (1 - h[i]) ** 2 == pytest.approx(real, rel=1e-4)
        assert weight * float(found.along[i]) / (1 - h[i]) == pytest.approx(towards @ (without - m), rel=1e-3, abs=1e-6)
        # In natural parameters: with the σ² that is left without the example, nothing remains to be corrected.
        left = 1 / (1 / sigma2 - weight * x[i] ** 2)
        np.testing.assert_allclose(m + weight * left * (x[i] @ m - y[i]) * x[i], without, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("correlated", "least"), [(0.0, 0.9), (0.2, 0.85)])
def test_leaving_one_out_of_a_logistic_model(correlated: float, least: float) -> None:
    """Of other data, σ² alone tells less where inputs are correlated, and the Hessian has more than a diagonal."""
    draw = np.random.default_rng(1)
    count, size, ess, delta = 150, 5, 400.0, 0.02
    x = draw.normal(size=(count, size)) @ (np.eye(size) + correlated * draw.normal(size=(size, size)))
    y = (draw.uniform(size=count) < 1 / (1 + np.exp(-x @ draw.normal(size=size)))).astype(float)
    val_x = draw.normal(size=(60, size))
    val_y = (draw.uniform(size=60) < 0.5).astype(float)

    def loss(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, x @ w) - y * (x @ w)

    def fit(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w = np.zeros(size)
        for _ in range(30):  # Newton's
            p = 1 / (1 + np.exp(-x[used] @ w))
            hessian = ess / count * (x[used].T * (p * (1 - p))) @ x[used] + ess * delta * np.eye(size)
            w = w - np.linalg.solve(hessian, ess / count * x[used].T @ (p - y[used]) + ess * delta * w)
        return w, hessian

    m, hessian = fit(np.arange(count))
    sigma2 = 1 / np.diag(hessian)
    towards = val_x.T @ (1 / (1 + np.exp(-val_x @ m)) - val_y) / len(val_y)
    loss_of = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")
    found = linear_products(loss_of, m, x, y, sigma2, towards)
    # Whichever label is right, the leverage is the variance of the logit.
    np.testing.assert_allclose(log_odds_variance(found.losses, found.own), (x**2) @ sigma2, rtol=1e-3)
    refitted = [fit(np.delete(np.arange(count), i))[0] for i in range(count)]
    own = [float(loss(w, x[i], y[i]) - loss(m, x[i], y[i])) for i, w in enumerate(refitted)]
    val = [float((loss(w, val_x, val_y) - loss(m, val_x, val_y)).mean()) for w in refitted]
    assert spearman(found.own.tolist(), own) > 0.95
    assert spearman(found.along.tolist(), val) > least
    assert spearman(found.losses.tolist(), own) < spearman(found.own.tolist(), own)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different lengths."""
    path = write_chats(tmp_path_factory.mktemp("chats") / "train.jsonl", count=9)
    long = chat("red", "moon rain dog cat")
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    return path


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("others") / "validation.jsonl", count=5, seed=1)


def test_the_scores_are_those_of_one_gradient_a_row(tiny_adapter: Path, chats: Path, others: Path) -> None:
    heard = Heard()
    found = influence(tiny_adapter, chats, others, reporter=heard)
    assert heard.notes == ["the adapter was trained on 100 examples, and these are 10: give the data of its training"]
    assert found.summary["ess"] == 1000
    assert found.summary["train_size"] == 100
    expected, validation = row_gradients(tiny_adapter, chats), row_gradients(tiny_adapter, others)
    sigma = dict(Posterior.from_pretrained(tiny_adapter).sigma)
    tokens = sum(count for *_, count in validation)
    towards = {name: sum(g[name] for _, g, _ in validation) / tokens for name in sigma}
    weight = 1000 / 100 / (sum(count for *_, count in expected) / len(expected))
    assert [row.index for row in found.rows] == list(range(10))
    for row, (loss, g, count) in zip(found.rows, expected, strict=True):
        own = sum(float((g[name] * sigma[name]).square().sum()) for name in sigma)
        along = sum(float((g[name] * sigma[name].square() * towards[name]).sum()) for name in sigma)
        assert row.loss == pytest.approx(loss / count, rel=1e-4)
        assert row.leverage == pytest.approx(own / (1 - math.exp(-loss)) ** 2, rel=1e-3)
        assert row.sensitivity == pytest.approx(weight * own / count, rel=1e-3)
        assert row.on == pytest.approx(weight * along, rel=1e-3, abs=1e-6)
    last = found.rows[9]
    assert (last.line, last.question, last.answer) == (10, "red", "moon rain dog cat")
    heard.notes.clear()
    assert influence(tiny_adapter, chats, limit=2, reporter=heard).rows[1].line == 2
    assert heard.notes == []
    alone = influence(tiny_adapter, chats, batch_size=1)
    assert {row.on for row in alone.rows} == {None}
    assert [row.sensitivity for row in alone.rows] == pytest.approx([row.sensitivity for row in found.rows], 1e-4)


def test_a_step_of_the_predicted_shift_changes_the_losses_as_predicted(tiny_adapter: Path, chats: Path) -> None:
    """The signs: a small part of the shift m + w·σ²·∇ℓ raises the row's own loss by that part of the sensitivity."""
    [row, *_] = influence(tiny_adapter, chats).rows
    (loss, g, count), *_ = expected = row_gradients(tiny_adapter, chats)
    weight = 1000 / 100 / (sum(tokens for *_, tokens in expected) / len(expected))
    sigma, part = dict(Posterior.from_pretrained(tiny_adapter).sigma), 1e-3
    model = load_model(tiny_adapter)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter += part * weight * sigma[name].square() * g[name]
    [item] = encode_turns(load_tokenizer(tiny_adapter, ""), read_examples(chats, 1))
    with torch.no_grad():
        after = float(example_losses(model, [item]))
    assert (after - loss) / count / part == pytest.approx(row.sensitivity, rel=0.05)


def test_temperature_changes_the_leverage_alone_and_pruned_weights_do_not_move(
    tiny_adapter: Path, chats: Path, others: Path, tmp_path: Path
) -> None:
    q = Posterior.from_pretrained(tiny_adapter)
    q.temper(4.0).save_pretrained(tmp_path / "cool")
    rows, cool = (influence(folder, chats, others).rows for folder in (tiny_adapter, tmp_path / "cool"))
    for one, other in zip(rows, cool, strict=True):
        assert other.leverage == pytest.approx(one.leverage / 4, rel=1e-4)
        for name in ("loss", "sensitivity", "on"):
            assert other.score(name) == pytest.approx(one.score(name), rel=1e-4, abs=1e-9)
    q.prune(0.5).save_pretrained(tmp_path / "pruned")
    [row, *_] = influence(tmp_path / "pruned", chats).rows
    (_, g, count), *_ = expected = row_gradients(tmp_path / "pruned", chats)
    sigma = dict(Posterior.from_pretrained(tmp_path / "pruned").sigma)
    assert sum(int((value == 0).sum()) for value in sigma.values()) == 448
    weight = 10 / (sum(tokens for *_, tokens in expected) / len(expected))
    own = sum(float((g[name] * sigma[name]).square().sum()) for name in sigma)
    assert row.sensitivity == pytest.approx(weight * own / count, rel=1e-3)


def test_fewer_examples_at_once_when_the_memory_runs_out(
    tiny_adapter: Path, chats: Path, others: Path, small_memory: Callable[[int], None]
) -> None:
    expected, heard = influence(tiny_adapter, chats, others).rows, Heard()
    small_memory(3)
    rows = influence(tiny_adapter, chats, others, reporter=heard).rows
    for name in SCORES:
        values = [row.score(name) for row in expected]
        assert [row.score(name) for row in rows] == pytest.approx(values, rel=1e-4, abs=1e-7)
    assert any("out of memory with 5 examples in a batch; going on with 2" in line for line in heard.notes)


def test_a_row_whose_answer_does_not_fit_has_no_scores(tiny_adapter: Path, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "train.jsonl", count=3)
    long = chat("red " * 900, "A")
    data.write_text(json.dumps(long) + "\n" + data.read_text())
    heard = Heard()
    rows = influence(tiny_adapter, data, reporter=heard).rows
    assert "1 of 4 examples have no answer within 512 tokens and are left out" in heard.notes
    assert [rows[0].score(name) for name in SCORES] == [None] * 4
    assert 0 not in suspicious(rows, "loss")
    assert len(flagged(rows, "loss", 0.25)) == 3
    data.write_text(json.dumps(long) + "\n")
    with pytest.raises(IVONError, match=r"train.jsonl: 1 of 1 examples have no answer within 512 tokens; give"):
        influence(tiny_adapter, data)


def test_a_classifier(tiny_llama: Path, tmp_path: Path) -> None:
    """Its saved head has a σ too, and the loss is that of the label."""
    build_classifier(tiny_llama, tmp_path / "a")
    mean = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_sigma(tmp_path / "a", {name: torch.full_like(x, 0.1) for name, x in mean.items()}, {"ess": "6"})
    texts = [("red sun", "0"), ("blue", "2"), ("moon dog cat", "1")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))
    heard = Heard()
    rows = influence(tmp_path / "a", data, reporter=heard).rows
    assert heard.notes == ["the adapter does not say how many examples it was trained on: taken to be these 3"]
    model = load_model(tmp_path / "a", classify=True)
    model.config.pad_token_id = 0
    parameters = adapter_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for row, (text, label) in zip(rows, texts, strict=True):
        ids = AutoTokenizer.from_pretrained(tiny_llama)(text, return_tensors="pt")["input_ids"]
        loss = F.cross_entropy(model(input_ids=ids).logits, torch.tensor([int(label)]))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        own = 0.01 * sum(float(g.square().sum()) for g in gradients)
        assert row.loss == pytest.approx(float(loss), rel=1e-4)
        assert row.sensitivity == pytest.approx(6 / 3 * own, rel=1e-3)


def test_a_posterior_without_what_it_takes_is_refused(
    make_adapter: MakeAdapter, tiny_adapter: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(IVONError, match=r"ivon_sigma.safetensors has no effective sample size \(ess\)"):
        influence(make_adapter(facts={"ess": ""}), chats)
    Posterior.from_pretrained(tiny_adapter).temper(math.inf).save_pretrained(tmp_path / "mean")
    with pytest.raises(IVONError, match=r"every σ is 0, so no weight would move"):
        influence(tmp_path / "mean", chats)
    with pytest.raises(IVONError, match=r"no ivon_sigma.safetensors"):
        influence(make_adapter(sigma=False), chats)


def test_rows_stand_out_from_the_others_and_none_of_clean_data() -> None:
    """Losses of learned rows are skewed: of an exponential distribution, say."""

    def rows(scores: Any) -> list[InfluenceRecord]:
        place = enumerate(float(score) for score in scores)
        return [InfluenceRecord(index=i, loss=x, leverage=1.0, sensitivity=x, on=-x) for i, x in place]

    counts = []
    for seed in range(20):
        clean = np.random.default_rng(seed).exponential(0.1, 200)
        wrong = np.random.default_rng(seed + 100).uniform(2, 4, 20)
        counts.append(len(standing_out(rows(clean), "sensitivity")))
        both = rows([*clean, *wrong])
        for by in ("loss", "on"):
            assert set(range(200, 220)) <= set(standing_out(both, by))
    assert sum(counts) <= 3, "of 4,000"
    assert standing_out(rows([0.1] * 8 + [9]), "loss") == [], "too few"
    assert standing_out(rows([-0.1] * 12 + [-0.05]), "loss") == [], "a row that helps is not suspicious"
    assert standing_out(rows([0.1] * 12 + [9]), "loss") == [12]


def test_the_most_suspicious_rows_are_left_out(tmp_path: Path) -> None:
    data = write_chats(tmp_path / "data.jsonl", count=4)
    lines = data.read_bytes().splitlines()
    data.write_bytes(b"\r\n".join([lines[0], b"", *lines[1:]]))  # an empty line, Windows' ends, and none at the end
    texts = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    scores = [(0.1, 0.5), (3.0, 0.1), (None, None), (2.0, -2.0)]
    rows = []
    for i, ((loss, on), (question, answer)) in enumerate(zip(scores, texts, strict=True)):
        place: dict[str, Any] = {"index": i, "line": i + 1 + (i > 0), "question": question, "answer": answer}
        rows.append(InfluenceRecord(**place, loss=loss, leverage=1.0, sensitivity=loss, on=on))
    check_same(rows, "scores.jsonl", data)
    assert suspicious(rows, "loss") == [1, 3, 0]
    assert suspicious(rows, "on") == [3, 1, 0]
    assert flagged(rows, "on", 0.5) == [3, 1]
    assert flagged(rows, "loss", 0.01) == [1, 3, 0]
    save_without(tmp_path / "clean.jsonl", data, {rows[i].line or 0 for i in flagged(rows, "on", 0.75)})
    assert (tmp_path / "clean.jsonl").read_bytes() == b"\r\n".join([lines[0], b"", *lines[1:3]]) + b"\r\n"
    other = rows[1].model_copy(update={"answer": "?"})
    with pytest.raises(IVONError, match=r"scores.jsonl: row 1 has another answer, so they are of other data than data"):
        check_same([rows[0], other, *rows[2:]], "scores.jsonl", data)
    with pytest.raises(IVONError, match=r"3 rows, not 4, so they are of other data"):
        check_same(rows[:3], "scores.jsonl", data)
