"""The plugin in real `axolotl` processes, on a tiny Llama."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import ROWS, Forks, axolotl, trained
from safetensors.torch import load_file
from trainers import IVON_METRICS
from transformers import AutoModelForCausalLM

from axolotl_ivon import Posterior
from axolotl_ivon.storage.format import MEAN_FILE, SIGMA_FILE

# What the preset chooses for so narrow a model in few epochs: α of the usual learning rate.
PEAK = 1.1e-3 / 0.01


@pytest.fixture(scope="module")
def straight_run(make_config: Any) -> Path:
    """Six steps of two micro-batches, with a checkpoint after three, by the command itself with nothing changed."""
    rate = {"learning_rate": None, "warmup_steps": 2, "lr_scheduler": "cosine"}
    config = make_config("straight", ivon_clip="1e-2", dataset_num_proc=None, **rate)
    result = trained(config)
    config.with_suffix(".log").write_text(result.stdout + result.stderr)
    return config.with_suffix("")


def test_the_log_ends_with_what_was_learned_and_with_what_to_do_next(straight_run: Path) -> None:
    log = straight_run.with_suffix(".log").read_text()
    assert "α 0.11 (no learning_rate is set: 0.0011 is usual for this model)" in log
    # On the log's level of axolotl, after its own last word.
    _, saved, last = log.partition("Model successfully saved to straight")
    assert saved
    lines = [line for line in last.splitlines() if "axolotl_ivon" in line][-4:]
    words = ("the weights moved", "within a tensor it differs by", "next: `ivon-post check straight", "not calibrated")
    for line, expected in zip(lines, words, strict=True):
        assert expected in line
    sigmas = list(Posterior.from_pretrained(straight_run).sigma.values())
    weights = sum(sigma.numel() for sigma in sigmas)
    spread = sum(sigma.double().log().std(correction=0).item() * sigma.numel() for sigma in sigmas) / weights
    # axolotl does not seed the initialization of a new adapter: the spread falls on either side of 10 %.
    verdict, told = re.findall(r"σ (was|has begun to be) learned: .* differs by ([\d.]+)%", lines[1])[0]
    assert float(told) / 100 == pytest.approx(spread, abs=6e-4)
    assert verdict == ("was" if float(told) >= 10 else "has begun to be") or told == "10.0"


def test_one_yaml_line_gives_a_posterior_and_a_log_of_it(straight_run: Path, tiny_llama: Path) -> None:
    for folder in (straight_run, straight_run / "checkpoint-3", straight_run / "checkpoint-6"):
        posterior = Posterior.from_pretrained(folder)
        assert set(posterior.mean) == set(posterior.sigma)
        assert all((sigma > 0).all() for sigma in posterior.sigma.values())
    header = Posterior.from_pretrained(straight_run).metadata
    assert (header["preset"], header["gamma"], header["clip"]) == ("auto", "", "0.01")
    assert (header["hessian"], header["prior_strength"], header["h0_steps"]) == ("squared_gradients", "0.1", "10.0")
    assert (header["train_size"], header["steps"], header["prior"]) == (str(ROWS), "6", "empirical")
    assert header["generation_prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert header["choices"] == '["A", "B"]'
    assert float(header["ess"]) == 250_000
    start = Posterior.from_pretrained(straight_run / "checkpoint-3").mean
    end = Posterior.from_pretrained(straight_run).mean
    assert any(not torch.equal(start[key], end[key]) for key in end)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), straight_run)
    weights = model.state_dict()
    for key, tensor in load_file(straight_run / "adapter_model.safetensors").items():
        assert torch.equal(weights[key.replace(".weight", ".default.weight")], tensor)
    state = json.loads((straight_run / "checkpoint-6" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert entries[-1]["learning_rate"] == pytest.approx(PEAK * (1 + math.cos(math.pi * 3 / 4)) / 2)
    for entry in entries:
        assert {key for key in entry if "ivon" in key} == IVON_METRICS


def test_the_card_is_axolotls_and_tells_of_the_posterior(straight_run: Path) -> None:
    for folder in (straight_run, straight_run / "checkpoint-3"):
        card = ModelCard.load(folder / "README.md")
        assert set(card.data.tags) >= {"lora", "ivon", "bayesian", "uncertainty"}
        assert card.data.library_name == "peft"
        assert card.text.count("## Posterior") == 1
        assert f"| training examples N | {ROWS} |" in card.text
    assert "See axolotl config" in ModelCard.load(straight_run / "README.md").text
    assert "| steps | 3 |" in ModelCard.load(straight_run / "checkpoint-3" / "README.md").text


def test_sigint_in_mid_step_saves_the_mean_and_its_sigma(make_config: Any, forks: Forks) -> None:
    config = make_config(
        "interrupted",
        ivon_clip="1e-2",
        save_steps=2,  # the interrupt comes in the third step, so checkpoint-2 holds the mean of that moment
        plugins=["axolotl_ivon.IVONLoRAPlugin", "axolotl_helpers.InterruptInForward"],
    )
    result = forks("train", config, "--launcher", "python", cwd=config.parent)
    output = config.with_suffix("")
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (output / "checkpoint-4").exists(), "it was not interrupted"
    drawn = torch.load(output / "drawn.pt", weights_only=True)
    saved, checkpoint = Posterior.from_pretrained(output), Posterior.from_pretrained(output / "checkpoint-2")
    for name, draw in drawn.items():
        key = name.replace(".default", "")
        assert torch.equal(saved.mean[key], checkpoint.mean[key])
        assert torch.equal(saved.sigma[key], checkpoint.sigma[key])
        assert not torch.equal(saved.mean[key], draw)


def test_a_job_that_goes_on_from_a_posterior_and_is_started_once_more_stays_where_it_ended(
    straight_run: Path, make_config: Any, forks: Forks
) -> None:
    config = make_config("again", ivon_prior=str(straight_run), auto_resume_from_checkpoints=True)
    ends = []
    for _ in range(2):
        forks.train(config)
        ends.append([(config.with_suffix("") / name).read_bytes() for name in (MEAN_FILE, SIGMA_FILE)])
    assert ends[0] == ends[1]
    assert ends[0][0] != (straight_run / MEAN_FILE).read_bytes()


def test_another_optimizer_is_left_alone(straight_run: Path, make_config: Any) -> None:
    outputs = []
    start = str(straight_run / "checkpoint-3")  # axolotl does not seed the initialization of a new adapter
    # Processes of their own: whatever importing the plugin does, the second is without it.
    for name, plugins in (("with", ["axolotl_ivon.IVONLoRAPlugin"]), ("without", None)):
        config = make_config(
            f"adamw-{name}", optimizer="adamw_torch", learning_rate=2e-4, plugins=plugins, lora_model_dir=start
        )
        trained(config)
        outputs.append(config.with_suffix(""))
        assert not list(config.with_suffix("").rglob("ivon_sigma*"))
    left, right = (load_file(output / "adapter_model.safetensors") for output in outputs)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_other_commands_accept_the_yaml(straight_run: Path, make_config: Any, forks: Forks) -> None:
    config = make_config("others", ivon_clip="1e-2", val_set_size=0.2, lora_model_dir=str(straight_run))
    here = config.parent
    for command in (["preprocess", config], ["evaluate", config, "--launcher", "python"], ["merge-lora", config]):
        result = forks(*command, cwd=here)
        assert result.returncode == 0, (command, result.stderr[-3000:])
    merged = AutoModelForCausalLM.from_pretrained(here / "others" / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    result = forks("inference", config, "--launcher", "python", cwd=here, stdin="red dog")
    assert "Give me an instruction" in result.stdout, result.stderr[-3000:]
    assert "red dog" in result.stdout


def test_a_refused_yaml_is_one_line_and_leaves_nothing(make_config: Any) -> None:
    config = make_config("refused", ivon_h0=-1)
    result = axolotl("train", config, "--launcher", "python", cwd=config.parent)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.strip().splitlines()[-1] == ("axolotl-ivon: ivon_h0: -1 is refused, it must be greater than 0")
    assert not config.with_suffix("").exists()


def test_ivon_post_is_a_command_of_axolotl(straight_run: Path) -> None:
    result = axolotl("ivon-post", "info", straight_run, "--json", cwd=straight_run.parent)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout[result.stdout.index("{") :])["weights"] > 0  # axolotl 0.21 begins with a banner


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 5e-4, "lr_scheduler": "cosine"},
        {"learning_rate": 9e-4, "lr_scheduler": "linear", "warmup_steps": 20, "lora_r": 8, "lora_alpha": 16},
        {"learning_rate": 5e-4, "lr_scheduler": "constant", "gradient_accumulation_steps": 1, "micro_batch_size": 4},
    ],
)
def test_a_yaml_for_adamw_learns_as_it_is(changes: dict[str, Any], make_config: Any, forks: Forks) -> None:
    """At no less than half of AdamW's pace, on a random model of which the draws cost a good part."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    unset = dict.fromkeys([f"ivon_{name}" for name in ("gamma", "lambda", "h0", "clip", "beta2")])
    shared = {**unset, "max_steps": 240, "num_epochs": 100, "save_strategy": "no", "save_steps": None}
    shared |= dict.fromkeys(["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"], False)  # which are for GPUs
    shared |= {"logging_steps": 20, "lora_target_modules": linear, "output_dir": "pace", **changes}
    fallen = {}
    for optimizer in ("adamw_torch", "ivon_lora"):
        config = make_config(f"pace-{optimizer}", **{**shared, "optimizer": optimizer})
        result = forks.train(config)
        losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", result.stdout + result.stderr)]
        assert len(losses) == 12
        fallen[optimizer] = losses[0] - losses[-1]
    assert fallen["adamw_torch"] > 0.1
    assert fallen["ivon_lora"] > 0.5 * fallen["adamw_torch"], fallen
