"""Signals at random moments of a small axolotl run, and what is on the disk afterwards.

    python tests/robustness/interrupts.py --moments 200 --seed 0

A moment is a signal (SIGINT, SIGTERM, SIGKILL), a part of the run (forward, backward, step, save, what axolotl-ivon
itself does to save, evaluation, or the loop around them) and a place inside that part: the n-th call of a Python
function, or line in the files that save and step. After the signal every adapter on
the disk must be complete, its mean and σ those of one step of the uninterrupted run to the last bit (in the middle of
a step: of that step or the next, tensor by tensor), and every checkpoint whole. Then the run is started again, resumes
by itself, and must end with the same files as the uninterrupted run, with nothing left over.

One process imports axolotl and loads configuration and data, and every run is a fork of it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"ACCELERATE_USE_CPU": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import BasePlugin
from axolotl.train import train
from fork_server import exit_after
from runs import ROWS, Configs
from safetensors.torch import load_file
from tiny import build_llama, write_chats
from tqdm import tqdm
from transformers import TrainerCallback

from axolotl_ivon import IVONLoRA, Posterior

SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
PARTS = ("forward", "backward", "step", "save", "write", "evaluation", "loop")
# Elsewhere only calls of functions are places, or a run would take a minute.
LINE_BY_LINE = ("axolotl_ivon", "transformers/trainer", "peft/peft_model", "axolotl/train.py", "trainers/base.py")
CONFIG, MEAN, SIGMA = "adapter_config.json", "adapter_model.safetensors", "ivon_sigma.safetensors"
SECONDS = 120
# How a run knows what to do: {"modules": file}, {"count": file} or {"signal": name, "part": name, "place": n}.
ORDERS = "IVON_INTERRUPT"


class Moment(NamedTuple):
    signal: str
    part: str  # of the run
    place: int  # the signal comes at the n-th place of this part


class Places:
    """Counts the places that a run comes by in every part, and acts at one of them."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.orders = orders
        self.counts: Counter[str] = Counter()
        self.stack: list[str] = []

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        if event in ("call", "line") and self.stack:
            # A forward pass of an evaluation belongs to the evaluation; everything belongs to the loop.
            part = self.stack[min(1, len(self.stack) - 1)]
            if part == "save" and "axolotl_ivon" in frame.f_code.co_filename:
                part = "write"
            self.counts[part] += 1
            if self.counts[part] == self.orders.get("place") and part == self.orders["part"]:
                os.kill(os.getpid(), signal.Signals[self.orders["signal"]])
        return self.trace if any(name in frame.f_code.co_filename for name in LINE_BY_LINE) else None

    def around(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(part)
            before = sys.gettrace()
            sys.settrace(self.trace)
            try:
                return function(*args, **kwargs)
            finally:
                sys.settrace(before)
                self.stack.pop()

        setattr(owner, name, counted)


class Interrupts(BasePlugin):
    """The axolotl plugin of a run: sends the signal, or counts places and notes the mean and σ after every step."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.orders = json.loads(os.environ.get(ORDERS, "{}"))
        if not self.orders.keys() & {"count", "place"}:
            return
        self.places = Places(self.orders)
        self.notes = Notes(trainer)  # in every run, so that all come by the same places
        trainer.add_callback(self.notes)
        for owner, name, part in (
            (trainer, "compute_loss", "forward"),
            (trainer.accelerator, "backward", "backward"),
            (IVONLoRA, "step", "step"),
            (trainer, "_save_checkpoint", "save"),
            (trainer.model, "save_pretrained", "save"),
            (trainer, "evaluate", "evaluation"),
            (trainer, "train", "loop"),
        ):
            self.places.around(owner, name, part)

    def post_train(self, cfg: Any, model: Any) -> None:
        if "modules" in self.orders:
            Path(self.orders["modules"]).write_text("\n".join(sys.modules))
        if "count" in self.orders:
            torch.save((dict(self.places.counts), self.notes.steps), self.orders["count"])


class Notes(TrainerCallback):
    """Mean and σ of every tensor after every step, under PEFT's names."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.steps: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        trained = [(name, param) for name, param in self.trainer.model.named_parameters() if param.requires_grad]
        values = {name: (param.detach().clone(), optimizer.sigma(param)) for name, param in trained}
        self.steps.append({name.replace(".default", ""): pair for name, pair in values.items()})

    on_step_end = on_train_begin


BENCH: Bench  # of all processes


class Bench:
    """A folder with a base model, data and a first adapter, and the uninterrupted run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs = Configs(folder, build_llama(folder / "base"))
        write_chats(folder / "chats.jsonl", ROWS)
        # axolotl does not seed a new adapter, so all runs begin with one that a short run has made.
        self.load(max_steps=1, save_steps=1, eval_steps=1)
        status, log = self.run(folder / "start", {"modules": "modules"})
        assert status == 0, f"the first run failed\n{log}"
        # What a run imports, the next ones find imported; nor does their garbage collector look at it.
        for name in (folder / "start" / "modules").read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        self.load(lora_model_dir=str(folder / "start" / "out"))
        gc.collect()
        gc.freeze()
        self.reference = folder / "reference"
        status, log = self.run(self.reference, {"count": str(folder / "steps.pt")})
        assert status == 0, f"the uninterrupted run failed\n{log}"
        self.counts, self.steps = torch.load(folder / "steps.pt")
        assert (len(self.steps), set(self.counts)) == (5, set(PARTS)), f"{len(self.steps)} steps, {self.counts}"

    def load(self, **changes: Any) -> None:
        """Load configuration and data, as `axolotl train` does."""
        steps = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1, "eval_steps": 3, "logging_steps": 1}
        settings = {
            "plugins": ["axolotl_ivon.IVONLoRAPlugin", "interrupts.Interrupts"],
            "dataset_prepared_path": str(self.folder / "prepared"),
            "output_dir": "out",
            "auto_resume_from_checkpoints": True,
            "val_set_size": 0.2,
            "ivon_clip": 0.1,
            "ivon_eval_samples": 2,
        }
        path = self.configs("run", **{**settings, **steps, **changes})
        here = Path.cwd()
        os.chdir(self.folder)
        try:
            self.cfg = load_cfg(str(path))
            self.data = load_datasets(cfg=self.cfg, cli_args=TrainerCliArgs())
        finally:
            os.chdir(here)

    def run(self, place: Path, orders: dict[str, Any]) -> tuple[int, str]:
        """Run axolotl in a fork, in the folder `place`; return how it ended (as waitstatus_to_exitcode) and its log."""
        place.mkdir(exist_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            exit_after(partial(self.train, place, orders))
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), (place / "log").read_text(errors="replace")[-4000:]

    def train(self, place: Path, orders: dict[str, Any]) -> None:
        os.chdir(place)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ[ORDERS] = json.dumps(orders)
        signal.alarm(SECONDS)
        train(cfg=self.cfg, dataset_meta=self.data)

    def moments(self, count: int, seed: int) -> Iterator[Moment]:
        """Every signal in every part equally often, at random places."""
        rng = random.Random(seed)
        pairs = [(name, part) for name in SIGNALS for part in PARTS]
        for i in range(count):
            if i % len(pairs) == 0:
                rng.shuffle(pairs)
            name, part = pairs[i % len(pairs)]
            # The counts of two runs differ a little, so none of the last places.
            yield Moment(name, part, rng.randint(1, int(0.97 * self.counts[part])))

    def check(self, moment: Moment, place: Path) -> None:
        """Interrupt a run, look at what is on the disk, resume it, and look again."""
        status, log = self.run(place, moment._asdict())
        expected = 0 if moment.signal == "SIGINT" else -signal.Signals[moment.signal]
        assert status == expected, f"it ended with {status}\n{log}"
        self.check_adapters(place / "out", moment)
        status, log = self.run(place, {})
        assert status == 0, f"resuming failed with {status}\n{log}"
        for name in (CONFIG, MEAN, SIGMA):
            same = (place / "out" / name).read_bytes() == (self.reference / "out" / name).read_bytes()
            assert same, f"after resuming, {name} is not that of the uninterrupted run"
        files = {str(path.relative_to(place)) for path in place.rglob("*")}
        wanted = {str(path.relative_to(self.reference)) for path in self.reference.rglob("*")}
        # Killed after the last checkpoint was there and before the one that it replaces was gone, a run leaves both.
        extra = {name for name in files - wanted if not name.startswith("out/checkpoint-2")}
        differing = extra | (wanted - files)
        assert not differing, f"after resuming, files differ: {sorted(differing)}"
        self.check_adapters(place / "out", moment)

    def check_adapters(self, out: Path, moment: Moment) -> None:
        for path in out.rglob(MEAN):
            folder = path.parent
            if any(part.startswith(".") for part in folder.relative_to(out).parts):
                continue  # a temporary name: nobody takes it for an adapter
            name = str(folder.relative_to(out.parent))
            json.loads((folder / CONFIG).read_text())
            if not (folder / SIGMA).exists():
                # A signal before training began: axolotl's handler saves what it has loaded.
                assert moment[:2] == ("SIGINT", "loop"), f"{name} has no σ"
                means, sigmas = load_file(path), None
            else:
                posterior = Posterior.from_pretrained(folder)
                means, sigmas = dict(posterior.mean), dict(posterior.sigma)
            steps = [self.steps_of(means, sigmas, key) for key in self.steps[0]]
            assert all(steps), f"{name} holds a mean or σ that no step of the run had"
            if folder.name.startswith("checkpoint-"):
                number = int(folder.name.rpartition("-")[2])
                assert all(number in each for each in steps), f"{name} is not of its step"
                kept = {each.name for each in (self.reference / "out" / "checkpoint-4").iterdir()}
                assert {each.name for each in folder.iterdir()} == kept, f"{name} is not complete"
                state = json.loads((folder / "trainer_state.json").read_text())
                assert state["global_step"] == number, f"{name}: trainer_state.json is of another step"
                torch.load(folder / "optimizer.pt", weights_only=True)
            elif moment.part != "step":
                assert bool(set.intersection(*steps)), f"{name} mixes steps: {steps}"

    def steps_of(self, means: Any, sigmas: Any, key: str) -> set[int]:
        """Return the steps after which a tensor had this mean and, or one step on, this σ."""
        found = {t for t, step in enumerate(self.steps) if torch.equal(means[key], step[key][0])}
        if sigmas is None:
            return found
        same = {t for t, step in enumerate(self.steps) if torch.equal(sigmas[key], step[key][1])}
        return {t for t in found if same & {t, t + 1}}


def verdict(number: int, moment: Moment) -> tuple[Moment, str]:
    """Check a moment, in a process of the pool, and return it with what was wrong."""
    place = BENCH.folder / f"run-{number}"
    try:
        BENCH.check(moment, place)
        wrong = ""
    except Exception:
        wrong = traceback.format_exc()
    shutil.rmtree(place, ignore_errors=True)
    print(*moment, wrong or "ok", flush=True)
    return moment, wrong


def main() -> None:
    global BENCH
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    # tqdm's own lock is one for all forks, and a run that is killed while it holds it would stop all that come after.
    tqdm.set_lock(threading.RLock())
    with tempfile.TemporaryDirectory() as folder:
        BENCH = Bench(Path(folder))
        print(f"places per part: {dict(sorted(BENCH.counts.items()))}", flush=True)
        with get_context("fork").Pool(options.jobs) as pool:
            results = pool.starmap(verdict, enumerate(BENCH.moments(options.moments, options.seed)), chunksize=1)
    bad = [result for result in results if result[1]]
    print(f"{len(results)} moments, seed {options.seed}: {len(bad)} wrong")
    for name in SIGNALS:
        each = [f"{part} {sum(m.part == part and m.signal == name for m, _ in results)}" for part in PARTS]
        print(f"  {name:8} {', '.join(each)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
