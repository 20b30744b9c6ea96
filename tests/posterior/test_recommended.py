"""A recommendation is of one adapter, or of what `temper` and `prune` make of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.posterior.adapter import Adapter
from axolotl_ivon.posterior.recommended import provenance, recommended_from, recommended_in, tau_on_top
from axolotl_ivon.records.recommendation import Recommendation


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"mean_sha256": "a"}, ""),
        ({"mean_sha256": "b"}, "was chosen for another adapter"),
        ({"mean_sha256": "b", "unpruned_sha256": "a", "pruned_ratio": "0.1"}, ""),
        ({"mean_sha256": "b", "unpruned_sha256": "a", "pruned_ratio": "0.5"}, "0.5 of this adapter are pruned already"),
        ({"mean_sha256": "a", "tau": "inf"}, "this adapter is the mean alone"),
    ],
    ids=str,
)
def test_of_which_adapters_it_is(tmp_path: Path, header: dict[str, str], message: str) -> None:
    record = Recommendation(objective="nll", tau=2.0, ratio=0.2, mean_sha256="a")
    record.save(tmp_path / "recommended.json")
    if not message:
        assert recommended_from(tmp_path / "recommended.json", header) == record
        return
    with pytest.raises(IVONError, match=message):
        recommended_from(tmp_path / "recommended.json", header)


def test_tau_comes_on_top_of_the_adapters_own() -> None:
    record = Recommendation(objective="nll", tau=2.0, ratio=0.0, adapter_tau=3.0)
    assert tau_on_top(record, {}, 2.0) == 6.0
    assert tau_on_top(record, {"tau": "3.0"}, 2.0) == 2.0
    assert tau_on_top(record, {"tau": "3.0"}, math.inf) == math.inf


@pytest.mark.parametrize("advice", [{"tau": 2.0}, {"tau": math.inf, "draws": {"tau": 4.0}}, {"tau": math.inf}], ids=str)
def test_of_which_sigma_it_is(advice: dict[str, Any], tiny_adapter: Path, tmp_path: Path) -> None:
    """Draws are of one σ, also after it was tempered or pruned; the mean with its T goes with any."""
    q = Posterior.from_pretrained(tiny_adapter)
    record = Recommendation.model_validate({"ratio": 0.0, **advice})
    record = record.model_copy(update=provenance(record, q.metadata))
    made = {"same": q, "tempered": q.temper(3).temper(2), "pruned": q.prune(0.2), "mean": q.temper(math.inf)}
    wider = {key: 2 * value for key, value in q.sigma.items()}
    made["other"] = Posterior(q.mean, wider, q.metadata, q.config)
    for name, posterior in made.items():
        posterior.save_pretrained(tmp_path / name)
        record.model_copy(update={"ratio": 0.2 if name == "pruned" else 0.0}).save(tmp_path / name / "recommended.json")
    (tmp_path / "mean" / "ivon_sigma.safetensors").unlink()
    for name in ("same", "tempered", "pruned", "mean", *([] if record.needs_sigma else ["other"])):
        assert recommended_in(Adapter(tmp_path / name))
    if record.needs_sigma:
        with pytest.raises(IVONError, match=r"was chosen for another σ around this mean \(sigma_sha256 differs\)"):
            recommended_in(Adapter(tmp_path / "other"))
    record.model_copy(update={"sigma_sha256": None}).save(tmp_path / "other" / "recommended.json")
    assert recommended_in(Adapter(tmp_path / "other")), "older files do not say it"


def test_that_of_an_earlier_run_in_the_same_folder_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    """AdamW writes its weights beside the σ and the recommendation that IVON has left there."""
    q = Posterior.from_pretrained(tiny_adapter)
    q.save_pretrained(tmp_path / "out")
    record = Recommendation(tau=math.inf, ratio=0.0, temperature=0.5)
    record.model_copy(update=provenance(record, q.metadata)).save(tmp_path / "out" / "recommended.json")
    assert recommended_in(Adapter(tmp_path / "out"))
    save_file({key: 2 * value for key, value in q.mean.items()}, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(IVONError, match=r"belongs to another adapter_model.safetensors \(mean_sha256 differs\)"):
        recommended_in(Adapter(tmp_path / "out"))
