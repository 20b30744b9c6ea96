"""One evaluation from end to end: the record, and its verdicts in words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from brute_force import draw_probabilities
from heard import Heard
from tiny import build_llama, build_lora, with_sigma, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_ivon import IVONError
from axolotl_ivon.data.encode import encode
from axolotl_ivon.evaluation.evaluate import EvaluationData, Sampling
from axolotl_ivon.evaluation.run import run, verdicts
from axolotl_ivon.evaluation.variants import Variant, VariantChoice, paper_variants
from axolotl_ivon.metrics.bootstrap import compare, standard_errors
from axolotl_ivon.metrics.scores import metrics
from axolotl_ivon.records.evaluation import Difference, ExampleRecord, VariantResult

THREE = Sampling(samples=3)


def test_the_record_says_what_the_scores_say(tiny_adapter: Path, chats: Path, tmp_path: Path) -> None:
    names = ["valid", "other", "second"]
    valid, other, second = (write_chats(tmp_path / f"{name}.jsonl", 9, n) for n, name in enumerate(names, 3))
    advice = Variant("recommended", 0.5, 0.3, temperature=2.0, threshold=0.51)
    choice = VariantChoice(
        ["base", "mean", "posterior"], 0.5, 0.3, [Variant("mean+temperature", temperature=9.0), advice]
    )
    data, written = EvaluationData([chats, second], [other], valid), tmp_path / "examples.jsonl"
    evaluated = run(tiny_adapter, data, choice, THREE, output=str(written))
    record, scores = evaluated.record, dict(zip([v.name for v in evaluated.variants], evaluated.scores, strict=True))
    assert list(scores) == ["base", "mean", "posterior", "recommended", "mean+temperature", "posterior+temperature"]
    assert [row.name for row in record.rows] == 2 * [*scores, "recommended, answered"]
    assert record.files == [str(chats), str(second)]
    assert record.ood_files == [str(other)]
    for path, numbers in evaluated.evaluation.files.items():
        parts = {name: score.of_groups(torch.tensor(numbers)) for name, score in scores.items()}
        for name, part in parts.items():
            [row] = (row for row in record.rows if (row.name, row.data) == (name, path))
            assert (row.examples, row.samples) == (len(numbers), 1 if name.startswith(("base", "mean")) else 3)
            assert {metric: row.value(metric) for metric in metrics(part)} == metrics(part)
            assert {metric: row.se.value(metric) for metric in metrics(part)} == standard_errors(part)
            for than in ("base", "mean", "mean+temperature"):
                paired = compare(part, parts[than]) if than != name else {}
                assert row.versus(than) == {metric: Difference(**each._asdict()) for metric, each in paired.items()}
        whole = parts["recommended"]
        [answered] = (row for row in record.rows if (row.name, row.data) == ("recommended, answered", path))
        part = whole.where(whole.confidence >= 0.51)
        assert (answered.examples, answered.coverage) == (len(part.group), len(part.group) / len(numbers))
        assert answered.accuracy == metrics(part)["accuracy"]
    assert record.calibration.temperatures["mean+temperature"] == record.rows[4].temperature
    assert (record.tau, record.prune_ratio, record.samples) == (0.5, 0.3, 3)
    lines = [line for _, line in ExampleRecord.load_lines(written, "output")]
    assert lines == list(evaluated.examples())
    for line in lines:
        assert line.rows["recommended"].abstain == (line.rows["recommended"].confidence < 0.51)
        assert {row.abstain for name, row in line.rows.items() if name != "recommended"} == {None}
    assert {line.rows["recommended"].abstain for line in lines} == {True, False}
    # Nobody scaled a draw.
    assert {line.rows["posterior+temperature"].mutual_information for line in lines} == {None}
    assert Counter(line.data for line in lines) == {str(chats): 24, str(second): 9, str(other): 9}
    assert type(record).parse(json.loads(json.dumps(record.dump(), allow_nan=False)), "here") == record


CALL = {"tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"word": "sun"}}}]}


def test_the_answers_out_of_the_distribution_do_not_count(tiny_adapter: Path, chats: Path, tmp_path: Path) -> None:
    """Chats with the choices of the data, with others, without any, and bare texts are told apart alike."""
    lines = [json.loads(line) for line in write_chats(tmp_path / "same.jsonl", 9, 3).read_text().splitlines()]
    asked = [line["messages"][:1] for line in lines]
    forms = {
        "other": [{"messages": [*turns, {"role": "assistant", "content": "C D"}]} for turns in asked],
        "calls": [{"messages": [*turns, {"role": "assistant", "content": "C D", **CALL}]} for turns in asked],
        "none": [{"messages": turns} for turns in asked],
        "text": [{"text": turns[0]["content"]} for turns in asked],
    }
    for name, rows in forms.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ood = [tmp_path / f"{name}.jsonl" for name in ("same", *forms)]
    evaluated = run(tiny_adapter, EvaluationData([chats], ood), VariantChoice(["mean", "posterior"]), THREE)
    first, *others = ([(r.name, r.score, r.auroc) for r in evaluated.record.ood if r.data == str(path)] for path in ood)
    assert len(first) == 6
    for other in others:
        for own, expected in zip(other, first, strict=True):
            assert own == (*expected[:2], pytest.approx(expected[2]))
    told = {str(path): [line for line in evaluated.examples() if line.data == str(path)] for path in ood}
    assert {line.rows["mean"].right for line in told[str(ood[0])]} == {True, False}
    for path, answer in zip(ood[1:], ("C D", "C D", "", ""), strict=True):
        assert {(line.answer, line.rows["mean"].right, line.rows["mean"].nll) for line in told[str(path)]} == {
            (answer, False, None)
        }
    with pytest.raises(IVONError, match=r"ood .*text.jsonl:1 has no answer, .* task generate; give chats with answers"):
        run(tiny_adapter, EvaluationData([chats], ood[4:], task="generate"), VariantChoice(["mean"]))
    with pytest.raises(IVONError, match="is given twice"):
        run(tiny_adapter, EvaluationData([chats], [ood[4], ood[4]]))


def test_what_is_answered_is_what_does_not_abstain(tiny_adapter: Path, chats: Path) -> None:
    """A confidence that differs from the threshold in its last bits reaches it, in the row as in the lines."""
    data = EvaluationData([chats])
    [scores] = run(tiny_adapter, data, VariantChoice(["mean"])).scores
    added = Variant("recommended", threshold=max(scores.confidence.tolist()) + 5e-10)
    evaluated = run(tiny_adapter, data, VariantChoice(["mean"], added=[added]))
    sure = [line for line in evaluated.examples() if not line.rows["recommended"].abstain]
    assert evaluated.record.rows[-1].examples == len(sure) > 0


def test_nothing_answered_has_no_metrics(tiny_adapter: Path, chats: Path) -> None:
    choice = VariantChoice(["mean"], added=[Variant("recommended", 1.0, threshold=1.0)])
    rows = run(tiny_adapter, EvaluationData([chats]), choice, THREE).record.rows
    assert [row.name for row in rows] == ["mean", "recommended", "recommended, answered"]
    assert (rows[2].examples, rows[2].coverage, rows[2].error_bound) == (0, 0, 1)
    assert {rows[2].value(metric) for metric in ("accuracy", "nll", "aurc")} == {None}


@pytest.mark.parametrize(("task", "score"), [("generate", "probability"), ("choice", "agreement")])
def test_a_threshold_of_something_else_is_left_out(tiny_adapter: Path, chats: Path, task: str, score: str) -> None:
    heard = Heard()
    choice = VariantChoice(["mean"], added=[Variant("recommended", 1.0, threshold=0.5, score=score)])
    rows = run(tiny_adapter, EvaluationData([chats], task=task), choice, THREE, reporter=heard).record.rows
    assert [row.name for row in rows] == ["mean", "recommended"]
    assert "use it with `ivon-post mbr`" in heard.notes[0]


@pytest.mark.parametrize(
    "lora",
    [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"use_dora": True},
     {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
     {"bias": "all"}],
    ids=str,
)  # fmt: skip
def test_the_row_of_the_base_model_is_the_base_models(tmp_path: Path, lora: Any) -> None:
    torch.manual_seed(0)
    base = build_llama(tmp_path / "base", attention_bias=bool(lora.get("bias")))
    adapter, heard = with_sigma(build_lora(base, tmp_path / "adapter", noise=0.1, **lora)), Heard()
    choice, data = VariantChoice(["base", "mean"]), EvaluationData([write_chats(tmp_path / "chats.jsonl", 8)])
    evaluated = run(adapter, data, choice, THREE, reporter=heard)
    items = encode(AutoTokenizer.from_pretrained(base), evaluated.evaluation.examples, "choice", choices=("A", "B"))
    right = draw_probabilities(base, items, None, [{}])[0, range(8), [item.targets[0] for item in items]]
    row = next((row for row in evaluated.record.rows if row.name == "base"), None)
    changed = bool(lora.get("bias")) or str(lora.get("init_lora_weights")).startswith(("pissa", "olora"))
    assert (row is None) == changed
    if row is not None:
        assert row.nll == pytest.approx(-right.log().mean().item(), rel=1e-4)
        return
    assert heard.notes[0].startswith("no row for the base model: ")
    assert evaluated.record.rows[0].versus("base") == {}
    with evaluated.evaluation.model.disable_adapter(), torch.no_grad():
        ids, model = torch.tensor([items[0].ids]), AutoModelForCausalLM.from_pretrained(base)
        assert not torch.allclose(evaluated.evaluation.model(ids).logits, model(ids).logits, atol=1e-4)
    with pytest.raises(IVONError, match=r"rows base: .*; name other rows"):
        run(adapter, data, VariantChoice(["base"]), THREE)


def test_variants_are_chosen_by_name() -> None:
    known = paper_variants(2.0, 0.3)
    assert VariantChoice(["posterior", "base"], 2.0, 0.3).variants() == [known["base"], known["posterior"]]
    every = "base,mean,mean-pruned,posterior,posterior-pruned,mean[+]temperature,posterior[+]temperature,recommended"
    with pytest.raises(IVONError, match=f"rows x,mean: 'x' is unknown; choose from {every}"):
        VariantChoice(["x", "mean"]).variants()
    message = "rows recommended: 'recommended' takes a recommendation that has it; choose from base,.*,x"
    with pytest.raises(IVONError, match=message):
        VariantChoice(["recommended"], added=[Variant("x")]).variants()
    for bad, name in (((0.0, 0.0), "tau"), ((1.0, 1.1), "ratio")):
        with pytest.raises(IVONError, match=name):
            VariantChoice(["posterior-pruned"], *bad).variants()


def result(name: str, nll: float, error: float, than: str = "mean", **more: Any) -> VariantResult:
    versus = {"nll": {"difference": nll, "standard_error": error}, **more.pop("versus", {})}
    row = {"name": name, "data": "a", "examples": 300, "samples": 10, f"versus_{than}": versus, **more}
    return VariantResult.parse(row, "here")


ACCURACY = {"accuracy": {"difference": 0.35, "standard_error": 0.083}}
ECE = {"ece": {"difference": 0.0, "standard_error": None}}
BETTER, WORSE, NOISE = "better", "worse", "within noise"


@pytest.mark.parametrize(
    ("given", "verdict", "text"),
    [
        (result("posterior", -0.021, 0.006), BETTER, "10 draws are better than the mean: NLL −0.021 ± 0.006"),
        (result("posterior", 0.021, 0.006), WORSE, "10 draws are worse than the mean: NLL +0.021 ± 0.006"),
        (result("posterior", -0.004, 0.006), NOISE,
         "10 draws and the mean are within noise: NLL −0.004 ± 0.006; about 2,700 examples would tell"),
        (result("posterior", -0.0006, 0.02), NOISE,
         "10 draws and the mean are within noise: NLL −0.001 ± 0.020; more than a million examples would tell"),
        (result("posterior", -0.0004, 0.0006), NOISE,
         "10 draws and the mean are within noise: NLL −0.000 ± 0.001"),
        (result("posterior", 0.0, 0.0), "the same", "10 draws and the mean predict the same"),
        (result("posterior", -0.5, 0.01, examples=12), "too few examples",
         "12 examples are too few to tell 10 draws from the mean: NLL −0.500 ± 0.010"),
        (result("mean", -0.5, 0.01, "base"), BETTER, "the mean is better than the base model: NLL −0.500 ± 0.010"),
        (result("posterior", -0.5, 0.01, samples=1), BETTER, "one draw is better than the mean: NLL −0.500 ± 0.010"),
        (result("mean+temperature", -0.5, 0.01, samples=1), BETTER,
         "the mean at its T is better than the mean: NLL −0.500 ± 0.010"),
        (result("posterior+temperature", 0.5, 0.01, "mean+temperature"), WORSE,
         "10 draws at their T are worse than the mean at its own: NLL +0.500 ± 0.010"),
        (result("mean", -0.054, 0.215, "base", versus=ACCURACY), NOISE,
         "the mean and the base model are within noise in NLL, but not in accuracy: NLL −0.054 ± 0.215, accuracy "
         "+35.0 ± 8.3 %; about 20,000 examples would tell"),
        (result("posterior", -0.02, 0.005, versus=ECE), BETTER,
         "10 draws are better than the mean: NLL −0.020 ± 0.005, ECE +0.0 %"),
    ],
)  # fmt: skip
def test_a_verdict_in_words(given: VariantResult, verdict: str, text: str) -> None:
    [found] = verdicts([given])
    assert (found.verdict, found.text) == (verdict, text)
    assert (found.examples_needed is not None) == ("would tell" in text)


def test_verdicts_come_file_by_file_and_only_where_both_rows_are() -> None:
    rows = [
        row.model_copy(update={"data": data})
        for data in "ab"
        for row in (
            result("mean", -1, 0.1, "base"), result("posterior", -1, 0.1), result("posterior-pruned", -1, 0.1)
        )
    ]  # fmt: skip
    assert [(each.data, each.name, each.than) for each in verdicts(rows)] == [
        (path, *pair) for path in "ab" for pair in (("mean", "base"), ("posterior", "mean"))
    ]
    assert verdicts([VariantResult(name="posterior", data="a", examples=5, samples=3)]) == []
