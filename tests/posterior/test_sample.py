"""Every member of an ensemble is a complete adapter, and the draw that the library gives."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from heard import Heard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.posterior.sample import EnsemblePlan, sample
from axolotl_ivon.storage.format import MEAN_FILE


def test_members_are_the_draws_and_peft_loads_them(tiny_adapter: Path, tiny_llama: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter).prune(0.3).temper(2)
    names = sample(q, tmp_path / "out", EnsemblePlan(3, seed=5), "here")
    assert names == ["sample-0000", "sample-0001", "sample-0002"]
    document = json.loads((tmp_path / "out" / "ensemble.json").read_text())
    assert document == {"source": "here", "seed": 5, "tau": 2.0, "pruned_ratio": 0.3, "members": names}
    for k, name in enumerate(names):
        assert {path.name for path in (tmp_path / "out" / name).iterdir()} == {MEAN_FILE, "adapter_config.json"}
        draw = q.sample(5, k)
        saved = load_file(tmp_path / "out" / name / MEAN_FILE)
        assert all(torch.equal(saved[key], draw[key]) for key in draw)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out" / name)
        loaded = {key.replace(".default", ""): value for key, value in model.state_dict().items()}
        assert all(torch.equal(loaded[key], draw[key]) for key in draw)


@pytest.mark.parametrize("processors", [1, 2])
def test_a_member_does_not_depend_on_the_threads(tiny_adapter: Path, tmp_path: Path, processors: int):
    script = (
        f"import os; os.cpu_count = lambda: {processors * 3 - 2}\n"
        "from axolotl_ivon import Posterior; from axolotl_ivon.posterior.sample import EnsemblePlan, sample\n"
        f"sample(Posterior.from_pretrained({str(tiny_adapter)!r}), {str(tmp_path / 'out')!r}, EnsemblePlan(1))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(processors)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    drawn = Posterior.from_pretrained(tiny_adapter).sample()
    saved = load_file(tmp_path / "out" / "sample-0000" / MEAN_FILE)
    assert all(torch.equal(saved[key], drawn[key]) for key in drawn)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("own", ["float32", "bfloat16"])
def test_another_dtype_is_the_same_draw_rounded(own: str, dtype: str, make_adapter: Callable, tmp_path: Path):
    q = Posterior.from_pretrained(make_adapter(dtype=own))
    sample(q, tmp_path / "out", EnsemblePlan(1, dtype=dtype))
    exact = Posterior({key: value.float() for key, value in q.mean.items()}, q.sigma, {}, {}).sample()
    for key, value in load_file(tmp_path / "out" / "sample-0000" / MEAN_FILE).items():
        assert torch.equal(value, exact[key].to(getattr(torch, dtype)))


def test_the_mean_comes_first_if_wanted(tiny_adapter: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter).temper(math.inf)
    assert sample(q, tmp_path / "out", EnsemblePlan(1, include_mean=True)) == ["mean", "sample-0000"]
    for name in ("mean", "sample-0000"):
        saved = load_file(tmp_path / "out" / name / MEAN_FILE)
        assert all(torch.equal(saved[key], q.mean[key]) for key in q.mean)
    assert json.loads((tmp_path / "out" / "ensemble.json").read_text())["tau"] == "inf"


@pytest.mark.parametrize(
    ("arguments", "parameter", "message"), [((0,), None, "0 members"), ((1, 0, "int8"), "dtype", "'int8' is unknown")]
)
def test_a_plan_that_makes_no_ensemble(arguments: tuple, parameter: str | None, message: str):
    with pytest.raises(IVONError, match=message) as error:
        EnsemblePlan(*arguments)
    assert error.value.parameter == parameter


def test_an_ensemble_that_the_disk_has_no_room_for(tiny_adapter: Path, tmp_path: Path):
    q = Posterior.from_pretrained(tiny_adapter)
    with pytest.raises(IVONError, match=r"cannot be written \(1,000,000,000,000 adapters take 3.58e\+03 TB"):
        sample(q, tmp_path / "out", EnsemblePlan(10**12))
    assert not list(tmp_path.iterdir())


def test_what_it_takes_is_known_and_reported_as_one_piece_of_work(tiny_adapter: Path, tmp_path: Path):
    heard = Heard()
    q = Posterior.from_pretrained(tiny_adapter)
    plan = EnsemblePlan(2, dtype="bfloat16")
    sample(q, tmp_path / "out", plan, reporter=heard)
    written = [load_file(path) for path in (tmp_path / "out").rglob("*.safetensors")]
    assert plan.size(q) == sum(tensor.nbytes for tensors in written for tensor in tensors.values()) == 2 * 896 * 2
    assert EnsemblePlan(1, include_mean=True).size(q) == 2 * 896 * 4
    [(doing, counts)] = heard.counts.items()
    assert doing == "drawing 2 adapters, 3.58 kB"
    assert sum(count for count, _ in counts) == counts[0][1] == 2 * 896
