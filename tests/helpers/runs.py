"""Runs of the real `axolotl` on a tiny Llama."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

AXOLOTL = Path(sys.executable).with_name("axolotl")
# axolotl 0.21 and later find an installed plugin by themselves.
PLUGINS = [] if version("axolotl") >= "0.21" else ["axolotl_ivon.IVONLoRAPlugin"]
ROWS = 30


def environment(**changes: str) -> dict[str, str]:
    """The environment of a run on the CPU, with tests' own plugins importable; an empty value removes a variable."""
    values = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "ACCELERATE_USE_CPU": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "PATH": f"{AXOLOTL.parent}{os.pathsep}{os.environ['PATH']}",
        **changes,
    }
    return {name: value for name, value in values.items() if value}


def axolotl(*args: str | Path, cwd: Path, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(AXOLOTL), *map(str, args)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(**variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def trained(config: Path, processes: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Train, in this many processes of torchrun, or in one without it."""
    launcher = ["--launcher", "python"]
    if processes:
        # Each run has a port of its own: tests run side by side.
        launcher = ["--launcher", "torchrun", "--", "--standalone", "--nproc_per_node", str(processes)]
    result = axolotl("train", config, *launcher, cwd=config.parent, **variables)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


class Configs:
    """Writes YAMLs for the tiny Llama; outputs lie beside them under the same names."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def __call__(self, name: str, **changes: Any) -> Path:
        """Write one; None as a value leaves a key out."""
        config = {
            "base_model": str(self.model),
            "plugins": PLUGINS,
            "datasets": [{"path": "chats.jsonl", "type": "chat_template", "roles_to_train": ["assistant"]}],
            "dataset_prepared_path": "prepared",
            "output_dir": name,
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "lora_target_modules": ["q_proj", "v_proj"],
            "sequence_len": 128,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "num_epochs": 4,
            "learning_rate": 0.03,
            "optimizer": "ivon_lora",
            "lr_scheduler": "linear",
            "warmup_steps": 0,
            "save_steps": 3,
            "logging_steps": 2,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_num_workers": 0,
            "use_tensorboard": False,
            "seed": 7,
            **changes,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return path
