"""benchmarks/grpo: every method on the tiny Llama and its table; and what the old policy does to the gradient."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import grpo
from benchmarks.fidelity.run import read_results


def test_every_method_gives_a_line_that_the_report_reads(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "is it", "answer": "no"}, {"prompt": "it is", "answer": "yes"}]
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    lengths = lambda completions, **_: [float(len(each[-1]["content"]) > 5) for each in completions]  # noqa: E731
    task = grpo.Task(lambda count, split, seed: chats[:count], lengths, 3, "")
    monkeypatch.setitem(grpo.TASKS, "capitals", task)
    results, setting = tmp_path / "results.jsonl", {**grpo.QUICK, "steps": 1, "test": 1}
    for _ in range(2):  # what has a line is not done again
        grpo.run(results, [0], list(grpo.METHODS), str(tiny_llama), setting)
    lines = read_results(results)
    assert [line["method"] for line in lines] == list(grpo.METHODS)
    *others, untrained = (row.split("|")[1:-1] for row in grpo.report(results).splitlines()[4:])
    assert [cell.strip() for cell in untrained][:4] == ["untrained", "1", "", ""]
    for row, line in zip(others, lines[:-1], strict=True):
        cells = [cell.strip() for cell in row]
        assert cells[3] == f"{line['reward'][0]:.3f}"
        assert cells[4:6] == [f"{line[name]:.3f}" for name in ("pass@1", "pass@8")]
        assert 1 <= float(cells[7]) <= 8


def test_no_sum_and_no_capital_is_in_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in SPLITS:
        texts = [[{"role": "user", "content": f"{split} {i}"}, {"role": "assistant", "content": "a"}] for i in range(9)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in texts))
    (train,), (test,) = (grpo.capitals(1, split, 3, tmp_path) for split in SPLITS)
    assert test == {"prompt": [{"role": "user", "content": "test 0"}], "answer": "a"}
    assert train["prompt"][0]["content"].startswith("train")
    made = SimpleNamespace(create_dataset=lambda name, size, seed, **_: [sum_of(seed, i) for i in range(size)])
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    sums = [{row["prompt"][1]["content"]: row["answer"] for row in grpo.sums(50, split, 0)} for split in SPLITS]
    assert [len(each) for each in sums] == [50, 50]
    assert not sums[0].keys() & sums[1].keys()
    assert all(answer == str(eval(question)) for each in sums for question, answer in each.items())


def test_a_prompt_that_is_read_once_has_the_same_completions(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    own = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(5, 12).repeat(3, 1)
    plain = model.generate(ids, **own)
    grpo.read_prompt_once(model)
    with torch.no_grad():
        assert torch.equal(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **own), plain)


SPLITS = ("train", "test")


def sum_of(seed: int, number: int) -> dict[str, str]:
    return {"question": f"{number} + {seed}", "answer": str(number + seed)}


def test_old_log_probabilities_at_the_mean_clip_by_noise(tiny_llama: Path) -> None:
    narrow, wide = grpo.compare(str(tiny_llama), 0, 2, [0.001, 4.0])
    deviation, share, *cosines = narrow[:4]  # draws so narrow that both policies are the mean
    assert deviation < 1e-2
    assert share == 0
    assert cosines == pytest.approx([1.0, 1.0], abs=1e-3)
    assert wide[0] > deviation
    assert wide[1] > 0.01
