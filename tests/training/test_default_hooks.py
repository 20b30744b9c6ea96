"""What a third party's hooks add to a run."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainers import make_trainer

from axolotl_ivon import IVONLoRA, Posterior, attach, hookimpl
from axolotl_ivon.plugins import plugin_manager


def test_a_third_party_adds_metrics_and_hears_of_saved_posteriors(tiny_llama: Path, tmp_path: Path) -> None:
    saved = []

    class ThirdParty:
        @hookimpl
        def log_metrics(self, trainer: Any, optimizer: Any) -> dict[str, float]:
            return {"my_metric": 1.5}

        @hookimpl
        def posterior_saved(self, folder: str) -> None:
            assert Posterior.from_pretrained(folder)
            saved.append(Path(folder).name)

    third_party = ThirdParty()
    plugin_manager().register(third_party)
    try:
        trainer = make_trainer(tiny_llama, tmp_path)
        attach(trainer)
        trainer.train()
    finally:
        plugin_manager().unregister(third_party)
    assert saved == ["checkpoint-3", "checkpoint-6"]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["my_metric"] == 1.5
    assert entry["ivon_sigma_mean"] > 0


def test_a_third_party_s_optimizer_and_context_take_the_place_of_ours(tiny_llama: Path, tmp_path: Path) -> None:
    entered = []

    class Mine(IVONLoRA):
        pass

    class ThirdParty:
        @hookimpl
        def create_optimizer(self, named_parameters: Any, settings: Any) -> Any:
            return Mine(named_parameters, **{**settings, "h0": 0.5})

        @hookimpl
        @contextmanager
        def sampling_context(self, trainer: Any, optimizer: Any) -> Any:
            with optimizer.sampled_params():
                entered.append(trainer.state.global_step)
                yield

    third_party = ThirdParty()
    plugin_manager().register(third_party)
    try:
        trainer = make_trainer(tiny_llama, tmp_path)
        attach(trainer)
        trainer.train()
    finally:
        plugin_manager().unregister(third_party)
    assert isinstance(trainer.optimizer.optimizer, Mine)
    assert entered == list(range(6))
    assert Posterior.from_pretrained(tmp_path / "checkpoint-6").metadata["h0"] == "0.5"
