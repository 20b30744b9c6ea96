"""Several real axolotl processes (DDP, DeepSpeed, FSDP2), held against one that sees the same global batches."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import Configs, Forks, launched, trained
from safetensors.torch import load_file
from trainers import IVON_METRICS

from axolotl_ivon import Posterior

FSDP2 = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "reshard_after_forward": True,
}
MODES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": {"stage": 1}},
    "zero2": {"deepspeed": {"stage": 2}},
    "zero3": {"deepspeed": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    # Neither gathers its weights to save them.
    "zero3-offload": {
        "deepspeed": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    },
    "fsdp2-full": {"fsdp_config": {**FSDP2, "state_dict_type": "FULL_STATE_DICT"}},
    "fsdp2-sharded": {
        "fsdp_config": {
            **FSDP2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "offload_params": True,
            "cpu_offload_pin_memory": False,  # which wants an accelerator
        }
    },
}

# DDP, DeepSpeed and FSDP2 each once under torchrun itself.
TORCHRUN = ("ddp", "zero2", "fsdp2-sharded")


class SeveralProcesses:
    """Configs for one run that is the same in any number of processes, from one starting point."""

    def __init__(self, make_config: Configs, start: Path, forks: Forks) -> None:
        self.make_config, self.start, self.forks = make_config, start, forks
        self.pairs: dict[str, Path] = {}

    def config(self, name: str, mode: str, processes: int, **changes: Any) -> Path:
        extra = dict(MODES[mode])
        if "deepspeed" in extra:
            path = self.make_config.folder / f"{mode}.json"
            # All of a partition, however small: nothing is kept whole.
            zero = {"stage3_param_persistence_threshold": 0, **extra["deepspeed"]}
            automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
            path.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(automatic, "auto")}))
            extra["deepspeed"] = str(path)
        if "fsdp_config" in extra:
            extra["fsdp_version"] = 2
        helper = "CpuDeviceMap" if mode == "ddp" else "ShardedOnCpu"
        settings = {
            "lora_model_dir": str(self.start),
            "plugins": ["axolotl_ivon.IVONLoRAPlugin", f"axolotl_helpers.{helper}", "axolotl_helpers.NotesOfRanks"],
            "curriculum_sampling": True,  # the order of the file, whatever the number of processes
            "micro_batch_size": 2 // processes,
            "ivon_clip": "1e-1",
            **extra,
            **changes,
        }
        return self.make_config(name, **settings)

    def train(self, config: Path, mode: str, processes: int) -> Path:
        """Train in forks that have torchrun's variables."""
        self.forks.train(config, processes, **variables(mode))
        return config.with_suffix("")

    def pair(self, mode: str) -> Path:
        """The run of two processes, once for all tests."""
        if mode not in self.pairs:
            config = self.config(mode, mode, 2)
            if mode in TORCHRUN:
                trained(config, 2, **variables(mode))
            else:
                self.train(config, mode, 2)
            self.pairs[mode] = config.with_suffix("")
        return self.pairs[mode]


def variables(mode: str) -> dict[str, str]:
    # accelerate takes the variable that asks for a CPU to mean that there is neither DeepSpeed nor FSDP.
    return {} if mode == "ddp" else {"ACCELERATE_USE_CPU": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def several(make_config: Configs, make_adapter: Any, forks: Forks) -> SeveralProcesses:
    return SeveralProcesses(make_config, make_adapter(lora_dropout=0.0), forks)


@pytest.fixture(scope="module")
def alone(several: SeveralProcesses) -> Path:
    """The run in one process, without torchrun: six steps of two micro-batches, with a checkpoint after three."""
    return several.train(several.config("alone", "ddp", 1), "ddp", 0)


def logged(run: Path) -> list[dict[str, float]]:
    """What every log of a run tells of the posterior."""
    history = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [{key: entry[key] for key in entry if key.startswith("ivon_")} for entry in history if "loss" in entry]


def assert_same(folder: Path, other: Path) -> None:
    left, right = Posterior.from_pretrained(folder), Posterior.from_pretrained(other)
    assert set(left.mean) == set(right.mean)
    for key in left.mean:
        torch.testing.assert_close(left.mean[key], right.mean[key], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(left.sigma[key], right.sigma[key], rtol=1e-4, atol=0)
    assert left.metadata["steps"] == right.metadata["steps"]


@pytest.mark.parametrize("mode", ["ddp", "zero3", "fsdp2-full"])
def test_two_processes_calibrate_as_one_does(several: SeveralProcesses, mode: str) -> None:
    found = []
    for name, processes in (("one", 1), ("two", 2)):
        how = "ddp" if processes == 1 else mode
        config = several.config(f"calibrated-{mode}-{name}", how, processes, val_set_size=8, save_steps=None)
        document = yaml.safe_load(config.read_text())
        document["plugins"].append("axolotl_helpers.CalibratesOnFew")
        config.write_text(yaml.safe_dump(document))
        output = several.train(config, how, processes if processes > 1 else 0)
        found.append(json.loads((output / "recommended.json").read_text()))
        assert found[-1]["mean_sha256"] == Posterior.from_pretrained(output).metadata["mean_sha256"]
    one, two = found
    assert two["draws"] == one["draws"]
    assert two["chosen_on"]["nll"] == pytest.approx(one["chosen_on"]["nll"], rel=1e-3)
    assert two["mean_reported_on"]["nll"] == pytest.approx(one["mean_reported_on"]["nll"], rel=1e-3)


def test_a_preset_chooses_the_same_learning_rate_in_two_processes(several: SeveralProcesses) -> None:
    # A step of α·g/p multiplies the rounding of g by α/p. A large h0 leaves the rate to the preset, and p near 1.
    preset = {"learning_rate": None, "ivon_clip": None, "ivon_h0": 1.0}
    one = several.train(several.config("preset-alone", "ddp", 1, **preset), "ddp", 0)
    two = several.train(several.config("preset-zero3", "zero3", 2, **preset), "zero3", 2)
    assert_same(two, one)
    header, expected = (Posterior.from_pretrained(run).metadata for run in (two, one))
    assert float(header["travel"]) == float(expected["travel"]) == pytest.approx(1.1e-3 * 3.5)
    assert (header["preset"], header["hessian"]) == ("auto", "squared_gradients")


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_save_and_resume_as_one_does(mode: str, several: SeveralProcesses, alone: Path) -> None:
    two = several.pair(mode)

    notes = [(two / f"rank-{rank}.txt").read_text().split() for rank in range(2)]
    assert notes[0] == notes[1]
    assert len(set(notes[0])) == 6
    for folder in ("", "checkpoint-3", "checkpoint-6"):
        assert_same(two / folder, alone / folder)
    assert [set(entry) for entry in logged(two)] == [IVON_METRICS] * 3
    for ours, expected in zip(logged(two), logged(alone), strict=True):
        assert ours == pytest.approx(expected, rel=1e-2)
    headers = [Posterior.from_pretrained(folder).metadata for folder in (two, alone)]
    ours, expected = (float(header["travel"]) for header in headers)
    assert ours == pytest.approx(expected, rel=1e-3)
    assert ours > 0
    assert all("moved" not in header for header in headers)  # B did not begin at 0, which it is measured from
    moved = Posterior.from_pretrained(two).mean
    before = load_file(several.start / "adapter_model.safetensors")
    assert all(not torch.allclose(moved[key], before[key], rtol=1e-3, atol=1e-4) for key in moved)
    assert {path.name for path in two.glob("checkpoint*")} == {"checkpoint-3", "checkpoint-6"}

    resumed = several.config(f"{mode}-resumed", mode, 1, resume_from_checkpoint=str(two / "checkpoint-3"))
    assert_same(several.train(resumed, mode, 1), alone)


@pytest.mark.parametrize("mode", ["zero3", "fsdp2-full"])
def test_a_run_resumes_in_as_many_processes_as_it_had(mode: str, several: SeveralProcesses, alone: Path) -> None:
    checkpoint = several.pair(mode) / "checkpoint-3"
    resumed = several.config(f"{mode}-again-resumed", mode, 2, resume_from_checkpoint=str(checkpoint))
    assert_same(several.train(resumed, mode, 2), alone)


def test_an_earlier_posterior_is_the_prior_in_any_number_of_processes(several: SeveralProcesses) -> None:
    prior = {"ivon_prior": str(several.start), "ivon_prior_strength": 0.5}
    one = several.train(several.config("prior-alone", "ddp", 1, **prior), "ddp", 0)
    header = Posterior.from_pretrained(one).metadata
    assert (header["prior"], header["prior_strength"]) == (str(several.start), "0.5")
    assert header["prior_sha256"] == Posterior.from_pretrained(several.start).metadata["mean_sha256"]
    assert header["chain_train_size"] == str(int(header["train_size"]) + 100)
    two = {mode: several.config(f"prior-{mode}", mode, 2, **prior) for mode in ("zero3", "fsdp2-sharded")}
    for mode, config in two.items():
        assert_same(several.train(config, mode, 2), one)
    checkpoint = two["zero3"].with_suffix("") / "checkpoint-3"
    resumed = several.config("prior-resumed", "zero3", 1, resume_from_checkpoint=str(checkpoint), **prior)
    assert_same(several.train(resumed, "zero3", 1), one)
    assert Posterior.from_pretrained(resumed.with_suffix("")).metadata["prior_sha256"] == header["prior_sha256"]


def test_draws_of_their_own_in_every_process(several: SeveralProcesses, alone: Path) -> None:
    """DDP and ZeRO average by different means, so they check each other; both share noise, rank by rank.

    Their learning rate is rescaled too, which needs whole tensors.
    """
    settings = {"ivon_draws": "per_rank", "ivon_preset": "paper", "ivon_rescale_lr": True, "learning_rate": 0.5}
    runs = []
    for mode in ("ddp", "zero3"):
        run = several.train(several.config(f"{mode}-own", mode, 2, **settings), mode, 2)
        notes = [(run / f"rank-{rank}.txt").read_text().split() for rank in range(2)]
        assert notes[0] == notes[1]
        assert Posterior.from_pretrained(run).metadata["rescale_lr"] == "true"
        runs.append(run)
    assert_same(*runs)
    own, shared = (Posterior.from_pretrained(folder).sigma for folder in (runs[0], alone))
    assert not any(torch.allclose(own[key], shared[key], rtol=1e-5) for key in own)


def test_sigterm_to_the_launcher_leaves_whole_checkpoints(several: SeveralProcesses) -> None:
    config = several.config("terminated", "zero2", 2, max_steps=100_000, num_epochs=100_000, save_steps=1)
    folder = config.with_suffix("")
    run = launched(config, "--standalone", "--nproc_per_node", "2", **variables("zero2"))
    try:
        deadline = time.monotonic() + 240
        while len(list(folder.glob("checkpoint-*"))) < 2 and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.2)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) != 0
    finally:
        run.kill()
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert Posterior.from_pretrained(checkpoint).metadata["steps"] == checkpoint.name.rpartition("-")[2]


def test_two_nodes_train_as_one_process_does(several: SeveralProcesses, alone: Path) -> None:
    """Two launchers that meet at a port, as on two machines."""
    config = several.config("nodes", "ddp", 2)
    from torch.distributed.elastic.utils.distributed import get_free_port

    endpoint = f"localhost:{get_free_port()}"
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    options += ["--rdzv_endpoint", endpoint]
    nodes = [launched(config, *options, stderr=subprocess.PIPE) for _ in range(2)]
    try:
        for node in nodes:
            _, errors = node.communicate(timeout=240)
            assert node.returncode == 0, errors[-3000:]
    finally:
        for node in nodes:
            node.kill()
    assert_same(config.with_suffix(""), alone)


def test_ray_trains_as_one_process_does(several: SeveralProcesses, alone: Path) -> None:
    plugins = ["axolotl_ivon.IVONLoRAPlugin", "axolotl_helpers.RayOnCpu"]
    ray = {"use_ray": True, "ray_num_workers": 2, "resources_per_worker": {"CPU": 1}, "plugins": plugins}
    # Ray's workers run in folders of their own.
    chats = {"path": str(several.make_config.folder / "chats.jsonl"), "type": "chat_template"}
    ray["datasets"] = [{**chats, "roles_to_train": ["assistant"]}]
    ray["output_dir"] = str(several.make_config.folder / "ray")
    trained(several.config("ray", "ddp", 2, **ray), RAY_USAGE_STATS_ENABLED="0")
    assert_same(several.make_config.folder / "ray", alone)
