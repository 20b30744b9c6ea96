"""Detection of other data against scikit-learn, repetitions, and distributions made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from axolotl_ivon.evaluation.ood import SCORES, detect
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.metrics.ood import detection
from axolotl_ivon.metrics.scores import Scores

both = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=40).filter(
    lambda values: len({positive for _, positive in values}) == 2
)


@given(both)
def test_detection_is_that_of_scikit_learn(values: list[tuple[int, bool]]) -> None:
    score, positive = np.array([s / 9 for s, _ in values]), np.array([p for _, p in values])
    found = detection(score, positive)
    assert found["auroc"] == pytest.approx(roc_auc_score(positive, score))
    assert found["aupr"] == pytest.approx(average_precision_score(positive, score))
    misses, hits, _ = roc_curve(positive, score, drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(misses[hits >= 0.95][0])


@given(both, st.data())
def test_weights_count_as_repetitions(values: list[tuple[int, bool]], draw: st.DataObject) -> None:
    score, positive = np.array([s / 9 for s, _ in values]), np.array([p for _, p in values])
    n = len(values)
    times = np.array(
        draw.draw(
            st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(
                lambda times: {p for (_, p), t in zip(values, times, strict=True) if t} == {True, False}
            )
        )
    )
    found = detection(score, positive, np.stack([times, np.ones(n)]).astype(float))
    for name, (one, other) in found.items():
        assert one == pytest.approx(detection(score.repeat(times), positive.repeat(times))[name])
        assert other == pytest.approx(detection(score, positive)[name])


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
