"""Members on a server that answers as vLLM does, against the same draws in memory: figures are equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from openai_server import MEMBERS, Server, serving
from tiny import chat, write_chats

from axolotl_ivon import Posterior
from axolotl_ivon.posterior.sample import EnsemblePlan, sample

LABELS = "yes no,A,yes"
TRAINED = {"choices": json.dumps(LABELS.split(",")), "system_prompt": "good or bad"}


@pytest.fixture(scope="module")
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(facts=TRAINED)


@pytest.fixture(scope="module")
def ensemble(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "ensemble"
    assert sample(Posterior.from_pretrained(adapter), folder, EnsemblePlan(3, include_mean=True)) == MEMBERS
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chats by what their answers are: two letters, labels that begin alike, text."""
    folder = tmp_path_factory.mktemp("data")
    answers = {"labels": LABELS.split(","), "text": ["one two three.", "good bird", "red"]}
    files = {"letters": write_chats(folder / "letters.jsonl", 16)}
    for name, texts in answers.items():
        rows = [chat(f"moon {number}", texts[number % 3]) for number in range(9)]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def numbers(document: Any, names: set[str] | None = None) -> Any:
    """Return the numbers of a document by their place in it."""

    def found(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], float]]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in pairs:
            yield from found(part, (*place, key))
        if isinstance(value, (int, float)) and (names is None or names & {*place}):
            yield place, value

    return dict(found(document, ()))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("letters", ()),
        ("labels", ()),
        ("labels", ("--by-length",)),
        ("letters", ("--calibrate", "shifted", "--ood", "shifted")),
    ],
)
def test_eval_of_choices_is_that_in_memory(
    server: Server, ensemble: Path, adapter: Path, files: dict[str, Path], tmp_path: Path, kind: str, words: Any
) -> None:
    shifted = write_chats(tmp_path / "shifted.jsonl", 12, seed=5)
    more = [shifted if word == "shifted" else word for word in words]
    run = Cli()
    ours = run.json("eval", ensemble, "--data", files[kind], *more, "--endpoint", server.url)
    here = run.json("eval", adapter, "--data", files[kind], *more, "-n", 3)
    assert [row["name"] for row in ours["rows"]] == [row["name"] for row in here["rows"]]
    assert ours["rows"][0]["name"] == "base"
    for part in ("rows", "ood", "calibration"):
        assert numbers(ours[part]) == pytest.approx(numbers(here[part]), abs=1e-3), part
    assert (ours["samples"], ours["seed"], ours["mean_sha256"]) == (3, 0, here["mean_sha256"])


def test_answers_that_were_written(server: Server, ensemble: Path, adapter: Path, files: dict[str, Path]) -> None:
    run, words = Cli(), ("--data", files["text"], "--task", "generate")
    result = run.run("eval", ensemble, *words, "--endpoint", server.url, "--json")
    assert "vLLM returns the 20 likeliest tokens" in result.stderr
    ours, here = json.loads(result.stdout)["rows"], run.json("eval", adapter, *words, "-n", 3)["rows"]
    exact = {"accuracy", "nll", "perplexity", "predictions", "ece"}
    assert numbers(ours, exact) == pytest.approx(numbers(here, exact), abs=1e-3)
    for one, other in zip(ours, here, strict=True):
        for coarse in ("entropy", "expected_entropy", "mutual_information", "brier"):
            assert 0 <= one[coarse] <= other[coarse] + 1e-6
        assert other["entropy"] - one["entropy"] > 0.1  # 400 tokens, of which 20 are known
    told = run.error("eval", ensemble, *words, "--calibrate", files["letters"], "--endpoint", server.url, "--quiet")
    assert "a softmax temperature takes the probabilities of all tokens" in told
    told = run.error("eval", ensemble, *words, "--rows", "mean-pruned", "--endpoint", server.url, "--quiet")
    assert "the members are drawn already; give --tau and --ratio to `ivon-post sample`" in told


def test_predict_is_that_in_memory_and_asks_no_more_than_it_must(
    server: Server, ensemble: Path, adapter: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"cat {number}"}) + "\n" for number in range(5)))
    run, words = Cli(), ("--data", texts, "--threshold", 0.4)
    ours = run.json("predict", ensemble, *words, "--endpoint", server.url, "--endpoint", f"{server.url}/v1/")
    here = run.json("predict", adapter, *words, "-n", 3)
    assert ours["choices"] == here["choices"] == LABELS.split(",")  # of training, as is the system prompt
    assert numbers(ours["decisions"]) == pytest.approx(numbers(here["decisions"]), abs=1e-3)
    assert [d["label"] for d in ours["decisions"]] == [d["label"] for d in here["decisions"]]
    assert ours["samples"] == 3
    server.reset()
    run.json("predict", ensemble, "--data", texts, "--choices", "A,B,C,D", "-n", 2, "--endpoint", server.url)
    asked = [body["model"] for body in server.requests]
    assert set(asked) == {"sample-0000", "sample-0001"}
    assert 10 <= len(asked) <= 40


def test_sweep_finds_what_it_finds_in_memory_and_others_take_it(
    server: Server, ensemble: Path, adapter: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    data = write_chats(tmp_path / "validation.jsonl", 40, seed=7)
    run, words = Cli(), ("--data", data, "--risk", 0.9, "--coverage", 0.9, "--seed", 3)
    here = run.json("sweep", adapter, *words, "-n", 3, "--tau", "1,inf", "--ratio", 0, "-o", tmp_path / "here")
    # In memory the draws are those of the sweep's seed.
    assert sample(Posterior.from_pretrained(adapter), tmp_path / "e", EnsemblePlan(3, seed=3, include_mean=True))
    with serving(Server(tmp_path / "e", Path(server.base), MEMBERS)) as other:
        ours = run.json("sweep", tmp_path / "e", *words, "--endpoint", other.url, "-o", tmp_path / "ours")
    assert numbers(ours) == pytest.approx(numbers(here), abs=1e-3)
    assert ours["mean_sha256"] == here["mean_sha256"]
    given = ("--endpoint", server.url, "--recommended", tmp_path / "ours" / "recommended.json")
    rows = run.json("eval", ensemble, "--data", files["letters"], *given)["rows"]
    assert {"recommended", "recommended, answered"} <= {row["name"] for row in rows}
    decisions = run.json("predict", ensemble, "--data", files["letters"], "--choices", "A,B", "--set", 0.9, *given)
    assert decisions["temperature"] == ours["temperature"]
    assert decisions["threshold"] == ours["threshold"]
    assert all(decision["set"] for decision in decisions["decisions"])


def test_what_is_not_served_is_said(server: Server, adapter: Path, files: dict[str, Path], tmp_path: Path) -> None:
    run, folder = Cli(), tmp_path / "e"
    sample(Posterior.from_pretrained(adapter), folder, EnsemblePlan(2))
    server.base = "another"
    words = ("eval", folder, "--data", files["letters"], "--endpoint", server.url)
    result = run.run(*words, "--json")
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["posterior"]
    assert "no row for the base model: no server has it as " in result.stderr
    assert f"no row for the mean: {folder} has none; draw it with `ivon-post sample --include-mean`" in result.stderr
    assert "--rows mean: " in run.error(*words, "--rows", "mean", "-q")
    assert "has none; draw it with" in run.error("sweep", *words[1:], "-o", tmp_path / "x", "-q")
    server.longest = 12
    assert "tokens, but the model takes 10; shorten or remove it" in run.error(*words, "-q")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answer: {**answer, "choices": [{"text": ""}]}, "returns no prompt_logprobs; use vLLM"),
        (lambda answer: json.loads(json.dumps(answer).replace('"logprob"', '"p"')), "does not answer as OpenAI's"),
        (
            lambda answer: {"choices": [{"text": "", "prompt_logprobs": [None, {"1": {"logprob": 0}}]}]},
            "does not answer",
        ),
    ],
)
def test_what_is_none_of_vllms_answers(
    server: Server, ensemble: Path, files: dict[str, Path], spoil: Any, message: str
) -> None:
    server.spoil = spoil
    told = Cli().error("eval", ensemble, "--data", files["letters"], "--endpoint", server.url, "-q")
    assert f"--endpoint {server.url}" in told
    assert message in told
