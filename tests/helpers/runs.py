"""Runs of the real `axolotl` on a tiny Llama."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

AXOLOTL = Path(sys.executable).with_name("axolotl")
# axolotl 0.21 and later find an installed plugin by themselves.
PLUGINS = [] if version("axolotl") >= "0.21" else ["axolotl_ivon.IVONLoRAPlugin"]
ROWS = 30


@functools.cache
def extensions() -> Path:
    """Return where DeepSpeed compiles its extension for the runs of this process."""
    folder = Path(tempfile.mkdtemp(prefix="torch-extensions-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment(**changes: str) -> dict[str, str]:
    """The environment of a run on the CPU, with tests' own plugins importable; an empty value removes a variable."""
    for lock in extensions().rglob("lock"):  # of a run that was killed while it compiled: all others would wait for it
        lock.unlink()
    values = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(extensions()),
        "AXOLOTL_DO_NOT_TRACK": "1",
        "ACCELERATE_USE_CPU": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
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


def launched(config: Path, *options: str, stderr: int = subprocess.DEVNULL, **variables: str) -> subprocess.Popen[str]:
    """Start to train under torchrun with these options of its own."""
    command = [AXOLOTL, "train", config, "--launcher", "torchrun", "--", *options]
    quiet, env = subprocess.DEVNULL, environment(**variables)
    return subprocess.Popen(command, cwd=config.parent, env=env, stdin=quiet, stdout=quiet, stderr=stderr, text=True)


class Forks:
    """`axolotl` in forks of one process that has imported it; every fork has environment, folder and output of its own.

    What differs from a process of its own: the imports are done, and nothing runs `atexit`.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(
        self, *args: str | Path, cwd: Path, stdin: str = "", processes: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `axolotl ARGS`; in `processes` processes, if not 0, that find one another as torchrun's do."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
                # DeepSpeed looks for its accelerator when it is imported.
                env=environment(DS_ACCELERATOR="cpu"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            logs = [f"{folder}/{rank}" for rank in range(processes or 1)]
            (Path(folder) / "stdin").write_text(stdin)
            job = {
                "arguments": list(map(str, args)),
                "cwd": str(cwd),
                "environments": [environment(**variables) | each for each in (ranks(processes) if processes else [{}])],
                "stdin": f"{folder}/stdin",
                "logs": logs,
            }
            print(json.dumps(job), file=self.process.stdin, flush=True)
            statuses = json.loads(self.process.stdout.readline())
            out, err = ("\n".join(Path(log + end).read_text() for log in logs) for end in (".out", ".err"))
        return subprocess.CompletedProcess(args, next(filter(None, statuses), 0), out, err)

    def train(self, config: Path, processes: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Train as `trained` does, with environment variables instead of torchrun."""
        run = self("train", config, "--launcher", "python", cwd=config.parent, processes=processes, **variables)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return run

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()  # no fork runs between two tests
            self.process.wait()


def ranks(processes: int) -> list[dict[str, str]]:
    """Return what torchrun sets for each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0, "MASTER_PORT": port}
    return [
        {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in {**world, "RANK": i, "LOCAL_RANK": i}.items()}
        for i in range(processes)
    ]


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
            "dataset_num_proc": 1,  # the default starts a process a core for thirty rows
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
            "learning_rate": 3e-3,
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
