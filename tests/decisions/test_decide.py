"""Decisions against PEFT and transformers, one label, one draw and one text at a time."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import class_probabilities, draw_probabilities
from tiny import build_classifier, with_sigma
from torch import Tensor
from transformers import AutoTokenizer

from axolotl_ivon import IVONError, Posterior, predict
from axolotl_ivon.data.chats import Example, read_texts
from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.decisions.decide import Decider
from axolotl_ivon.decisions.decision_file import DecisionFile, DecisionLines
from axolotl_ivon.decisions.rule import DecisionRule
from axolotl_ivon.evaluation.evaluate import Sampling
from axolotl_ivon.records.decision import Decision

LABELS = ["yes no", "A", "yes", "dog cat sun"]
TEXTS = ["red sun", "one two three four five six", "moon", "bad rain"]


def each_draw(folder: Path, base: Path, draws: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return probabilities [draws, texts, labels] after the tokenizer's own prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = [tokenizer(label)["input_ids"] for label in LABELS]
    labels[2].append(tokenizer.eos_token_id)  # "yes" alone, and not "yes no"
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return draw_probabilities(base, [EncodedExample(ids, [], [], labels) for ids in prompts], folder, draws)


def check(decisions: list[Decision], members: Tensor, temperature: float = 1.0) -> None:
    average = members.mean(0)
    scaled = (average.log() / temperature).softmax(-1)
    expected = torch.special.entr(members).sum(-1).mean(0)
    for number, decision in enumerate(decisions):
        assert list(decision.probabilities) == LABELS
        assert list(decision.probabilities.values()) == pytest.approx(scaled[number].tolist(), rel=1e-4)
        assert decision.label == LABELS[int(scaled[number].argmax())]
        assert decision.confidence == decision.probabilities[decision.label]
        assert decision.expected_entropy == pytest.approx(expected[number].item(), rel=1e-4)
        total = torch.special.entr(average[number]).sum()
        assert decision.mutual_information == pytest.approx((total - expected[number]).item(), rel=1e-2, abs=1e-6)


def test_one_call_gives_what_peft_gives_a_label_at_a_time(tiny_adapter: Path, tiny_llama: Path) -> None:
    q = Posterior.from_pretrained(tiny_adapter)
    drawn = each_draw(tiny_adapter, tiny_llama, [q.sample(4, member) for member in range(3)])
    decisions = predict(tiny_adapter, TEXTS, LABELS, n=3, seed=4)
    check(decisions, drawn)
    assert min(decision.mutual_information for decision in decisions) > 0
    assert all(decision.abstain is None for decision in decisions)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    assert predict(q, chats, LABELS, n=3, seed=4) == decisions
    assert predict(tiny_adapter, [], LABELS) == []
    for texts in (iter(TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object)):
        assert predict(tiny_adapter, texts, LABELS, n=3, seed=4) == decisions


def test_a_recommendation_is_what_is_predicted_with(
    tiny_adapter: Path, tiny_llama: Path, copied: Callable[[Path], Path]
) -> None:
    folder = copied(tiny_adapter)
    point = {"tau": 4, "ratio": 0.0, "temperature": 2.0, "threshold": 0.3}
    (folder / "recommended.json").write_text(json.dumps(point))
    q = Posterior.from_pretrained(tiny_adapter).temper(4)
    decisions = predict(folder, TEXTS, LABELS, n=2)
    check(decisions, each_draw(tiny_adapter, tiny_llama, [q.sample(0, 0), q.sample(0, 1)]), temperature=2)
    assert [d.abstain for d in decisions] == [d.confidence < 0.3 for d in decisions]
    assert {d.abstain for d in predict(folder, TEXTS, LABELS, n=2, threshold=1.0)} == {True}
    (folder / "recommended.json").write_text(json.dumps({"tau": "inf", "ratio": 0.0}))
    mean = predict(folder, TEXTS, LABELS)
    check(mean, each_draw(tiny_adapter, tiny_llama, [dict(q.mean)]))
    assert {decision.mutual_information for decision in mean} == {0}
    (folder / "recommended.json").unlink()
    (folder / "ivon_sigma.safetensors").unlink()
    assert predict(folder, TEXTS, LABELS) == mean


def test_a_text_is_asked_after_the_system_prompt_of_training(make_adapter: Callable[..., Path]) -> None:
    bare, system = {"role": "user", "content": "red"}, {"role": "system", "content": "dog or cat?"}
    trained = make_adapter(facts={"system_prompt": system["content"]})
    asked, chat = predict(trained, ["red", [bare]], LABELS, n=1)
    assert [asked, chat] == predict(make_adapter(), [[system, bare], "red"], LABELS, n=1)
    assert asked != chat


def test_the_labels_are_those_of_training_or_of_the_head(
    make_adapter: Callable[..., Path], tmp_path: Path, tiny_llama: Path
) -> None:
    trained = make_adapter(facts={"choices": '["A", "B"]'})
    assert list(predict(trained, ["red"], n=1)[0].probabilities) == ["A", "B"]
    head = with_sigma(build_classifier(tiny_llama, tmp_path / "head"), lambda mean: torch.full_like(mean, 1e-9))
    decisions = predict(head, TEXTS, n=2)
    for p, decision in zip(class_probabilities(tiny_llama, TEXTS, head), decisions, strict=True):
        assert list(decision.probabilities) == ["LABEL_0", "LABEL_1", "LABEL_2"]
        assert list(decision.probabilities.values()) == pytest.approx(p.tolist(), rel=1e-4)
    with pytest.raises(IVONError, match="choices: the adapter has a classification head with labels of its own"):
        predict(head, TEXTS, ["A", "B"])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["x"], {}, r"does not say which answers its training data had; name the labels with choices A,B"),
        (["x"], {"choices": ["A", ""]}, "choices A,: give at least two different, non-empty strings"),
        (["x"], {"choices": "A,B"}, r"choices: 'A,B' is no list of strings; give one, as \['A', 'B'\]"),
        (["x"], {"choices": [1, 2]}, r"choices: \[1, 2\] is no list of strings"),
        (["x"], {"choices": ["A", "B"], "threshold": 2}, r"threshold 2 is outside \[0, 1\]"),
        (["x", " "], {"choices": ["A", "B"]}, "text:2: no user turn with a text; add the question"),
        ("x", {"choices": ["A", "B"]}, "texts: 'x' is one text; give a list of them"),
        ([1], {"choices": ["A", "B"]}, "texts: 1 is no text; give strings, or lists of messages"),
        (np.array([1.5]), {"choices": ["A", "B"]}, r"texts: .*1\.5.* is no text; give strings, or lists of messages"),
        (5, {"choices": ["A", "B"]}, "texts: 5 is no text; give a list of them"),
        (["x", "red\ud83d"], {"choices": ["A", "B"]}, "text:2: holds half a surrogate pair"),
        ([[{"role": "user", "content": "\ud83d"}]], {"choices": ["A", "B"]}, "text:1: holds half a surrogate pair"),
        (["x"], {"choices": ["A", "B"], "n": 0}, "n 0: give a number of draws from 1 on"),
        ([[{"role": "assistant", "content": "x"}]], {"choices": ["A", "B"]}, "text:1: no user turn"),
        (["red " * 600], {"choices": ["A", "B"]}, r"text:1: \d+ tokens, but the model takes 512"),
    ],
)
def test_what_cannot_be_decided_is_refused(tiny_adapter: Path, texts: Any, options: Any, message: str) -> None:
    with pytest.raises(IVONError, match=message):
        predict(tiny_adapter, texts, **{"n": 1, **options})


def test_a_stream_decides_the_first_texts_first(tiny_adapter: Path) -> None:
    decider = Decider(tiny_adapter, ["A", "B"], DecisionRule(), Sampling(1), tau=math.inf)
    assert (decider.passes, decider.settings["tau"]) == (1, "inf")
    read: list[int] = []
    lines = (bytes(read.append(n) or f"text {n}", "utf-8") for n in range(100))
    windows = decider.windows(read_texts(lines))
    first = next(windows)
    assert len(read) == len(first) == 16
    rest = [pair for window in windows for pair in window]
    assert [example.line for example, _ in [*first, *rest]] == list(range(1, 101))


@pytest.mark.parametrize("stacked", [True, False])
def test_draws_are_made_once_for_all_texts(tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch, stacked: bool) -> None:
    def refuse(*_: Any) -> None:
        raise IVONError("as with DoRA: one draw runs after another")

    made: list[int] = []
    sample = Posterior.sample
    if not stacked:
        monkeypatch.setattr("axolotl_ivon.models.draws.Stack", refuse)
    monkeypatch.setattr(Posterior, "sample", lambda q, seed, k: made.append(k) or sample(q, seed, k))
    windows = [TEXTS[:3], TEXTS[3:], TEXTS]
    anew = [predict(tiny_adapter, window, LABELS, n=3, seed=4) for window in windows]
    made.clear()
    decider = Decider(tiny_adapter, LABELS, sampling=Sampling(3, 4))
    assert [decider(window) for window in windows] == anew  # to the last bit
    assert made == [0, 1, 2]


CERTAINTY = {"confidence": 0.75, "expected_entropy": 0.5, "mutual_information": 0.0}
DECISION = Decision(label="a,b", abstain=True, probabilities={"a,b": 0.75, "c": 0.25}, **CERTAINTY)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_half_a_line_is_dropped_and_other_texts_are_refused(tmp_path: Path, form: str) -> None:
    texts = ['say "a, b"', "two\u2028lines", "three"]
    given = [text.encode() for text in texts]
    pairs = [(example, DECISION) for example in read_texts(given)]
    lines, path = DecisionLines(form, ["a,b", "c"]), tmp_path / "out"
    DecisionFile(path, lines, {"seed": 1}).append(pairs)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    examples = read_texts(given)
    file = DecisionFile(path, lines, {"seed": 1})
    assert file.resume(examples) == 2
    assert (file.labels, file.abstained) == ({"a,b": 2}, 2)
    file.append([(example, DECISION) for example in examples])
    assert path.read_bytes() == whole
    with pytest.raises(IVONError, match="is about another text than data has there; choose another output"):
        DecisionFile(path, lines, {"seed": 1}).resume(read_texts([b"other", *given[1:]]))
    with pytest.raises(IVONError, match="out was made with seed 1, not 2; choose another output"):
        DecisionFile(path, lines, {"seed": 2})


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_other_conversations_that_end_alike_are_refused(tmp_path: Path, form: str) -> None:
    """A line has the last message alone; what comes before it, and the tools, make the decision as well."""

    def chats(system: str, tools: bool = False) -> list[Example]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "red"}]
        record = {"messages": messages, **({"tools": [{"type": "function"}]} if tools else {})}
        return list(read_texts([json.dumps(record).encode()] * 4))

    lines, path = DecisionLines(form, ["a,b", "c"]), tmp_path / "out"

    def run(examples: list[Example], upto: int) -> int:
        file, left = DecisionFile(path, lines, {"seed": 1}), iter(examples)
        resumed = file.resume(left)
        for example in itertools.islice(left, upto - resumed):
            file.append([(example, DECISION)])
        return resumed

    assert [run(chats("be kind"), upto) for upto in (2, 3)] == [0, 2]
    for other in (chats("be brief"), chats("be kind", tools=True)):
        with pytest.raises(IVONError, match=r"out is about other conversations than data has: .* choose another outp"):
            run(other, 4)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[: -2 if form == "jsonl" else -3]))
    with pytest.raises(IVONError, match="other conversations than data has"):  # as soon as that can be known
        run(chats("be brief"), 4)
    path.write_bytes(whole)
    assert run(chats("be kind"), 4) == 3
    (tmp_path / "out.settings.json").write_text(json.dumps({"seed": 1, "format": form}))  # of an earlier version
    assert run(chats("be kind"), 4) == 4


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_run_without_texts_leaves_an_empty_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / "out"
    lines = DecisionLines(form, ["a", "b"])
    path.write_text("of an earlier run\n")
    file = DecisionFile(path, lines, {}, overwrite=True)
    assert file.resume(iter([])) == 0
    assert path.read_text() == "of an earlier run\n"  # looking changes nothing
    file.append([])
    assert path.read_text().splitlines() == lines.head
    again = DecisionFile(path, lines, {})
    assert again.resume(iter([])) == 0
    again.append([])
    assert path.read_text().splitlines() == lines.head


def test_threads_may_share_one(tiny_adapter: Path) -> None:
    decider = Decider(tiny_adapter, choices=["A", "B"], sampling=Sampling(3))
    texts = [[f"{word} {other} sun" for other in ("dog", "cat", "bird")] * 8 for word in ("red", "blue", "green")] * 6
    expected = [decider(each) for each in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decider, texts)) == expected


def test_settings_know_the_sigma_of_draws(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    wide, narrow = (Posterior.from_pretrained(make_adapter()).temper(tau) for tau in (1, 4))
    narrow = replace(narrow, metadata=wide.metadata)  # another σ that says the same of itself, around the same mean
    for tau, differ in ((1.0, True), (math.inf, False)):
        one, other = (
            Decider(posterior, ["A", "B"], sampling=Sampling(1), tau=tau).settings for posterior in (wide, narrow)
        )
        assert (one != other) == differ
    path, lines = tmp_path / "out", DecisionLines("jsonl", ["A", "B"])
    DecisionFile(path, lines, {"sigma": "one"}).append([])
    with pytest.raises(IVONError, match="out was made with sigma 'one', not 'other'"):
        DecisionFile(path, lines, {"sigma": "other"})
    (tmp_path / "out.settings.json").write_text('{"format": "jsonl"}')  # of an earlier version
    DecisionFile(path, lines, {"sigma": "other"})
