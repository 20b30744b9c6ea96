"""Answers against `predict_logits`' average over draws, one whole pass without a cache for every token."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_ivon import Posterior
from axolotl_ivon.decisions.rule import DecisionRule
from axolotl_ivon.models.draws import AdapterSlots, predict_logits
from axolotl_ivon.models.session import load_model
from axolotl_ivon.serving.api.answer_schema import FreeString
from axolotl_ivon.serving.api.answers import AnswerDelta
from axolotl_ivon.serving.local.engine import GenerationRequest, TokenEngine, mixture

MakeEngine = Callable[..., TokenEngine]
IDS = (5, 40, 7, 99, 120, 33)


def parts(engine: TokenEngine, **fields: Any) -> list[AnswerDelta]:
    """Return the parts of all answers, in the order that they come in."""
    given = {"model": "tiny", "ids": IDS, "max_tokens": 10, "temperature": 0.0, "top": 3, **fields}
    return [delta for step in engine.deltas(GenerationRequest(**given)) for delta in step]


def run(engine: TokenEngine, n: int = 1, **fields: Any) -> tuple[list[str], list[AnswerDelta]]:
    """Return the texts of the answers, and their last parts, each with all tokens of the answer."""
    texts, last = [""] * n, [AnswerDelta(-1, "")] * n
    for delta in parts(engine, n=n, **fields):
        assert last[delta.number].finish is None
        texts[delta.number] += delta.text
        last[delta.number] = delta._replace(tokens=last[delta.number].tokens + delta.tokens)
    assert all(delta.finish for delta in last)
    return texts, last


def tokens(engine: TokenEngine, **fields: Any) -> list[Any]:
    """Return the tokens of the one answer."""
    return [token for delta in parts(engine, **fields) for token in delta.tokens]


@pytest.fixture(scope="module", params=[{}, {"use_dora": True}], ids=["stacked", "one after another"])
def served(request: Any, make_adapter: Callable[..., Path], make_engine: MakeEngine) -> tuple[Path, TokenEngine]:
    adapter = make_adapter(**request.param)
    return adapter, make_engine(adapter)


def test_greedy_is_the_average_of_predict_logits_step_by_step(served: tuple[Path, TokenEngine]) -> None:
    adapter, engine = served
    model, posterior = load_model(adapter), Posterior.from_pretrained(adapter).temper(0.002)
    ids, found = list(IDS), tokens(engine)
    assert len(found) == 10
    for token in found:
        expected = predict_logits(posterior, model, {"input_ids": torch.tensor([ids])}, n=3)
        probabilities, disagreement = expected.probabilities[0, -1], expected.disagreement[0, -1]
        assert token.id == int(probabilities.argmax())
        assert math.exp(token.logprob) == pytest.approx(float(probabilities[token.id]), rel=1e-4)
        assert token.mutual_information == pytest.approx(float(disagreement), rel=1e-2, abs=1e-5)
        entropy = float(torch.special.entr(probabilities).sum())
        assert token.expected_entropy + token.mutual_information == pytest.approx(entropy, rel=1e-4)
        likeliest = probabilities.topk(3)
        assert [logprob for _, logprob in token.top] == pytest.approx(likeliest.values.log().tolist(), abs=1e-3)
        ids.append(token.id)
    assert max(token.mutual_information for token in found) > 1e-3  # the members differ


@pytest.mark.parametrize("member", ["mean", "member-0000", "member-0002"])
def test_a_member_and_the_mean_answer_by_themselves(engine: TokenEngine, tiny_adapter: Path, member: str) -> None:
    posterior = Posterior.from_pretrained(tiny_adapter).temper(0.002)
    draw = posterior.mean if member == "mean" else posterior.sample(0, int(member[-1]))
    model, ids = load_model(tiny_adapter), list(IDS)
    with AdapterSlots(model).loaded(dict(draw)), torch.no_grad():
        for token in tokens(engine, model=f"tiny:{member}"):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token.id == int(logits.argmax())
            assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[token.id]), abs=1e-4)
            assert token.mutual_information == 0
            ids.append(token.id)


def test_answers_leave_the_batch_when_they_end(engine: TokenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_ends", set(range(2, 400, 5)))  # so that they end at all lengths
    asked = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
    texts, last = run(engine, n=8, **asked)
    lengths = {len(delta.tokens) for delta in last}
    assert len(lengths) > 3
    assert {delta.finish for delta in last} == {"stop", "length"}
    for n in (1, 3):
        fewer, ends = run(engine, n=n, **asked)
        assert fewer == texts[:n]
        for one, other in zip(ends, last, strict=False):
            assert one.finish == other.finish
            assert one.ivon["mutual_information"] == pytest.approx(other.ivon["mutual_information"], abs=1e-4)
    assert run(engine, n=1, **{**asked, "seed": 4})[0] != texts[:1]


def test_the_end_is_hidden_but_makes_empty_answers_sure(engine: TokenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *more = tokens(engine)
    end = next(number for number, token in enumerate(more, 1) if token.id != first.id)
    monkeypatch.setattr(engine, "_ends", {more[end - 1].id})
    [text], [last] = run(engine, max_tokens=10)
    assert (text, last.finish, len(last.tokens)) == (engine._decode(end * [first.id]), "stop", end)
    shown = [first, *more][:end]
    assert last.ivon["confidence"] == pytest.approx(math.exp(sum(token.logprob for token in shown) / end), rel=1e-4)
    monkeypatch.setattr(engine, "_ends", {first.id})
    [text], [last] = run(engine)
    assert (text, last.finish, last.tokens) == ("", "stop", ())
    assert last.ivon["confidence"] == pytest.approx(math.exp(first.logprob))


def test_a_stop_string_ends_an_answer(engine: TokenEngine) -> None:
    drawn = {"temperature": 1.0, "seed": 5}
    [whole], _ = run(engine, **drawn)
    stop = whole[4:6]
    assert len(stop) == 2
    [text], [last] = run(engine, stop=(stop,), **drawn)
    assert (text, last.finish) == (whole[: whole.find(stop)], "stop")
    assert "".join(token.text for token in last.tokens) == text


def test_tokens_are_drawn_from_the_average(engine: TokenEngine) -> None:
    [greedy] = tokens(engine, max_tokens=1, top=400)
    by_name: dict[str, float] = {}
    for name, logprob in greedy.top:
        by_name[name] = by_name.get(name, 0.0) + math.exp(2 * logprob)  # at temperature 0.5
    total = sum(by_name.values())
    draws = 2048
    found = Counter(
        delta.tokens[0].name
        for seed in range(draws // 16)
        for delta in parts(engine, n=16, max_tokens=1, temperature=0.5, seed=seed, top=0)
        if delta.tokens
    )
    # A χ² over the tokens that are expected often enough, the rest as one.
    often = {name: share / total * draws for name, share in by_name.items() if share / total * draws >= 8}
    rest = draws - sum(often.values())
    seen = sum(found[name] for name in often)
    chi = sum((found[name] - own) ** 2 / own for name, own in often.items()) + (draws - seen - rest) ** 2 / rest
    assert abs(chi - len(often)) < 5 * math.sqrt(2 * len(often))


def test_the_softmax_temperature_is_of_all_probabilities_and_not_of_the_entropies(
    make_engine: MakeEngine, engine: TokenEngine, tiny_adapter: Path
) -> None:
    scaled = make_engine(tiny_adapter, DecisionRule(0.25, 0.5))
    [plain], [sharp] = tokens(engine, max_tokens=1, top=400), tokens(scaled, max_tokens=1, top=400)
    expected = (torch.tensor([logprob for _, logprob in plain.top]) / 0.25).log_softmax(-1).tolist()
    assert len(expected) > 300
    assert (sharp.id, sharp.logprob) == (plain.id, pytest.approx(expected[0], abs=1e-3))
    assert [logprob for _, logprob in sharp.top] == pytest.approx(expected, abs=1e-2)
    assert sharp[-2:] == pytest.approx(plain[-2:], rel=1e-4)
    [_], [last] = run(scaled, max_tokens=1)
    assert last.ivon["abstain"] == (last.ivon["confidence"] < 0.5)
    [_], [last] = run(engine, max_tokens=1)
    assert last.ivon.keys() == {"confidence", "expected_entropy", "mutual_information", "members"}
    assert last.ivon["members"] == 3
    for other in ("tiny:mean", "tiny:member-0001"):  # T and threshold are of the average
        [one], [of_one] = tokens(engine, model=other, max_tokens=1), tokens(scaled, model=other, max_tokens=1)
        assert one.logprob == pytest.approx(of_one.logprob, abs=1e-4)
        assert "abstain" not in run(scaled, model=other, max_tokens=1)[1][0].ivon


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["stacked", "one after another"])
def test_where_the_mean_is_recommended_it_answers_and_draws_are_made_on_demand(
    lora: Any, make_adapter: Callable[..., Path], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, made = make_adapter(**lora), []
    sample = Posterior.sample
    monkeypatch.setattr(Posterior, "sample", lambda self, *which: made.append(which) or sample(self, *which))
    engine = make_engine(adapter, DecisionRule(0.5), mean_rule=DecisionRule(2.0, 0.5))
    [text], [last] = run(engine)
    logits = load_model(adapter)(input_ids=torch.tensor([IDS])).logits[0, -1].detach()
    expected = (logits / 2).log_softmax(-1)
    assert last.tokens[0].logprob == pytest.approx(float(expected[last.tokens[0].id]), abs=1e-4)
    assert last.tokens[0].expected_entropy == pytest.approx(float(torch.special.entr(expected.exp()).sum()), rel=1e-4)
    assert (last.ivon["members"], last.ivon["mutual_information"], "abstain" in last.ivon) == (1, 0.0, True)
    assert run(engine, model="tiny:mean")[0] == [text]
    assert made == []
    [_], [of_draws] = run(engine, model="tiny:posterior")
    assert made == [(0, 0), (0, 1), (0, 2)]
    assert of_draws.ivon["members"] == 3
    assert of_draws.ivon["mutual_information"] > 1e-3
    assert of_draws == run(make_engine(adapter, DecisionRule(0.5)))[1][0]


@pytest.mark.parametrize("characters", [1, 8])
def test_a_string_is_greedy_among_the_tokens_that_json_allows(
    served: tuple[Path, TokenEngine], tokenizer: Any, characters: int
) -> None:
    adapter, engine = served
    model, posterior = load_model(adapter), Posterior.from_pretrained(adapter).temper(0.002)
    [delta] = parts(engine, fields={"a": FreeString(characters), "b": ["1", "2"]}, top=None)
    ivon = delta.ivon or {}
    choice, value = ivon["choices"]["a"], json.loads(delta.text)["a"]
    assert (choice["value"], len(value) <= characters) == (value, True)
    assert list(choice["probabilities"].values()) == [choice["probability"]]
    assert ivon["confidence"] == pytest.approx(choice["probability"] * ivon["choices"]["b"]["probability"])
    before = tokenizer('{"a": "')["input_ids"]

    def inside(ids: list[int]) -> tuple[str, bool] | None:
        """The string so far and whether it has ended, if one of JSON without escapes can go on so."""
        text = tokenizer.decode(before + ids).removeprefix('{"a": "')
        value, quote, rest = text.partition('"')
        fits = len(value) <= characters and "\ufffd" not in value and rest.strip(" \n,}") == ""
        with contextlib.suppress(ValueError):
            return (value, bool(quote)) if fits and json.loads(f'"{value}"') == value else None
        return None

    ids, probability, state = [], 1.0, ("", False)
    while not state[1]:
        batch = {"input_ids": torch.tensor([[*IDS, *before, *ids]])}
        average = predict_logits(posterior, model, batch, n=3).probabilities[0, -1]
        order = [token for token in average.argsort(descending=True).tolist() if token not in tokenizer.all_special_ids]
        token = next(token for token in order if inside([*ids, token]))
        probability, ids = probability * float(average[token]), [*ids, token]
        state = inside(ids) or state
    assert state[0] == value
    assert choice["probability"] == pytest.approx(probability, rel=1e-3)


def test_a_field_of_one_value_takes_no_tokens(engine: TokenEngine) -> None:
    [delta] = parts(engine, fields={"a": ["7"], "b": ["true"]}, top=None)
    assert (delta.text, delta.generated, (delta.ivon or {})["confidence"]) == ('{"a": 7, "b": true}', 0, 1.0)


def test_the_model_is_left_as_it_was(make_adapter: Callable[..., Path], make_engine: MakeEngine) -> None:
    engine = make_engine(make_adapter(use_dora=True))
    before = {name: own.clone() for name, own in engine._model.state_dict().items()}
    steps = engine.deltas(GenerationRequest("tiny", IDS))
    next(steps)
    steps.close()
    for name, own in engine._model.state_dict().items():
        assert torch.equal(own, before[name])


def test_the_average_of_distributions_and_its_entropies() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]], [[0.0, -math.inf, 0.0]]])
    average, expected, mutual = mixture(logits)
    torch.testing.assert_close(average.exp(), torch.tensor([[0.5, 0.25, 0.25]]))
    assert float(expected) == pytest.approx(math.log(2))
    assert float(mutual) == pytest.approx(0.5 * math.log(2))
