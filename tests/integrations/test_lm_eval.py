"""The harness's model class on a task that is defined here, against likelihoods computed by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.integrations.lm_eval import IVONPosterior
from axolotl_ivon.models.draws import AdapterSlots
from axolotl_ivon.models.session import load_model, load_tokenizer

Draw = dict[str, torch.Tensor]
ByHand = Callable[[list[Draw], str, str], float]
QUESTIONS = [("red sun", ["cold", "warm dog"], 1), ("moon rain", ["good", "bad cat"], 0), ("bird", ["yes", "no"], 0)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    lines = [json.dumps({"q": q, "choices": choices, "label": label}) for q, choices, label in QUESTIONS]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} is"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder


@pytest.fixture(scope="module")
def by_hand(tiny_adapter: Path) -> ByHand:
    """A function of draws, context and continuation: the log of the mean likelihood over the draws."""
    model = load_model(tiny_adapter)
    tokenizer = load_tokenizer(tiny_adapter, model.get_base_model().config._name_or_path)

    @torch.no_grad()
    def log_mean(draws: list[Draw], context: str, continuation: str) -> float:
        start = len(tokenizer(context)["input_ids"])
        ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
        total = 0.0
        for draw in draws:
            with AdapterSlots(model).loaded(draw):
                log_p = model(ids[None]).logits[0].double().log_softmax(-1)
            total += math.exp(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))))
        return math.log(total / len(draws))

    return log_mean


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def make(adapter: Path, **options: Any) -> IVONPosterior:
    return IVONPosterior(str(adapter), batch_size=2, **options)


def test_likelihoods_are_averaged_over_draws_and_then_cached(tiny_adapter: Path, by_hand: ByHand) -> None:
    model = make(tiny_adapter, samples=3, tau="0.5", ratio=0.2, seed=7)
    cached: list[tuple[str, object, object]] = []
    model.cache_hook = SimpleNamespace(add_partial=lambda *entry: cached.append(entry))
    q = Posterior.from_pretrained(tiny_adapter).prune(0.2).temper(0.5)
    draws = [q.sample(7, member) for member in range(3)]
    asked = [("red sun is", " warm dog"), ("moon", " cold")]
    answers = model.loglikelihood([request(*pair) for pair in asked], disable_tqdm=True)
    assert cached == [("loglikelihood", pair, answer) for pair, answer in zip(asked, answers, strict=True)]
    values = [value for value, _ in answers]
    assert values == pytest.approx([by_hand(draws, *pair) for pair in asked], rel=1e-4)
    # The average lies between the draws, and is not the average of the logarithms.
    each = [by_hand([draw], "moon", " cold") for draw in draws]
    assert min(each) < values[1] < max(each)
    assert values[1] > sum(each) / 3
    model = make(tiny_adapter, samples=5, tau="inf")
    mean = dict(Posterior.from_pretrained(tiny_adapter).mean)
    [(value, _)] = model.loglikelihood([request("moon", " cold")], disable_tqdm=True)
    assert value == pytest.approx(by_hand([mean], "moon", " cold"), rel=1e-5)


def test_documents_are_averaged_whole(tiny_adapter: Path) -> None:
    model = make(tiny_adapter, samples=3, tau=0.3, max_length=8)
    text = "red sun moon rain dog cat bird warm cold fast slow good bad yes no one two three"
    [found] = model.loglikelihood_rolling([request(text)], disable_tqdm=True)
    q = Posterior.from_pretrained(tiny_adapter).temper(0.3)
    each = []
    for member in range(3):
        with model._slots.loaded(q.sample(0, member)):
            each += HFLM.loglikelihood_rolling(model, [request(text)], disable_tqdm=True)
    assert len(set(each)) == 3
    assert found == pytest.approx(torch.tensor(each, dtype=torch.float64).logsumexp(0).item() - math.log(3))


def test_a_task_by_api_and_command_line(tiny_adapter: Path, by_hand: ByHand, task: Path, tmp_path: Path) -> None:
    asked = {"model": "ivon-posterior", "model_args": f"adapter={tiny_adapter},samples=3,tau=0.5"}
    manager = TaskManager(include_path=str(task), include_defaults=False)
    found = lm_eval.simple_evaluate(**asked, tasks=["tiny"], task_manager=manager, batch_size=4, bootstrap_iters=0)
    q = Posterior.from_pretrained(tiny_adapter).temper(0.5)
    draws = [q.sample(0, member) for member in range(3)]
    right, disagreement = 0, 0.0
    for question, choices, label in QUESTIONS:
        each = torch.tensor([[by_hand([d], f"{question} is", f" {c}") for c in choices] for d in draws]).exp()
        right += int(each.mean(0).argmax()) == label
        each /= each.sum(1, keepdim=True)
        disagreement += (torch.special.entr(each.mean(0)).sum() - torch.special.entr(each).sum(1).mean()).item() / 3
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(right / 3)
    told = found["config"]["mutual_information"]
    assert told == {"tiny": {"mean": pytest.approx(disagreement, rel=1e-2), "documents": 3}}
    assert disagreement > 0

    options = {**asked, "tasks": "tiny", "include_path": task, "output_path": tmp_path / "out"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "axolotl_ivon.lm_eval", *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    [written] = (tmp_path / "out").rglob("results*.json")
    results = json.loads(written.read_text())
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(right / 3)
    mean = pytest.approx(told["tiny"]["mean"], rel=1e-5)  # another process, with its own number of threads
    assert results["config"]["mutual_information"] == {"tiny": {"mean": mean, "documents": 3}}


def test_only_choices_with_their_questions_have_disagreement(tiny_adapter: Path) -> None:
    def asked(task: str, doc: int, *pairs: tuple[str, str]) -> list[Instance]:
        return [Instance("loglikelihood", {}, pair, idx, (task, doc, 1)) for idx, pair in enumerate(pairs)]

    a, b = ("moon", " cold"), ("moon", " good")
    priors = ("", " cold"), ("", " good")
    requests = [*asked("choices", 0, a, b), *asked("with-priors", 0, a, b, *priors), *asked("one", 0, a)]
    model = make(tiny_adapter, samples=3, tau=0.5)
    assert model.get_model_info()["mutual_information"] == {}
    model.loglikelihood(requests, disable_tqdm=True)
    model.loglikelihood(requests, disable_tqdm=True)  # again is not twice as many
    told = model.get_model_info()["mutual_information"]
    assert told.keys() == {"choices", "with-priors"}
    assert told["choices"] == told["with-priors"]
    assert told["choices"]["documents"] == 1
    mean = make(tiny_adapter, tau="inf")
    mean.loglikelihood(requests, disable_tqdm=True)
    assert mean.get_model_info()["mutual_information"] == {}


def test_text_is_generated_from_the_mean(tiny_adapter: Path) -> None:
    model = make(tiny_adapter, samples=2, ratio=0.2)
    [text] = model.generate_until([request("red sun", {"max_gen_toks": 5, "until": ["\n"]})], disable_tqdm=True)
    pruned = dict(Posterior.from_pretrained(tiny_adapter).prune(0.2).mean)
    base = load_model(tiny_adapter)
    tokenizer = load_tokenizer(tiny_adapter, base.get_base_model().config._name_or_path)
    ids = tokenizer("red sun", return_tensors="pt")["input_ids"]
    with AdapterSlots(base).loaded(pruned):
        expected = base.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True).split("\n")[0]


def test_bad_settings_are_told(tiny_adapter: Path, plain_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(IVONError, match="tau"):
        make(tiny_adapter, tau=0)
    with pytest.raises(IVONError, match="has no ivon_sigma"):
        make(plain_adapter)
    with pytest.raises(IVONError, match="recommended cannot be read"):
        make(tiny_adapter, recommended=str(tmp_path / "nothing.json"))
