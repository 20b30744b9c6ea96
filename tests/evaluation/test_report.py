"""What a sweep leaves behind: a recommendation that is read back, and pictures of it."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from axolotl_ivon import IVONError
from axolotl_ivon.evaluation.metrics import Scores, metrics
from axolotl_ivon.evaluation.report import check_output, reliability_bins, save
from axolotl_ivon.evaluation.sweep import Sweep, read_recommended


def test_what_is_saved_is_read_back(result: Sweep, tmp_path: Path) -> None:
    files = save(result, tmp_path / "a" / "out", {"adapter": "x"})
    assert {path.name for path in files} == {path.name for path in (tmp_path / "a" / "out").iterdir()}
    chosen = result.recommended
    assert read_recommended(files[0]) == (chosen.tau, chosen.ratio)
    written = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert written["adapter"] == "x"
    assert written["chosen_on"] == chosen.chosen_on
    assert [p["tau"] for p in written["grid"]] == [0.3, 1.0, "inf", 0.3, 1.0, "inf"]
    for path in files[1:]:
        if path.suffix == ".png":
            picture = imread(path)
            assert picture.shape[0] > 400
            assert picture.std() > 0.05
        else:
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")


def test_an_earlier_sweep_is_kept_unless_told(result: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(result, out, {})
    with pytest.raises(IVONError, match="choose another name with output, or overwrite it with overwrite"):
        check_output(out)
    check_output(out, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(IVONError, match="is not a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(IVONError, match="cannot be written"):
        save(result, tmp_path / "file" / "below", {})


def test_reliability_bins_add_up_to_the_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(200, 3, generator=generator, dtype=torch.float64) * 2, 1)
    scores = Scores.of(p, torch.randint(3, (200,), generator=generator))
    accuracy, confidence, share = reliability_bins(scores)
    assert sum(share) == pytest.approx(1)
    error = sum(s * abs(a - c) for a, c, s in zip(accuracy, confidence, share, strict=True) if s)
    assert error == pytest.approx(metrics(scores)["ece"])
    assert math.isnan(accuracy[0])  # three classes: no confidence is below 1/3
