"""A posterior around the mean of an adapter without one: what is written, and that it is right for every kind."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brute_force import row_gradients
from heard import Heard
from tiny import build_classifier, build_llama, build_lora, chat, write_chats
from transformers import AutoModelForCausalLM

import axolotl_ivon
from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.evaluation.evaluate import Evaluation, EvaluationData, Sampling
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.fitting import ivon, problem, state
from axolotl_ivon.fitting.fit import fit, save
from axolotl_ivon.fitting.precision import FACTORS, Prior
from axolotl_ivon.fitting.problem import Settings
from axolotl_ivon.fitting.state import Snapshot, State
from axolotl_ivon.models.gradients import ExampleGradients
from axolotl_ivon.models.session import Loading
from axolotl_ivon.settings.presets import PRESETS

MakeAdapter = Callable[..., Path]
MEAN_FILE = "adapter_model.safetensors"


@pytest.fixture
def chats(pipeline: Any) -> Path:
    return pipeline.chats


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivon, "FEWEST", 8)
    monkeypatch.setattr(ivon, "MOST", 16)
    monkeypatch.setattr(ivon, "SETTLED", 0.3)


def equal(one: Posterior, other: Posterior) -> bool:
    return all(one.sigma[key].equal(other.sigma[key]) for key in one.sigma.specs.keys() | other.sigma.specs.keys())


@pytest.mark.parametrize("method", ["ivon", "fisher", "tfb"])
def test_the_mean_stays_and_sigma_is_beside_it(plain_adapter: Path, chats: Path, tmp_path: Path, method: str) -> None:
    heard = Heard()
    q = axolotl_ivon.fit(plain_adapter, chats, method=method, samples=2, reporter=heard)
    q.save_pretrained(tmp_path / "out")
    files = [(folder / MEAN_FILE).read_bytes() for folder in (plain_adapter, tmp_path / "out")]
    assert files[0] == files[1]
    read = Posterior.from_pretrained(tmp_path / "out")
    assert equal(read, q)
    header = read.metadata
    assert header["fit_method"] == method
    assert header["fit_data"] == "chats.jsonl"
    assert header["fit_data_sha256"] == hashlib.sha256(chats.read_bytes()).hexdigest()
    assert header["train_size"] == "24"
    if method != "tfb":
        assert float(header["ess"]) == PRESETS["auto"].ess(24, 896)
        assert header["fit_labels"] == "sampled"
    if method == "ivon":
        assert heard.lines[-1].startswith(f"{header['fit_steps']} steps: σ changed by ")
        assert int(header["fit_steps"]) >= 8
    widths = {key: value for key, value in read.sigma.items() if method != "tfb" or "lora_A" in key}
    assert all((value > 0).all() for value in widths.values())
    assert all(not value.any() for key, value in read.sigma.items() if key not in widths)
    draw = read.temper(4).prune(0.1).sample(1)
    assert all(value.isfinite().all() for value in draw.values())


def test_fisher_is_the_information_of_the_chats_answers(plain_adapter: Path, chats: Path) -> None:
    q = fit(plain_adapter, chats, method="fisher", empirical=True, prior=0.01, prior_strength=2, ess=500)
    rows = row_gradients(plain_adapter, chats)
    count = sum(tokens for *_, tokens in rows)
    informed = fit(plain_adapter, chats, method="fisher", empirical=True, ess=400.0, prior_strength=0.5)
    prior = Prior(400.0, "empirical", 0.5)
    for key in q.sigma:
        h = sum(gradients[key].double().square() for _, gradients, _ in rows) / count
        torch.testing.assert_close(q.sigma[key].double(), (500 * (h + 0.02)).rsqrt(), rtol=1e-3, atol=1e-6)
        expected = (400 * (h + prior.delta(h, q.mean[key]))).rsqrt()
        torch.testing.assert_close(informed.sigma[key].double(), expected, rtol=1e-2, atol=0)
    assert q.metadata["fit_labels"] == "data"
    assert q.metadata["ess"] == "500"


@pytest.mark.parametrize("method", ["fisher", "ivon"])
def test_validation_chooses_lambda(plain_adapter: Path, chats: Path, tmp_path: Path, method: str) -> None:
    validation = write_chats(tmp_path / "validation.jsonl", count=20, seed=7)
    heard = Heard()
    q = fit(plain_adapter, chats, method=method, validation=str(validation), samples=3, seed=2, reporter=heard)
    base = PRESETS["auto"].ess(24, 896)
    factor = float(q.metadata["ess"]) / base
    assert factor in FACTORS
    assert q.metadata["fit_validation"] == "validation.jsonl"
    assert any("NLL on" in line and line.endswith(f"λ = {factor * base:.3g}") for line in heard.lines)
    if method == "fisher":
        losses = {}
        for one in FACTORS:
            each = fit(plain_adapter, chats, method=method, ess=one * base, seed=2)
            each.save_pretrained(tmp_path / str(one))
            held = Evaluation(tmp_path / str(one), EvaluationData([validation]), [Variant("posterior", tau=1.0)])
            [scores] = held.run([Variant("posterior", tau=1.0)], Sampling(samples=3, seed=2))
            losses[one] = float(scores.nll.mean())
        assert factor == min(losses, key=lambda one: losses[one])
        assert len(set(losses.values())) > 1


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter whose model is sure of its answers, and chats with these answers: noise can only do harm."""
    folder = tmp_path_factory.mktemp("sure")
    base = AutoModelForCausalLM.from_pretrained(build_llama(folder / "base"))
    base.lm_head.weight.data *= 30
    base.save_pretrained(folder / "base")
    build_lora(folder / "base", folder / "adapter", r=4, target_modules="all-linear")
    data = write_chats(folder / "train.jsonl", count=40)
    evaluation = Evaluation(folder / "adapter", EvaluationData([data]), [Variant("mean")])
    [scores] = evaluation.run([Variant("mean")])
    assert scores.probabilities is not None
    chosen = scores.probabilities[scores.group.argsort()].argmax(1)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row, choice in zip(rows, chosen.tolist(), strict=True):
        row["messages"][1]["content"] = evaluation.choices[choice]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "adapter", data


def test_tfb_is_as_wide_as_the_tolerance_allows(sure: tuple[Path, Path], tmp_path: Path) -> None:
    heard = Heard()
    adapter, data = sure
    q = fit(adapter, data, method="tfb", tolerance=0.02, samples=4, seed=5, choices=["A", "B"], reporter=heard)
    q.save_pretrained(tmp_path / "out")
    rows = [Variant("mean"), Variant("posterior", tau=1.0), Variant("wider", tau=1.1**-2)]
    mean, drawn, wider = Evaluation(tmp_path / "out", EvaluationData([data], choices=["A", "B"])).run(
        rows, Sampling(samples=4, seed=5)
    )
    assert float((drawn.nll - mean.nll).mean()) <= 0.02 + 1e-6
    assert float((wider.nll - mean.nll).mean()) > 0.02
    assert int(q.metadata["tfb_evaluations"]) <= 12
    assert len(heard.lines) <= 11
    assert float(q.metadata["tfb_nll"]) - float(q.metadata["tfb_nll_mean"]) <= 0.02 + 1e-5
    key = min(key for key in q.mean if "lora_A" in key)
    b = q.mean[key.replace("lora_A", "lora_B")]
    torch.testing.assert_close(q.sigma[key][:, 0], float(q.metadata["tfb_sigma_q"]) / b.norm(dim=0))


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True, "target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["ivon", "fisher", "tfb"])
def test_every_kind_of_adapter(
    make_adapter: MakeAdapter, chats: Path, tmp_path: Path, lora: dict[str, Any], method: str
) -> None:
    folder = make_adapter(sigma=False, **lora)
    q = fit(folder, chats, method=method, samples=1, limit=8, tolerance=0.1 if method == "tfb" else None)
    q.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / MEAN_FILE).read_bytes() == (folder / MEAN_FILE).read_bytes()
    Evaluation(tmp_path / "out", EvaluationData([chats])).run([Variant("posterior", tau=1.0)], Sampling(samples=1))
    trained = {key for key in q.sigma if "lora_A" in key or "lora_embedding_A" in key or method != "tfb"}
    saved_alone = {key for key in q.sigma if "embed_tokens.weight" in key or "base_layer" in key}
    for key in trained - saved_alone:
        assert (q.sigma[key] > 0).any(), key


def test_what_training_knows_of_its_data_stays(tiny_adapter: Path, plain_adapter: Path, tmp_path: Path) -> None:
    """A σ that is fitted anew, on other data, changes nothing of how the mean is asked."""
    facts = {"choices": '["A", "B", "C"]', "chat_template_kwargs": '{"x": 1}', "system_prompt": "Choose."}
    q = Posterior.from_pretrained(tiny_adapter)
    replace(q, metadata={**q.metadata, **facts}).save_pretrained(tmp_path / "trained")
    data = write_chats(tmp_path / "other.jsonl", 8)
    fitted = fit(tmp_path / "trained", data, method="fisher", samples=1, refit=True)
    assert facts.items() <= fitted.metadata.items()
    # A part of the data may lack a label, of an adapter that knows none.
    assert "choices" in fit(plain_adapter, data, method="fisher", samples=1).metadata
    assert "choices" not in fit(plain_adapter, data, method="fisher", samples=1, limit=6).metadata
    assert "choices" in fit(plain_adapter, data, method="fisher", samples=1, limit=9).metadata  # which cuts nothing off


def test_the_next_fit_looks_into_its_own_data(tiny_adapter: Path, plain_adapter: Path, tmp_path: Path) -> None:
    """For it may have been the wrong file before, or a part of it; but what training has written stays."""
    data, others = write_chats(tmp_path / "a.jsonl", 8), tmp_path / "b.jsonl"
    others.write_text("".join(json.dumps(chat(f"{x} sun", x)) + "\n" for x in "CDECDE"))

    def fitted(adapter: Path, name: str, **more: Any) -> Path:
        save(fit(adapter, data=more.pop("data", data), method="fisher", samples=1, refit=True, **more), tmp_path / name)
        return tmp_path / name

    for first in (fitted(plain_adapter, "whole"), fitted(plain_adapter, "part", limit=6)):
        again = fit(first, others, method="fisher", samples=1, refit=True)
        assert again.metadata["choices"] == '["C", "D", "E"]'
    q = Posterior.from_pretrained(tiny_adapter)
    replace(q, metadata={**q.metadata, "choices": '["A", "B", "C"]'}).save_pretrained(tmp_path / "trained")
    twice = fitted(fitted(tmp_path / "trained", "once"), "twice", data=others)
    assert Posterior.from_pretrained(twice).metadata["choices"] == '["A", "B", "C"]'


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_quantized_bases(tmp_path: Path, chats: Path, load_in: str) -> None:
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=128)
    build_lora(base, tmp_path / "adapter")
    exact, found = (
        fit(tmp_path / "adapter", chats, method="fisher", empirical=True, prior=1e-4, loading=Loading(load_in=kind))
        for kind in (None, load_in)
    )
    for key, value in exact.sigma.items():
        assert float((found.sigma[key] / value).log().abs().median()) < 0.3, key
    fit(tmp_path / "adapter", chats, samples=1, validation=str(chats), loading=Loading(load_in=load_in), limit=8)


def test_a_classifier(tiny_llama: Path, tmp_path: Path) -> None:
    build_classifier(tiny_llama, tmp_path / "adapter", num_labels=2)
    rows = [{"text": f"{word} sun", "label": label} for word, label in (("red", 0), ("blue", 1), ("cold rain", 1))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    for method in ("ivon", "fisher", "tfb"):
        q = fit(tmp_path / "adapter", data, method=method, samples=1)
        head = next(key for key in q.sigma if "score" in key)
        assert (q.sigma[head] > 0).any() == (method != "tfb")
    data.write_text('{"text": "red", "label": "orange"}\n')
    with pytest.raises(IVONError, match="'orange' is neither one of the model's"):
        fit(tmp_path / "adapter", data)


@pytest.mark.parametrize(("method", "late"), [("ivon", False), ("ivon", True), ("fisher", False), ("tfb", False)])
def test_an_interrupted_fit_goes_on_and_ends_where_the_other_does(
    plain_adapter: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, late: bool
) -> None:
    options: dict[str, Any] = {"method": method, "samples": 2, "batch_size": 3}
    if method != "tfb":
        options["validation"] = str(chats)
    whole = fit(plain_adapter, chats, **options)
    hidden = tmp_path / ".out.fit"
    calls, limit = 0, int(whole.metadata["fit_steps"]) - 2 if late else 4  # late: at the λ chosen
    target, name = (problem, "evaluate") if method == "tfb" else (ExampleGradients, "__call__")
    own = getattr(target, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(target, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(plain_adapter, chats, state=hidden, **options)
    assert hidden.is_file()
    monkeypatch.setattr(state, "_EVERY", 0.0)
    total, calls, limit = calls, 0, 10**9
    found = fit(plain_adapter, chats, state=hidden, **options)
    assert equal(found, whole)
    assert found.metadata == whole.metadata
    save(found, tmp_path / "out", state=hidden)
    assert not hidden.exists()
    resumed, calls = calls, 0
    fit(plain_adapter, chats, state=hidden, **options)
    assert resumed + total - 1 == calls


def test_a_state_of_another_fit_is_not_taken(plain_adapter: Path, chats: Path, tmp_path: Path) -> None:
    hidden = tmp_path / ".out.fit"
    hidden.write_bytes(b"nothing")
    found = fit(plain_adapter, chats, method="fisher", state=hidden, seed=1)
    assert equal(found, fit(plain_adapter, chats, method="fisher", seed=1))
    assert not equal(found, fit(plain_adapter, chats, method="fisher", seed=2))


def test_refitting_keeps_what_was_pruned(tiny_adapter: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(IVONError, match=r"has a σ already, trained, in ivon_sigma.safetensors; .* refit"):
        fit(tiny_adapter, chats)
    pruned = Posterior.from_pretrained(tiny_adapter).prune(0.25)
    pruned.save_pretrained(tmp_path / "pruned")
    q = fit(tmp_path / "pruned", chats, method="fisher", refit=True)
    assert q.pruned_ratio == 0.25
    assert q.pruned() == pruned.pruned()
    q.save_pretrained(tmp_path / "out")
    with pytest.raises(IVONError, match="has a σ already, fitted by fisher"):
        fit(tmp_path / "out", chats)


def test_shared_weights_get_one_sigma_and_one_draw(tmp_path: Path, chats: Path) -> None:
    build_llama(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    build_lora(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"], **saved)
    q = fit(tmp_path / "adapter", chats, method="fisher")
    large = [key for key in q.mean if "lora" not in key]
    assert len(large) == 2
    q.save_pretrained(tmp_path / "out")
    read = Posterior.from_pretrained(tmp_path / "out")
    if q.aliases:
        assert q.sigma[large[0]].equal(q.sigma[large[1]])
        assert read.aliases == q.aliases
        assert read.sample(0)[large[0]].equal(q.sample(0)[large[1]])


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(
    plain_adapter: Path, chats: Path, tmp_path: Path
) -> None:
    lines = chats.read_text().splitlines()[:6]
    long = chat("red " * 2000, "A")
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join([*lines, json.dumps(long)]) + "\n")
    heard = Heard()
    q = fit(plain_adapter, data, method="fisher", reporter=heard)
    assert q.metadata["train_size"] == "6"
    assert heard.notes == ["1 of 7 examples have no answer within 512 tokens and are left out"]
    data.write_text(json.dumps(long) + "\n")
    with pytest.raises(IVONError, match="1 of 1 examples have no answer within 512 tokens; give shorter"):
        fit(plain_adapter, data, method="fisher")


def test_it_halves_batches_when_the_memory_runs_out(
    plain_adapter: Path, chats: Path, small_memory: Callable[[int], None]
) -> None:
    heard = Heard()
    expected = fit(plain_adapter, chats, method="fisher", empirical=True)
    small_memory(2)
    found = fit(plain_adapter, chats, method="fisher", empirical=True, reporter=heard)
    for key, value in expected.sigma.items():
        torch.testing.assert_close(found.sigma[key], value, rtol=1e-3, atol=1e-6)
    assert any("going on with" in line for line in heard.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "laplace"}, "method 'laplace' is unknown; choose one of fisher, ivon, tfb"),
        ({"ess": 0}, "ess 0: give a number > 0"),
        ({"ess": math.nan}, "ess nan: give a number > 0"),
        ({"prior": -1}, "prior -1: give empirical, or a number > 0"),
        ({"prior": "wide"}, "prior 'wide': give empirical"),
        ({"prior_strength": -1}, "prior_strength -1: give a number > 0"),
        ({"samples": 0}, "samples 0: give a number of draws"),
        ({"tolerance": 0.1}, "tolerance 0.1: it is for method tfb"),
        ({"method": "tfb", "tolerance": 0}, "tolerance 0: give nats > 0"),
        ({"method": "tfb", "ess": 10}, "ess 10: the width of method tfb is found by tolerance alone; leave it out"),
        ({"method": "tfb", "empirical": True}, "empirical: the width of method tfb"),
        ({"ess": 10, "validation": "x"}, "ess 10: validation chooses it"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IVONError, match=f"^{re.escape(message)}"):
        Settings(**options)


def test_tfb_needs_lora(plain_adapter: Path, chats: Path, copied: Callable[[Path], Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(plain_adapter)
    tensors = load_file(folder / MEAN_FILE)
    save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, folder / MEAN_FILE, {"format": "pt"})
    with pytest.raises(IVONError, match="has no LoRA matrices with weights other than 0"):
        fit(folder, chats, method="tfb")
    assert fit(folder, chats, method="fisher").sample(0)


SNAPSHOT = Snapshot({"a": torch.arange(3.0), "b/c": torch.ones(2, 2).T}, {"step": 3, "nll": {"0.5": 0.25}})


def same(one: Snapshot | None, other: Snapshot) -> bool:
    assert one is not None
    return one.values == other.values and all(value.equal(one.tensors[key]) for key, value in other.tensors.items())


def test_what_was_written_is_read_by_the_same_fit_alone(tmp_path: Path) -> None:
    path = tmp_path / ".out.fit"
    State(path, "mine").write(SNAPSHOT)
    assert same(State(path, "mine").read(), SNAPSHOT)
    assert State(path, "other").read() is None
    State(path, "other").write(Snapshot({}, {}))
    assert State(path, "mine").read() is None
    assert list(tmp_path.iterdir()) == [path]
    for damaged in (b"", b"{", b"\x08\0\0\0\0\0\0\0{}      "):
        path.write_bytes(damaged)
        assert State(path, "mine").read() is None


def test_it_is_written_now_and_then_and_on_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    kept = State(path, "mine")
    kept.keep(lambda: pytest.fail("too early"))
    monkeypatch.setattr(state, "_EVERY", 0.0)
    kept.keep(lambda: SNAPSHOT)
    assert same(kept.read(), SNAPSHOT)
    path.unlink()
    with pytest.raises(KeyboardInterrupt), kept.kept(lambda: SNAPSHOT):
        raise KeyboardInterrupt
    assert same(kept.read(), SNAPSHOT)
    with kept.kept(lambda: pytest.fail("nothing happened")):
        pass


def test_a_place_that_cannot_be_written_is_told_and_without_a_path_nothing_is_kept(tmp_path: Path) -> None:
    kept = State(None, "mine")
    kept.write(SNAPSHOT)
    kept.keep(lambda: pytest.fail("there is no file"))
    assert kept.read() is None
    (tmp_path / "no").touch()
    with pytest.raises(IVONError, match="cannot be written"):
        State(tmp_path / "no" / "x", "mine").write(SNAPSHOT)
    with pytest.raises(KeyError), State(tmp_path / "no" / "x", "mine").kept(lambda: SNAPSHOT):
        raise KeyError
    State(tmp_path / "new" / "deep" / "x", "mine").write(SNAPSHOT)
    assert same(State(tmp_path / "new" / "deep" / "x", "mine").read(), SNAPSHOT)
