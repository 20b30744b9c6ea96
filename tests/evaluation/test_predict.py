"""Batches, common prefixes and a memory that runs out change nothing about predictions."""

from __future__ import annotations

import pytest
import torch
from caches import NAMES, rename_cache
from evaluations import DRAWS, ROWS, close
from heard import Heard
from torch import Tensor

from axolotl_ivon import IVONError
from axolotl_ivon.data.encode import common_length
from axolotl_ivon.evaluation.evaluate import Evaluation, Sampling
from axolotl_ivon.metrics.scores import Scores


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 5}, {"draws_per_pass": 2}, {"draws_per_pass": 3, "batch_size": 7}],
    ids=str,
)
def test_batches_and_stacked_draws_change_nothing(
    evaluation: Evaluation, scores: list[Scores], options: dict[str, int]
) -> None:
    close(evaluation.run(ROWS, Sampling(samples=3, seed=5, **options)), scores)


@pytest.mark.parametrize("name", NAMES)
def test_the_common_prefix_runs_once_and_the_cache_may_have_either_name(
    evaluation: Evaluation, scores: list[Scores], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = rename_cache(evaluation.model, name, monkeypatch)
    monkeypatch.setattr("axolotl_ivon.evaluation.predict._MIN_PREFIX", 2)
    close(evaluation.run(ROWS, DRAWS), scores)
    # The prefix ran by itself, and what followed it without it.
    prefix = common_length([item.ids for item in evaluation.items])
    assert lengths.count(prefix) > 1
    assert max(lengths) == max(len(item.ids) for item in evaluation.items) - prefix
    monkeypatch.setattr("axolotl_ivon.evaluation.predict._MIN_PREFIX", 10**6)
    close(evaluation.run(ROWS, DRAWS), scores)
    assert max(lengths) == max(len(item.ids) for item in evaluation.items)


def test_out_of_memory_halves_the_batch(
    evaluation: Evaluation, scores: list[Scores], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = evaluation.model.forward

    def small(**inputs: Tensor) -> object:
        if len(inputs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        sizes.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(evaluation.model, "forward", small)
    heard = Heard()
    close(evaluation.run(ROWS, DRAWS, heard), scores)
    assert heard.notes[0].startswith("out of memory with 24 prompts in a batch; going on with 12")
    assert len(heard.notes) <= 4  # what was learned is remembered in the later batches and passes
    monkeypatch.setattr(evaluation.model, "forward", lambda **_: small(input_ids=torch.zeros(99, 1)))
    with pytest.raises(IVONError, match="out of memory with a single prompt"):
        evaluation.run(ROWS, Sampling(samples=3))
