"""What a recommended.json means for an adapter: its own file without being asked, another one by its path."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.decisions.recommendation import DecisionRule, recommended_for
from axolotl_ivon.evaluation.variants import Variant
from axolotl_ivon.posterior.adapter import Adapter
from axolotl_ivon.records.recommendation import DrawsPoint
from axolotl_ivon.reporter import SILENT, Reporter

TAU = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, math.inf])
INF = math.inf


class Headed(Adapter):
    """An adapter of which no more is read than this header."""

    def __init__(self, folder: Path, **header: str) -> None:
        self.folder, self.metadata = folder, {"mean_sha256": "a", **header}

    def check_pair(self, reporter: Reporter = SILENT) -> dict[str, str]:
        return {}


@pytest.fixture
def recommended(tmp_path: Path) -> Callable[..., Path]:
    def write(folder: Path = tmp_path, **values: object) -> Path:
        path = folder / "recommended.json"
        path.write_text(json.dumps({"ratio": 0.2, "mean_sha256": "a", **values}).replace("Infinity", '"inf"'))
        return path

    return write


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TAU, TAU, TAU, TAU)
def test_an_adapter_ends_at_the_tau_that_was_evaluated(
    recommended: Callable[..., Path], tau: float, best: float, swept: float, own: float
) -> None:
    """Whatever τ the adapter of the sweep had, and whatever it has been given since; the best τ for draws, too."""
    path = recommended(tau=tau, adapter_tau=swept, draws={"tau": min(best, 3.0), "temperature": 2.0})
    adapter = Headed(path.parent, tau=repr(own))
    if math.isinf(own) and math.isfinite(tau * swept):
        with pytest.raises(IVONError, match="is the mean alone; use the one swept"):
            recommended_for(adapter, path)
        return
    taken = recommended_for(adapter, path)
    assert taken.ratio == 0.2
    assert own * taken.tau == pytest.approx(tau * swept)
    if math.isinf(own):
        assert taken.draws is None
    elif math.isinf(tau):
        assert own * taken.draws.tau == pytest.approx(min(best, 3.0) * swept)
        assert taken.draws.temperature == 2.0
    else:  # draws are what to predict with
        assert taken.draws == DrawsPoint(tau=taken.tau)


def test_a_recommendation_is_for_its_adapter_alone(recommended: Callable[..., Path], tmp_path: Path) -> None:
    path = recommended(tau=2.0)
    for header, tau in (({"tau": "2.0"}, 1.0), ({"mean_sha256": "b", "unpruned_sha256": "a"}, 2.0)):
        taken = recommended_for(Headed(tmp_path, **header), path)
        assert (taken.tau, taken.ratio) == (tau, 0.2)
    with pytest.raises(IVONError, match=r"its ratio is 0\.2, and 0\.3 of this adapter are pruned already"):
        recommended_for(Headed(tmp_path, mean_sha256="b", unpruned_sha256="a", pruned_ratio="0.3"), path)
    with pytest.raises(IVONError, match=r"was chosen for another adapter \(mean_sha256 differs\)"):
        recommended_for(Headed(tmp_path, mean_sha256="c"), path)
    path.write_text('{"tau": 2.0, "ratio": 0.2}')  # by hand, for any adapter
    assert recommended_for(Headed(tmp_path, mean_sha256="c"), path)


def test_the_file_in_the_adapter_s_folder_is_taken_by_itself(recommended: Callable[..., Path], tmp_path: Path) -> None:
    assert recommended_for(Headed(tmp_path)) is None
    path = recommended(tau=INF, ratio=0, temperature=1.31, draws={"tau": 4.0}, threshold=0.5, score="agreement")
    taken = recommended_for(Headed(tmp_path))
    assert taken == recommended_for(Headed(tmp_path / "elsewhere"), path)
    assert (taken.is_mean, taken.describe()) == (True, "the mean with T 1.31, abstaining below confidence 0.5")
    assert taken.rule == DecisionRule(1.31, 0.5, "agreement")
    drawing = taken.for_draws()
    assert (drawing.describe(), drawing.rule) == ("draws at τ 4", DecisionRule())
    fix = re.escape(f"run `ivon-post sweep` on this one, or remove {path}, or leave it out (no_recommended)")
    with pytest.raises(IVONError, match=f"^{re.escape(str(path))} was chosen for another adapter .*; {fix}$"):
        recommended_for(Headed(tmp_path, mean_sha256="c"))
    for text, wrong in (("{", "is not valid JSON"), ('{"tau": 1}', "it has no `ratio`")):
        path.write_text(text)
        with pytest.raises(IVONError, match=f"{wrong}.*; or remove {re.escape(str(path))}, or leave it out"):
            recommended_for(Headed(tmp_path))


def test_a_hub_id_has_its_file_with_the_adapter(
    recommended: Callable[..., Path], tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One download fetches it; a folder asks the Hub for nothing."""
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append([name, *(pattern for pattern in allow_patterns if pattern == "recommended.json")])
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    shutil.copytree(tiny_adapter, tmp_path / "hub")
    recommended(tmp_path / "hub", tau=INF, mean_sha256=None)
    assert recommended_for("someone/thing")
    assert asked == [["someone/thing", "recommended.json"]]
    assert recommended_for(tiny_adapter) is None
    assert len(asked) == 1


def test_a_mean_without_sigma_is_held_against_the_file(
    recommended: Callable[..., Path], tiny_adapter: Path, tmp_path: Path
) -> None:
    """Its fingerprint is taken from its tensors."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((tiny_adapter / name).read_bytes())
    recommended(tau=INF, mean_sha256=Posterior.from_pretrained(tiny_adapter).metadata["mean_sha256"])
    assert recommended_for(tmp_path)
    recommended(tau=INF)
    with pytest.raises(IVONError, match="was chosen for another adapter"):
        recommended_for(tmp_path)


def test_an_evaluation_shows_mean_and_draws_at_their_own_temperature_unless_the_mean_is_recommended_without(
    recommended: Callable[..., Path],
) -> None:
    draws, metrics = {"tau": 4.0, "temperature": 0.8}, {"chosen_on": {}, "reported_on": {}}
    scaled = [{"tau": INF, "ratio": 0.0, "temperature": 1.5, **metrics}, {"ratio": 0.0, **draws, **metrics}]
    rows = [Variant("mean+temperature", temperature=1.5), Variant("posterior+temperature", 4.0, temperature=0.8)]
    for values, added in (({"tau": INF}, rows[1:]), ({"tau": INF, "temperature": 1.5}, rows), (draws, rows)):
        path = recommended(**{"ratio": 0.0, "draws": draws, "scaled": scaled, **values})
        assert recommended_for(Headed(path.parent)).choice().added == added
    more = {"temperature": 1.5, "threshold": 0.6}
    path = recommended(**{"tau": INF, "ratio": 0.0, "draws": draws, **more})
    assert recommended_for(Headed(path.parent)).choice().added == [*rows, Variant("recommended", INF, **more)]
