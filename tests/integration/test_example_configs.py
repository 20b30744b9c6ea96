"""The YAMLs of example_configs: axolotl accepts them, they hold the paper's values, and their prompts read well."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_configs"
CONFIGS = {path.stem: path for path in FOLDER.rglob("*.yaml")}
NAMES = [
    "arithmetic",
    "commonsense",
    "continual-1",
    "continual-2",
    "demo",
    "glue",
    "gsm8k",
    "reinforce",
    "reinforce-gsm8k",
]
GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}

# The settings of arXiv 2506.14280.
TABLE = {
    "commonsense": {"ivon_gamma": 5000, "ivon_h0": 5e-2, "ivon_clip": 5e-3, "ivon_beta2": 0.9995}
    | {"learning_rate": 1e-2, "warmup_steps": 150, "max_steps": 5000, "micro_batch_size": 8, "load_in_8bit": True},
    "gsm8k": {"ivon_lambda": 1e7, "ivon_h0": 5e-3, "ivon_clip": 1e-2, "ivon_beta2": 0.99999}
    | {"learning_rate": 3e-2, "warmup_steps": 0, "num_epochs": 6, "micro_batch_size": 16},
    "glue": {"ivon_lambda": 5e6, "ivon_h0": 5e-3, "ivon_clip": 2e-2, "ivon_beta2": 0.9998}
    | {"learning_rate": 1e-2, "warmup_ratio": 0.06, "max_steps": 5000, "micro_batch_size": 16},
}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
LORA |= {
    "lora_target_modules": ["q_proj", "v_proj"],
    "lr_scheduler": "linear",
    "gradient_accumulation_steps": 1,
    "optimizer": "ivon_lora",
}
# Where a config leaves LORA, and why is said in it.
OWN = {
    "demo": {"lora_dropout": 0},
    "reinforce": {"lora_dropout": 0, "gradient_accumulation_steps": 4},
    "reinforce-gsm8k": {"lora_dropout": 0, "gradient_accumulation_steps": 8},
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


def validate(raw: dict[str, Any]) -> Any:
    """Validate as `axolotl train` does, on a machine that pretends to have a GPU."""
    import torch
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    config = DictDefault(raw)
    prepare_plugins(config)
    version = {"torch_version": torch.__version__.split("+")[0]}
    return validate_config(config, capabilities=GPU, env_capabilities=version)


@pytest.mark.parametrize("name", NAMES)
def test_axolotl_accepts_the_config_and_keeps_every_key(name: str, make_adapter: Any) -> None:
    assert sorted(CONFIGS) == NAMES
    raw = load(name)
    if "ivon_prior" in raw:  # which must be there
        raw["ivon_prior"] = str(make_adapter(r=8, lora_alpha=16))
        held = Path(raw["ivon_prior"]) / "adapter_config.json"
        held.write_text(json.dumps({**json.loads(held.read_text()), "base_model_name_or_path": raw["base_model"]}))
    config = validate(dict(raw))
    paper = {"ivon_beta1": 0.9, **TABLE[name]} if name in TABLE else {}
    expected = {**raw, **LORA, **OWN.get(name, {}), **paper}
    for key in expected.keys() - {"datasets", "special_tokens", "bf16", "plugins", "learning_rate"}:
        value = expected[key]
        if key in ("trl", "vllm"):  # to which axolotl adds its defaults, as to every set of data
            assert config[key].items() >= value.items()
            continue
        if key == "test_datasets":
            assert [
                {name: filled[name] for name in given} for filled, given in zip(config[key], value, strict=True)
            ] == value
            continue
        assert config[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    # 0 stands for what a preset will choose.
    assert float(config["learning_rate"]) == pytest.approx(float(expected.get("learning_rate", 0)))
    with pytest.raises(Exception, match="ivon_gama"):
        validate({**raw, "ivon_gama": 1})


def test_rewards_are_for_right_answers() -> None:
    from example_configs.rewards import named, problem, question, result

    def said(*texts: str) -> list[list[dict[str, str]]]:
        return [[{"role": "assistant", "content": text}] for text in texts]

    assert named(said("It is Oslo.", "Oslo", "Oslo, the", "Rome."), ["Oslo"] * 4) == [1.0, 1.0, 0.5, 0.0]
    assert result(said("so 1,200", "12 and 7", "many"), ["1200", "12", "3"]) == [1.0, 0.0, 0.0]
    messages = [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": "positive"}]
    assert question({})[0]({"messages": messages}) == {"prompt": messages[:1], "answer": "positive"}
    assert problem({})[0]({"question": "2 + 3?", "answer": SUM})["answer"] == "5"


@pytest.mark.parametrize("name", ["reinforce", "reinforce-gsm8k"])
def test_axolotl_finds_prompts_and_rewards(name: str, monkeypatch: Any) -> None:
    """By the names in the YAML, with the folder where its first lines say."""
    from axolotl.core.trainers.grpo import GRPOStrategy
    from axolotl.prompt_strategies.dpo import load as load_prompts

    config, text = load(name), CONFIGS[name].read_text(encoding="utf-8")
    (folder,) = re.findall(r"PYTHONPATH=(\S+) axolotl train", text)
    monkeypatch.syspath_prepend(ROOT / folder)
    with patch.dict(sys.modules):  # helpers of the tests have a module of this name too
        sys.modules.pop("rewards", None)
        prompts, _ = load_prompts(config["datasets"][0]["type"], config)
        functions = [GRPOStrategy.get_reward_func(each) for each in config["trl"]["reward_funcs"]]
    for function in (prompts, *functions):
        assert function.__globals__["__file__"] == str(FOLDER / "rewards.py")


@pytest.mark.parametrize("suite", ["causal-axolotl", "paper", "paper-8b", "paper-70b", "code", "multilingual"])
def test_axolotl_accepts_the_yamls_of_the_benchmarks(suite: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.fidelity.configs import run_configs

    suites = yaml.safe_load((ROOT / "benchmarks/fidelity/experiments.yaml").read_text(encoding="utf-8"))["suites"]
    spec = suites[suite]
    for config in run_configs({**spec, "seeds": [0]}, tmp_path, tmp_path).values():
        accepted = validate(config)
        for key in config.keys() & {"load_in_8bit", "load_in_4bit", "fsdp_version", "micro_batch_size", "ivon_gamma"}:
            assert accepted[key] == config[key]


SENTENCE = "The trophy does not fit in the case because the _ is too big."
SUM = "2 + 3 = <<2+3=5>>5\n#### 5"


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        (
            "commonsense",
            {"sentence": SENTENCE, "option1": "trophy", "option2": "case", "answer": "1"},
            f"Which option fills the blank?\n1. trophy\n2. case\n{SENTENCE}\nAnswer: ",
            "1",
        ),
        ("gsm8k", {"question": "What is 2 + 3?", "answer": SUM}, "Question: What is 2 + 3?\nAnswer: ", SUM),
        (
            "glue",
            {"text1": "It rained.", "text2": "The sun shone.", "label": 1, "label_text": "not entailment"},
            "It rained.\nDoes it follow that: The sun shone.\nAnswer: ",
            "not entailment",
        ),
    ],
)
def test_only_the_answer_is_trained(name: str, row: dict[str, Any], prompt: str, answer: str, tiny_llama: Path) -> None:
    from axolotl.prompt_strategies import load as load_strategy
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = validate(load(name))
    settings = {key: value for key, value in config["datasets"][0]["type"].items() if value is not None}
    strategy = load_strategy("user_defined", tokenizer, DictDefault(train_on_inputs=False, sequence_len=512), settings)
    tokens = strategy.tokenize_prompt(row)
    trained = [token for token, label in zip(tokens["input_ids"], tokens["labels"], strict=True) if label != -100]
    given = tokens["input_ids"][: len(tokens["input_ids"]) - len(trained)]
    assert tokenizer.decode(given, skip_special_tokens=True) == prompt
    assert tokenizer.decode(trained) == answer + tokenizer.eos_token
