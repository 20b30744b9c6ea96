"""What is said of a YAML before a run, against what a run does."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
import yaml
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.core.trainers.grpo import GRPOStrategy
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import calculate_total_num_steps
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from trainers import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, get_scheduler

from axolotl_ivon import IVONError, IVONLoRAPlugin, Posterior, attach
from axolotl_ivon.integrations import forecast as module
from axolotl_ivon.integrations.forecast import forecast
from axolotl_ivon.settings.keys import attach_parameters, check_values, prior_folder

BASE = {"optimizer": "ivon_lora", "adapter": "lora", "learning_rate": "3e-4", "plugins": [module.PLUGIN]}
BASE |= {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "bf16": False}
PAPER = {"ivon_preset": "paper", "learning_rate": 3e-2}
EXAMPLES = sorted((Path(__file__).parents[2] / "example_configs").glob("*/*.yaml"))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Any:
    """A function that writes a YAML over a data set of 50 examples in this folder, and forecasts it."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("{}\n\n" * 50)

    def write(processes: int = 1, **changes: Any) -> dict[str, Any]:
        cfg = {**BASE, "base_model": str(tiny_llama), "datasets": [{"path": "data.jsonl"}], **changes}
        Path("train.yaml").write_text(yaml.safe_dump({key: value for key, value in cfg.items() if value is not None}))
        return forecast("train.yaml", processes)

    return write


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(
    ("warmup", "steps"), [({}, 2), ({"warmup_steps": 7}, 7), ({"warmup_ratio": 0.2}, 12), ({"warmup_steps": 0}, 0)]
)
def test_travel_is_that_of_transformers(written: Any, schedule: str, warmup: dict[str, float], steps: int) -> None:
    found = written(max_steps=60, num_epochs=3, lr_scheduler=schedule, ivon_clip=0.02, **PAPER, **warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-2)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=steps, num_training_steps=60)
    total = 0.0
    for _ in range(60):
        total += optimizer.param_groups[0]["lr"] * 0.02
        optimizer.step()
        scheduler.step()
    assert found["travel"] == pytest.approx(total)
    assert (found["steps"], found["learning_rate"]) == (60, 3e-2)
    signs = {"lr_scheduler": schedule, "learning_rate": None, "ivon_direction": "newton"}
    short = written(max_steps=60, num_epochs=3, **signs, **warmup)
    assert short["learning_rate"] == pytest.approx(2.5e-4 / 0.01)
    long = written(max_steps=6000, **signs, warmup_steps=steps)
    assert long["travel"] == pytest.approx(0.125)
    rescaled = {"ivon_clip": 0.02, "ivon_rescale_lr": True, "ivon_h0": 0.1, **PAPER, **warmup}
    rescaled = written(max_steps=60, num_epochs=3, lr_scheduler=schedule, **rescaled)
    assert rescaled["travel"] == pytest.approx(total * 0.1)


@pytest.mark.parametrize(
    ("length", "ess"),
    [
        ({"num_epochs": 10}, 250_000),
        ({"num_epochs": 15}, 187_500),
        ({"max_steps": 375, "micro_batch_size": 2}, 187_500),
    ],
)
def test_lambda_of_few_examples_follows_the_epochs(written: Any, length: dict[str, int], ess: float) -> None:
    assert written(**length)["ess"] == ess
    assert written(**length, ivon_lambda=7.0)["ess"] == 7


@pytest.mark.parametrize("held_out", [0, 7, 0.1, 0.33])
@pytest.mark.parametrize("batch", [(1, 1, 1), (4, 3, 1), (2, 2, 3)])
def test_n_and_steps_are_those_of_axolotl_and_of_a_loader(
    written: Any, held_out: float, batch: tuple[int, int, int]
) -> None:
    micro, accumulated, processes = batch
    keys = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulated, "num_epochs": 2.5}
    found = written(processes, val_set_size=held_out, **keys)
    data = Dataset.from_list([{"x": i} for i in range(50)])
    size = len(data.train_test_split(test_size=held_out)["train"]) if held_out else 50
    assert found["train_size"] == size
    loader = DataLoader(range(size), batch_size=micro * processes)
    in_epoch = sum(1 for i, _ in enumerate(loader) if i % accumulated == 0)
    assert written(processes, val_set_size=held_out, max_steps=-1, **keys)["steps"] == math.ceil(2.5 * in_epoch)
    tokens = Dataset.from_list([{"input_ids": [1], "labels": [1]}] * size)
    cfg = DictDefault({**keys, "batch_size": micro * accumulated * processes})
    assert found["steps"] == calculate_total_num_steps(cfg, tokens)
    assert written(processes, val_set_size=held_out, ivon_preset="paper")["ess"] == pytest.approx(5000 * size**0.5)
    assert found["batch"] == micro * accumulated * processes


def test_the_base_model_is_also_looked_for_in_the_hub_s_cache(
    written: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "hub" / "models--someone--model"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("1a2b")
    shutil.copytree(tiny_llama, held / "snapshots" / "1a2b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert written(base_model="someone/model", lora_r=512) == written(lora_r=512)
    assert written(base_model="someone/other")["ess"] is written(base_model="../no/name")["ess"] is None
    usual = written(base_model="someone/model", learning_rate=None, num_epochs=20)
    assert (usual["learning_rate"], usual["direction"]) == (pytest.approx(0.055), "adam")
    assert "none is given, so it is 0.00055, which is usual" in usual["findings"][0]["text"]
    unknown = written(base_model="someone/other", learning_rate=None, ivon_lambda=1e6, ivon_h0=1.0)
    assert (unknown["learning_rate"], unknown["tau"], unknown["direction"]) == (None, 1, "adam")  # as λ is given
    for signs in ({"rl": "grpo", "micro_batch_size": 8}, {"ivon_prior": 0.1}, {"ivon_rescale_lr": True}):
        found = written(max_steps=100, lr_scheduler="linear", learning_rate=None, **signs)
        assert (found["direction"], found["tau"]) == ("newton", 1)
        assert found["travel"] == pytest.approx(2.5e-4 * 49.5, rel=0.05)
    streamed = {"pretraining_dataset": [{"path": "text.jsonl"}], "datasets": None, "max_steps": 20, "ivon_lambda": 1e6}
    # Their epochs are none, and the rate that of many.
    assert written(base_model="someone/model", learning_rate=None, **streamed)["learning_rate"] == pytest.approx(0.055)
    assert written(base_model="someone/other", learning_rate=None)["tau"] is None
    assert unknown["unknown"] == [
        "learning_rate: none is given, and the one that is usual follows from the base model's width and the epochs; "
        "someone/other is no folder here, nor in the Hub's cache"
    ]
    few, many = (written(learning_rate=None, num_epochs=epochs)["learning_rate"] for epochs in (10, 20))
    assert (few, many) == (pytest.approx(0.11), pytest.approx(0.055))
    all_of_them = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    large = written(learning_rate=None, num_epochs=20, lora_target_modules=all_of_them)  # 14 matrices; 12 are usual
    assert large["learning_rate"] == pytest.approx(0.055 * (12 / 14) ** 0.5, rel=0.02)
    away = {"datasets": [{"path": "someone/data"}], "learning_rate": None}
    assert written(**away, num_epochs=20)["learning_rate"] == pytest.approx(0.055)
    assert written(**away, max_steps=100)["learning_rate"] is None


def test_lambda_and_the_rate_by_every_key(written: Any) -> None:
    """The rate is by `auto` the most that a step may move a weight."""
    assert written(ivon_lambda="1e7")["ess"] == 1e7
    assert written(ivon_gamma=10)["ess"] == pytest.approx(10 * math.sqrt(50))
    auto = written()
    assert (auto["ess"], auto["clip"], auto["unknown"]) == (250_000, 0.01, [])
    away = written(base_model="someone/model")
    assert (away["ess"], away["h0"]) == (None, None)
    assert away["unknown"] == [
        "λ and h0: λ is 250,000 up to 100,000 LoRA weights and in proportion to them from there on; "
        "someone/model is no folder here, nor in the Hub's cache, so they cannot be counted"
    ]
    assert written(learning_rate=2e-4)["learning_rate"] == pytest.approx(0.02)
    assert written(learning_rate=2e-4, ivon_clip=0.1)["learning_rate"] == pytest.approx(0.002)
    assert written(learning_rate=2e-4, ivon_preset="paper")["learning_rate"] == 2e-4
    assert written(learning_rate=2e-3)["learning_rate"] == pytest.approx(0.2)
    with pytest.raises(IVONError, match=r"^learning_rate: 0.03 is too far for a step.* set ivon_preset to paper"):
        written(learning_rate=0.03)


def taken(trainer: Any) -> dict[str, Any]:
    """What a run takes, once its optimizer and schedule are made."""
    run = trainer.posterior_training
    taken = {"ess": run.settings["ess"], "h0": None if "prior" in run.header else run.settings["h0"]}
    taken |= {"clip": run.settings["clip"], "beta2": run.settings["betas"][1]}
    taken |= {"prior_strength": run.settings["prior_strength"], "learning_rate": trainer.args.learning_rate}
    taken |= {"travel": sum(run.rates) * run.step_bound, "direction": run.settings["direction"]}
    taken |= {"tau": run.settings["tau"]}
    return {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for name, value in taken.items()
    }


def grpo_trainer(cfg: dict[str, Any], base: Path, lora: dict[str, Any], rows: int, processes: int = 1) -> Any:
    """TRL's Trainer with what axolotl gives it, when training has begun."""

    class Begun(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {}
    TrainerBuilderBase._configure_warmup_and_logging(SimpleNamespace(cfg=DictDefault(cfg)), None, settings)
    settings |= GRPOStrategy.set_training_args_kwargs(DictDefault({**cfg, "context_parallel_size": 1}))
    own = {"use_vllm", "vllm_mode", "vllm_server_host", "vllm_server_port", "use_data_producer", "vllm_lora_sync"}
    names = inspect.signature(trl.GRPOConfig).parameters.keys() - own
    settings = {name: value for name, value in settings.items() if name in names and value is not None}
    args = trl.GRPOConfig(
        "out",
        learning_rate=float(cfg["learning_rate"]),
        lr_scheduler_type=cfg["lr_scheduler"],
        per_device_train_batch_size=cfg["micro_batch_size"] * processes,
        gradient_accumulation_steps=cfg["gradient_accumulation_steps"],
        num_train_epochs=cfg["num_epochs"],
        max_steps=cfg.get("max_steps") or -1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **settings,
    )
    trainer = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "is it"}] * rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM"),
        callbacks=[Begun()],
    )
    attach(trainer, **attach_parameters(check_values(cfg)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_forecast_is_what_the_run_takes(
    path: Path, tiny_llama: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a tiny model and 100 examples; the Trainer has what axolotl gives it."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("{}\n" * 100)
    cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    cfg |= {"base_model": str(tiny_llama), "datasets": [{"path": "data.jsonl"}], "output_dir": "out"}
    lora = {"r": cfg["lora_r"], "lora_alpha": cfg["lora_alpha"], "target_modules": cfg.get("lora_target_modules")}
    if cfg.get("lora_target_linear"):
        lora["target_modules"] = "all-linear"
    if cfg.get("peft_layers_to_transform"):
        lora["layers_to_transform"] = cfg["peft_layers_to_transform"] = [1]
    if "ivon_prior" in cfg:
        cfg["ivon_prior"] = str(make_adapter(**lora))
    Path("train.yaml").write_text(yaml.safe_dump(cfg))
    found = forecast("train.yaml")
    if cfg.get("rl") == "grpo":
        trainer = grpo_trainer(cfg, tiny_llama, lora, 100)
        assert (found["train_size"], found["steps"]) == (100, trainer.state.max_steps)
        assert found == {**found, **taken(trainer)}
        return
    rows = (
        100
        if not cfg.get("val_set_size")
        else len(Dataset.from_list([{"x": 1}] * 100).train_test_split(test_size=cfg["val_set_size"])["train"])
    )
    settings, seen = {}, SimpleNamespace(cfg=DictDefault(cfg))
    cfg["batch_size"] = cfg["micro_batch_size"] * cfg.get("gradient_accumulation_steps", 1)
    total = math.ceil(rows * cfg.get("num_epochs", 1) / cfg["batch_size"])
    steps = cfg.get("max_steps") or total
    TrainerBuilderBase._configure_warmup_and_logging(seen, min(total, steps), settings)
    settings.pop("warmup_ratio", None)
    settings["logging_steps"] = 1
    trainer = make_trainer(
        tiny_llama,
        tmp_path,
        {"lora_dropout": 0.0, **lora},
        learning_rate=float(cfg.get("learning_rate") or 0),
        lr_scheduler_type=cfg.get("lr_scheduler", "cosine"),
        per_device_train_batch_size=cfg["micro_batch_size"],
        gradient_accumulation_steps=cfg.get("gradient_accumulation_steps", 1),
        **settings,
        max_steps=steps,
    )
    given = attach_parameters(check_values(cfg))
    if prior_folder(cfg.get("ivon_prior")):
        given["prior"] = Posterior.from_pretrained(cfg["ivon_prior"])
    attach(trainer, **given, train_size=rows)
    trainer.create_optimizer_and_scheduler(steps)
    assert (found["train_size"], found["steps"], found["batch"]) == (rows, steps, cfg["batch_size"])
    assert found == {**found, **taken(trainer)}


@pytest.mark.parametrize(
    ("batch", "own"),
    [
        ((4, 2, 1), {}),
        ((8, 3, 1), {"generation_batch_size": 16}),
        ((2, 4, 3), {"num_iterations": 3}),
        ((4, 1, 1), {"num_iterations": 2, "generation_batch_size": 12}),
        ((4, 1, 2), {"num_generations": None}),
    ],
)
@pytest.mark.parametrize("length", [{}, {"max_steps": -1, "warmup_ratio": 0.1}, {"max_steps": 200}], ids=str)
def test_steps_of_grpo_are_those_of_trl(
    written: Any, tiny_llama: Path, batch: tuple[int, int, int], own: dict[str, int], length: dict[str, float]
) -> None:
    """Of 50 prompts. In one process, with batches that are as large as those of all processes."""
    micro, accumulated, processes = batch
    keys = {"rl": "grpo", "micro_batch_size": micro, "gradient_accumulation_steps": accumulated, "num_epochs": 12.5}
    keys |= {"lr_scheduler": "linear", "trl": {"num_generations": 4, "max_completion_length": 4, **own}, **length}
    found = written(processes, **keys)
    lora = {"r": BASE["lora_r"], "target_modules": BASE["lora_target_modules"]}
    trainer = grpo_trainer({**BASE, **keys}, tiny_llama, lora, 50, processes)
    assert found["steps"] == trainer.state.max_steps
    assert found == {**found, **taken(trainer)}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num_generations": 5}, "trl.num_generations: 5 does not divide the 8 completions"),
        ({"generation_batch_size": 12}, "trl.num_generations: 8 does not divide the 12 completions"),
        ({"num_generations": 4, "generation_batch_size": 20}, "micro_batch_size × processes: 8 does not divide the 20"),
        ({"num_generations": 2, "generation_batch_size": 104}, "datasets have 50 prompts.* written for 52 at once"),
    ],
)
def test_completions_that_trl_would_refuse(written: Any, own: dict[str, int], message: str) -> None:
    with pytest.raises(IVONError, match=f"^{message}"):
        written(rl="grpo", micro_batch_size=8, trl=own)


@pytest.mark.parametrize("split", ["train[:30]", "train[10%:33%]", "train[-7:]", "train[:4]+train[40:]", "train[:99]"])
def test_a_part_of_a_file_has_as_many_examples_as_datasets_reads(written: Any, split: str, tmp_path: Path) -> None:
    found = written(datasets=[{"path": "data.jsonl", "split": split}, {"path": "data.jsonl"}])["train_size"]
    Path("full.jsonl").write_text('{"a": 1}\n' * 50)
    part = load_dataset("json", data_files="full.jsonl", split=split, cache_dir=str(tmp_path / "cache"))
    assert found == len(part) + 50


@pytest.mark.parametrize(
    ("changes", "unknown"),
    [
        ({"datasets": [{"path": "someone/data"}]}, ["N: someone/data is no JSON file here", "steps", "travel"]),
        ({"datasets": [{"path": "data.jsonl", "shards": 3}]}, ["only a part is used", "steps", "travel"]),
        ({"datasets": [{"path": "data.jsonl", "split": "test"}]}, ["split test is not followed", "steps", "travel"]),
        ({"datasets": [{"path": "data.jsonl", "split": "train[x]"}]}, ["split train[x] is not", "steps", "travel"]),
        ({"sample_packing": True}, ["packed together", "travel"]),
        ({"streaming": True, "ivon_lambda": 1e7, "max_steps": 5}, ["streamed data has no length"]),
        ({"lr_scheduler": "one_cycle"}, ["the schedule one_cycle is not followed"]),
        ({"cosine_min_lr_ratio": 0.1}, ["with its options"]),
    ],
)
def test_what_is_not_known_is_said(written: Any, changes: dict[str, Any], unknown: list[str]) -> None:
    found = written(**PAPER, **changes)
    assert len(found["unknown"]) == len(unknown)
    for why, words in zip(found["unknown"], unknown, strict=True):
        assert words in why


def test_tau_of_a_short_run_follows_from_its_steps(written: Any) -> None:
    away = {"datasets": [{"path": "someone/data"}]}
    assert written(**away)["tau"] is None
    assert written(**away, ivon_direction="newton")["tau"] == written(**away, **PAPER)["tau"] == 1
    known = written(**away, max_steps=128, learning_rate=2e-4)
    assert known["tau"] == pytest.approx((0.125 / (0.0128 / 5)) ** 2)


def test_what_will_come_of_it(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {one["about"]: one for one in written(learning_rate=2e-4, max_steps=500, ivon_preset="paper")["findings"]}
    assert not short["weights"]["good"]
    assert "raise learning_rate (with 0.1" in short["weights"]["text"]
    assert "remembers 2,000 steps and the run has 500" in short["sigma"]["text"]
    none = {one["about"]: one for one in written(learning_rate=2e-6, max_steps=500, ivon_beta2=0.9995)["findings"]}
    assert not none["weights"]["good"]
    assert "next to nothing can be learned" in none["weights"]["text"]
    assert none["sigma"]["good"]
    assert none["sigma"]["text"] == "σ is learned from all 500 steps (β2 = 0.9995), and its start counts as 10 more"
    good = written(learning_rate=1e-3, max_steps=1000, ivon_beta2=0.99)["findings"]
    assert [(one["about"], one["good"]) for one in good] == [("weights", True), ("sigma", True)]
    assert good[1]["text"] == "σ is learned from about the last 100 of 1,000 steps (β2 = 0.99)"
    for version, expected in (("0.19.0", True), ("0.20.1", True), ("0.21.0", False)):
        monkeypatch.setattr(module, "version", lambda name, version=version: version)
        texts = [one["text"] for one in written(plugins=None)["findings"]]
        assert any("is not a valid OptimizerNames" in text for text in texts) is expected


def test_keys_that_axolotl_fails_without_are_named(written: Any) -> None:
    with pytest.raises(TypeError):  # as axolotl makes it of such a YAML
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(lora_alpha=None, target_modules=["0"]))  # type: ignore[arg-type]
    first = written(lora_alpha=None)["findings"][0]
    assert (first["good"], first["text"].partition(",")[0]) == (False, "lora_alpha: none is given")
    assert "lora_r, lora_alpha: none is given" in written(lora_alpha=None, lora_r=None)["findings"][0]["text"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bf16": None}, "bf16 is auto by default, which"),  # the key is left out
        ({"bf16": "auto"}, "bf16: auto"),
        ({"bf16": True, "lora_qkv_kernel": False}, "bf16: True"),
        ({"fp16": True}, "fp16: True"),
        ({"bf16": None, "fp16": False}, ""),
        ({"bf16": None, "bfloat16": True}, "bf16 is auto by default, which"),
        ({"bf16": False, "bfloat16": True}, "bfloat16: True"),
        ({}, ""),
    ],
)
def test_half_precision_without_a_gpu_is_said_to_be_slow(
    written: Any, changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    texts = [one["text"] for one in written(**changes)["findings"] if not one["good"]]
    IVONLoRAPlugin().register(yaml.safe_load(Path("train.yaml").read_text()))
    assert texts == caplog.messages
    assert len(texts) == bool(named)
    if named:
        key = named.partition(":")[0].partition(" ")[0]
        assert texts[0].startswith(f"{named} is half precision, and there is no GPU here: a step takes about 25 times")
        assert f"set {key}: false" in texts[0]
        assert ("lora_mlp_kernel: false" in texts[0]) is ("lora_qkv_kernel" not in changes)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not [one for one in written(**changes)["findings"] if not one["good"]]


def test_bfloat16_is_not_slow_on_a_cpu_that_multiplies_it(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    bad = {
        bf16: [one["about"] for one in written(bf16=bf16, bfloat16=True)["findings"] if not one["good"]]
        for bf16 in (False, "auto", True)
    }
    assert bad == {False: [], "auto": ["precision"], True: ["precision"]}  # auto is float16 there


@pytest.mark.parametrize("steps", [50, 120, 333, 1000, 7919])
@pytest.mark.parametrize("rate", [None, 2e-4])
def test_what_the_preset_chooses_is_not_complained_of(written: Any, steps: int, rate: float | None) -> None:
    found = [(one["about"], one["good"]) for one in written(max_steps=steps, learning_rate=rate)["findings"]]
    assert found == [*([] if rate else [("learning_rate", True)]), ("weights", True), ("sigma", True)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: adamw_torch", "optimizer is adamw_torch"),
        ("a: 1", "optimizer is None"),
        ("- 1", "does not hold the keys"),
        ("", "does not hold the keys"),
        ("a: [", "not valid YAML"),
        ("optimizer: ivon_lora\nivon_h0: -1", "ivon_h0: -1 is refused"),
        ("optimizer: ivon_lora\nadapter: lora\nlearning_rate: fast", "learning_rate: 'fast' is not a number"),
        ("optimizer: ivon_lora\nadapter: lora\nmax_steps: -2", "max_steps: -2 is not a number from 0 on"),
        ("optimizer: ivon_lora\nadapter: lora\nval_set_size: [1]", r"val_set_size: \[1\] is not a number"),
        ("optimizer: ivon_lora\nadapter: lora\nval_set_size: 5", "val_set_size: 5 leaves none of the 3 examples"),
        ("x: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_wrong_yaml_is_one_line(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.json").write_text(json.dumps([{}, {}, {}]))
    if "optimizer: ivon" in text:
        text += "\ndatasets:\n- path: d.json\n"
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(IVONError, match=message) as error:
        forecast(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_no_file_and_a_json_array(written: Any) -> None:
    with pytest.raises(IVONError, match="no such file"):
        forecast("a.yaml")
    Path("d.json").write_text(json.dumps([{}, {}, {}]))
    array = {"path": "d.json"}
    assert written(datasets=[array])["train_size"] == 3
    assert written(datasets=[{"path": "json", "data_files": ["d.json", "d.json"]}, array])["train_size"] == 9
    Path("d.json").write_text("[1")
    assert "cannot be read" in written(datasets=[array])["unknown"][0]


def test_an_earlier_adapter_is_told_of_and_must_be_there(written: Any, tmp_path: Path, make_adapter: Any) -> None:
    monday = make_adapter()
    found = written(learning_rate=2e-4, max_steps=100, ivon_prior=str(monday), ivon_prior_strength=0.5)
    assert (found["prior"], found["prior_strength"], found["h0"]) == (str(monday), 0.5, None)
    assert not any(why.startswith("h0") for why in found["unknown"])
    [told] = [one for one in found["findings"] if one["about"] == "prior"]
    assert told["text"] == f"continues {monday}: its 100 examples count 0.5 times each"
    few = make_adapter(facts={"preset": "auto", "gamma": "", "ess": "250000.0", "train_size": "96"})
    [told] = [one for one in written(ivon_prior=str(few))["findings"] if one["about"] == "prior"]
    assert told["text"] == f"continues {few}: its 96 examples count as 250, 300 times each"
    with pytest.raises(IVONError, match=r"has r 4 and this adapter 8; set lora_r: 4$"):
        written(ivon_prior=str(monday), lora_r=8)
    with pytest.raises(IVONError, match=r"^ivon_prior: '.*sunday' is refused, it must be 'empirical', a number, or th"):
        written(ivon_prior=str(tmp_path / "sunday"))
