"""What `ivon-post fit` costs: its Fisher pass beside an epoch of training, and each method on real data.

    python example_configs/smollm2/prepare_demo.py                         # makes .demo, with SmolLM2-135M
    python benchmarks/fitting.py                                           # on a CPU
    python benchmarks/fitting.py --model meta-llama/Llama-3.2-3B --device cuda --dtype bfloat16 --examples 512

One epoch over texts of random tokens, the last third of which are labels, in the batches of `fit`: forward and backward
pass in training mode, with the loss over the labels and without an optimizer; and `fit --method fisher`, per-example
gradients of labels that are drawn. They take turns; figures are medians, and ratios are medians of the ratios within a
turn. Memory is the peak of a process of its own, or what the device had allocated at most. Then `fit` by each method on
movie snippets, for the numbers of steps and evaluations.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_ivon.data.encode import EncodedExample
from axolotl_ivon.fitting.fisher import Squares, residual_loss, squarer
from axolotl_ivon.fitting.fit import fit
from axolotl_ivon.models.batching import Batches
from axolotl_ivon.models.gradients import ExampleGradients, adapter_parameters, example_losses
from axolotl_ivon.models.session import Loading

MODEL = ".demo/SmolLM2-135M-Instruct"
DATA = ".demo/data/movie-train.jsonl"


def texts(count: int, length: int, vocabulary: int) -> list[EncodedExample]:
    """Make texts of `length` tokens, more or less, whose last third is scored."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        size = int(torch.randint(2 * length // 3, 4 * length // 3 + 1, (), generator=draw))
        ids = torch.randint(3, vocabulary, (size + 1,), generator=draw).tolist()
        positions = list(range(2 * size // 3, size))
        found.append(EncodedExample(ids[:-1], positions, [ids[position + 1] for position in positions]))
    return found


def train_epoch(model: Any, batches: list[list[EncodedExample]]) -> None:
    """Run forward and backward passes as a Trainer does, and drop the gradients."""
    model.train()
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    for batch in batches:
        longest = max(len(item.ids) for item in batch)
        ids = torch.tensor([item.ids + [0] * (longest - len(item.ids)) for item in batch], device=model.device)
        mask = torch.tensor([[1] * len(item.ids) + [0] * (longest - len(item.ids)) for item in batch])
        labels = torch.full_like(ids, -100)
        for row, item in enumerate(batch):
            for position, target in zip(item.positions, item.targets, strict=True):
                if position + 1 < longest:
                    labels[row, position + 1] = target
        model(input_ids=ids, attention_mask=mask.to(ids.device), labels=labels).loss.backward()
        model.zero_grad()
    model.eval()


def fisher_pass(model: Any, batches: list[list[EncodedExample]]) -> Squares:
    """Run the pass of `fit --method fisher`."""
    loss = residual_loss(torch.Generator(model.device).manual_seed(0))
    losses = functools.partial(example_losses, model, loss=loss)
    with ExampleGradients(model, adapter_parameters(model), losses) as gradients:
        square = squarer(gradients, lambda item: len(item.positions))
        return functools.reduce(Squares.add, map(square, batches))


def peak(run: Callable[[], object], device: torch.device) -> float:
    """Return the largest memory while `run` runs, in MB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 1e6
    reader, writer = os.pipe()
    if not os.fork():
        run()
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3).encode())
        os._exit(0)
    os.wait()
    return float(os.read(reader, 64))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder, or a Hub id")
    parser.add_argument("--data", default=DATA, help="chat JSONL")
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--length", type=int, default=45, help="tokens of an example")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    base.to(device)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora).eval()
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    items = texts(arguments.examples, arguments.length, base.config.vocab_size)
    batches = Batches(items, None, device.type, base.config.vocab_size).once()
    ways: dict[str, Callable[[], object]] = {
        "training epoch, no optimizer": functools.partial(train_epoch, model, batches),
        "fit --method fisher": functools.partial(fisher_pass, model, batches),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(arguments.repeats + 1):
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            ways[way]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[way].append(time.perf_counter() - begun)
    first = next(iter(ways))
    rows = {
        way: {
            "seconds": statistics.median(found),
            "x training": statistics.median(t / u for t, u in zip(found, times[first], strict=True)),
            "peak MB": peak(ways[way], device),
        }
        for way, found in times.items()
    }
    fits = {}
    if Path(arguments.data).is_file():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(arguments.model).save_pretrained(folder)
            for method in ("fisher", "ivon", "tfb"):
                begun = time.perf_counter()
                q = fit(
                    folder,
                    arguments.data,
                    method=method,
                    limit=arguments.examples,
                    samples=4,
                    loading=Loading(arguments.model, device=arguments.device),
                )
                facts = {"steps": q.metadata.get("fit_steps"), "evaluations": q.metadata.get("tfb_evaluations")}
                fits[method] = {"seconds": time.perf_counter() - begun, **facts}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} CPU threads"
    trained = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    result = {
        "machine": f"{platform.machine()}, {where}, torch {torch.__version__}, medians of {arguments.repeats}",
        "model": f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights, {arguments.dtype}, "
        f"{trained / 1e6:.2f} M of LoRA; {arguments.examples} texts of about {arguments.length} tokens",
        "passes": rows,
        "fits": fits,
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['machine']}\n{result['model']}\n\n| | s | × training | peak MB |\n|---|---:|---:|---:|")
    for way, pass_ in rows.items():
        print(f"| {way} | {pass_['seconds']:.1f} | {pass_['x training']:.2f} | {pass_['peak MB']:,.0f} |")
    if fits:
        print(f"\n`fit` on {arguments.examples} snippets, loading included\n")
        print("| | s | steps | evaluations |\n|---|---:|---:|---:|")
        for method, row in fits.items():
            print(f"| {method} | {row['seconds']:.0f} | {row['steps'] or '–'} | {row['evaluations'] or '–'} |")


if __name__ == "__main__":
    main()
