"""benchmarks/continual: every method through a tiny sequence, the figures from made-up results, and the penalties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import two_classes

from benchmarks import continual
from benchmarks.fidelity.causal import Causal
from benchmarks.fidelity.data import Task


@pytest.fixture
def module(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, on the tiny Llama and two made-up tasks: is token 7, or token 8, in the text?"""

    def load(suite: str, bigbench: Any, folder: Path, seed: int) -> tuple[list[Task], list[torch.Tensor], Causal]:
        tasks = [
            Task(*(two_classes(count, count + token, token) for count in (24, 10, 12)), {}, 2, (60 + token, 70 + token))
            for token in (7, 8)
        ]
        model = Causal(tiny_llama, tasks[0].choices, seed, 2, ["q_proj", "v_proj"], 0.0, 1, torch.float32)
        rows = model.peft.base_model.model.lm_head.weight
        return tasks, [rows[list(task.choices)].detach() for task in tasks], model

    monkeypatch.setattr(continual, "load_suite", load)
    monkeypatch.setattr(continual, "SUITES", {"tiny": {"a": {}, "b": {}}})
    continual._FIRST.clear()
    return continual


SETTINGS = {"steps": 4, "lr": 5e-3, "seed": 1, "bigbench": None}


def test_every_method_gives_a_record_that_the_report_reads(module: Any, tmp_path: Path) -> None:
    records = []
    for method, strengths in module.METHODS.items():
        for strength in strengths[:2]:
            record = module.sequence("tiny", method, strength, SETTINGS, tmp_path)
            once = method in ("adamw-last", "adamw-joint")
            assert [len(row) for row in record["test"]] == ([2] if once else [1, 2])
            assert (len(record["validation"]), len(record["draws"])) == (2, 2 if method.startswith("ivon") else 0)
            records.append(json.loads(json.dumps(record)))
    text = module.report(records, tmp_path)
    assert all(name in text for name in module.NAMES.values())
    assert (tmp_path / "continual-tiny.png").stat().st_size > 1000


def test_methods_of_an_optimizer_share_the_first_task_and_nothing_else(module: Any, tmp_path: Path) -> None:
    runs = {}
    for shared in (True, False):
        for method, strength in (("adamw-warm", None), ("adamw-ewc", 1e3), ("ivon-warm", None), ("ivon-prior", 1.0)):
            if not shared:
                module._FIRST.clear()
            runs[shared, method] = module.sequence("tiny", method, strength, SETTINGS, tmp_path)["test"]
    for method in ("adamw-warm", "adamw-ewc", "ivon-warm", "ivon-prior"):
        assert runs[True, method] == runs[False, method]
    assert runs[True, "adamw-warm"][0] == runs[True, "adamw-ewc"][0]
    assert runs[True, "adamw-warm"][1] != runs[True, "adamw-ewc"][1]


@pytest.mark.parametrize("penalty", ["l2", "ewc"])
def test_the_penalties_pull_by_their_own_gradient(
    penalty: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, heads, model = module.load_suite("tiny", None, tmp_path, 0)
    learner = module.Learner(model, tasks, heads, 1, 5e-3, 0)
    learner.keep(f"adamw-{penalty}", 0)
    start, factors = learner.anchor, dict(learner.old)  # which goes on when a task is learned
    learner.load({name: value + 0.5 for name, value in start.items()})
    seen: list[dict[str, torch.Tensor]] = []

    class Noted(torch.optim.SGD):
        """Notes the gradients before the hooks of a step, and after them."""

        def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
            super().__init__(params, lr=lr)
            self.register_step_pre_hook(lambda *_: self.note())

        def note(self) -> None:
            seen.append({name: value.grad.clone() for name, value in model.trained().items()})

        def step(self, closure: Any = None) -> None:
            self.note()
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    module.learn_adamw(learner, 1, 2.0, penalty)
    before, after = seen[0], seen[1]
    for name in start:
        pull = 2.0 * (factors[name] if penalty == "ewc" else 1.0) * 0.5
        torch.testing.assert_close(
            after[name] - before[name], torch.zeros_like(before[name]) + pull, rtol=1e-3, atol=1e-4
        )


def test_the_fisher_information_is_that_of_the_model_s_own_labels(module: Any, tmp_path: Path) -> None:
    tasks, heads, model = module.load_suite("tiny", None, tmp_path, 0)
    learner = module.Learner(model, [*tasks], heads, 1, 1e-3, 0)
    found = module.fisher(learner, 0)
    # Its mean over the labels: Σ_y p(y|x)·(∂ log p(y|x))², by one backward pass for each label.
    exact = {name: torch.zeros_like(value) for name, value in model.trained().items()}
    for example in tasks[0].train:
        for label in range(2):
            logits = model(module.collate([example])).log_softmax(-1)[0]
            model.zero_grad()
            logits[label].backward()
            for name, value in model.trained().items():
                exact[name] += logits[label].exp().item() * value.grad.square() / len(tasks[0].train)
    total, expected = (sum(float(value.sum()) for value in one.values()) for one in (found, exact))
    assert total == pytest.approx(expected, rel=0.5)


def record(test: list[list[float]], **changes: Any) -> dict[str, Any]:
    def scores(row: list[float]) -> list[dict[str, float]]:
        return [{"accuracy": value, "nll": 1 - value, "ece": 0.1} for value in row]

    base = {"suite": "tiny", "method": "adamw-warm", "strength": None, "seed": 0, "tasks": ["a", "b"], "draws": []}
    return {**base, "test": [*map(scores, test)], "validation": scores(test[-1]), **changes}


def test_forgetting_and_averages_are_those_of_the_matrix(module: Any) -> None:
    found = module.summary(record([[0.8], [0.6, 0.9]]))
    assert found["average"] == pytest.approx(75)
    assert found["backward"] == pytest.approx(-20)
    assert found["lost"] == pytest.approx(0.2)
    assert (found["newest"], found["nll"], found["ece"]) == pytest.approx((90, 0.25, 10))
    assert "backward" not in module.summary(record([[0.6, 0.9]]))


def test_the_strength_is_chosen_by_validation_over_the_seeds_that_all_have(module: Any) -> None:
    runs = [
        record([[0.8], [0.6, 0.9]], method="adamw-ewc", strength=1.0),
        record([[0.8], [0.7, 0.7]], method="adamw-ewc", strength=10.0),
        record([[0.8], [0.7, 0.9]], method="adamw-ewc", strength=10.0, seed=1),  # which the other was not asked
    ]
    lines = [line for line in module.report(runs, None).splitlines() if "EWC" in line]
    assert ["(chosen)" in line for line in lines] == [True, False]
    assert "| 2 | 75.0 ± 5.0 | -10.0 ± 0.0 | +0.100 ± 0.000 |" in lines[1]
