"""Detection of other data on distributions made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from axolotl_ivon.evaluation.ood import SCORES, detect
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.metrics.scores import Scores


def told(draws: torch.Tensor, samples: int) -> list[dict]:
    """Detect with 6 usual and 3 foreign examples of two predictions each; draws (samples, 18, classes)."""
    average = draws.mean(0)
    scores = Scores.of(
        average,
        torch.zeros(18, dtype=torch.long),
        expected_entropy=torch.special.entr(draws).sum(2).mean(0),
        group=torch.arange(9).repeat_interleave(2).flip(0),  # as evaluations have them: in another order
        variance=draws.var(0, correction=0).sum(1),
    )
    evaluation = SimpleNamespace(files={"a": range(4), "b": range(4, 6)}, ood_files={"other": range(6, 9)})
    found = detect(evaluation, [Variant("posterior", tau=1), Variant("mean")], [scores, scores], samples)
    return [result.dump() for result in found]


def test_every_score_tells_what_it_is_made_to_tell() -> None:
    # The draws agree on 0.8 for the usual; for the foreign (the first six predictions) they say 0.95 and 0.55: only
    # their disagreement is larger, and the average is surer by a little or less sure by a little.
    usual = torch.tensor([[0.8, 0.2]] * 12, dtype=torch.float64)
    for shift, sure in ((0.04, 0.0), (-0.04, 1.0)):
        foreign = [torch.tensor([[p + shift, 1 - p - shift]] * 6, dtype=torch.float64) for p in (0.95, 0.65)]
        found = told(torch.stack([torch.cat([one, usual]) for one in foreign]), samples=2)
        assert [one["name"] for one in found] == ["posterior"] * 4 + ["mean"] * 2
        assert {one["data"] for one in found} == {"other"}
        assert [one["score"] for one in found[:4]] == list(SCORES)
        auroc = {one["score"]: one["auroc"] for one in found[:4]}
        assert auroc["mutual_information"] == auroc["variance"] == 1
        assert auroc["max_probability"] == auroc["entropy"] == sure
        perfect = next(one for one in found if one["score"] == "variance")
        assert (perfect["aupr"], perfect["fpr95"]) == (1, 0)
        assert perfect["se"] == {"auroc": 0, "aupr": 0, "fpr95": 0}


def test_one_draw_has_no_disagreement_to_score_by() -> None:
    p = torch.rand(1, 18, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(2)
    assert {one["score"] for one in told(p, samples=1)} == {"max_probability", "entropy"}


def test_the_error_of_an_auroc_is_that_of_its_formula() -> None:
    # Hanley and McNeil 1982, for scores that are exponential.
    generator = torch.Generator().manual_seed(1)
    usual, foreign = 400, 300
    confidence = torch.rand(usual + foreign, generator=generator, dtype=torch.float64) * 0.5 + 0.5
    confidence[usual:] -= 0.1 * torch.rand(foreign, generator=generator, dtype=torch.float64)
    p = torch.stack([confidence, 1 - confidence], 1)
    scores = Scores.of(p, torch.zeros(usual + foreign, dtype=torch.long))
    evaluation = SimpleNamespace(files={"a": range(usual)}, ood_files={"b": range(usual, usual + foreign)})
    found = detect(evaluation, [Variant("mean")], [scores], 1)[0].dump()
    a = found["auroc"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (foreign - 1) * (q1 - a * a) + (usual - 1) * (q2 - a * a)) / (usual * foreign)
    assert found["se"]["auroc"] == pytest.approx(variance**0.5, rel=0.2)
