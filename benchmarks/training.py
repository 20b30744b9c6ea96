"""What a whole training step costs with IVONLoRA and with ivon-opt, beside AdamW.

    python example_configs/smollm2/prepare_demo.py                         # makes .demo, with SmolLM2-135M
    python benchmarks/training.py                                          # on a CPU
    python benchmarks/training.py --model meta-llama/Llama-3.2-3B --device cuda --dtype bfloat16

Forward pass, backward pass and optimizer of one model with LoRA, r 8 on q and v. The optimizers take turns in one
process, with the same weights and the same batch in a turn; figures are medians, and ratios are medians of the ratios
within a turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from typing import Any

import ivon
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from axolotl_ivon import IVONLoRA

MODEL = ".demo/SmolLM2-135M-Instruct"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder, or a Hub id")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=45, help="tokens of an example")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    base.to(device)
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = [param for param in model.parameters() if param.requires_grad]
    ours, peer = IVONLoRA(trained, lr=1e-2, ess=1e6), ivon.IVON(trained, lr=1e-2, ess=1e6)
    ways: dict[str, tuple[torch.optim.Optimizer, Any]] = {
        "AdamW": (torch.optim.AdamW(trained, lr=1e-4, fused=True), nullcontext),
        "IVONLoRA": (ours, ours.sampled_params),
        "ivon-opt": (peer, lambda: peer.sampled_params(train=True)),
    }

    def step(way: str, ids: torch.Tensor) -> float:
        optimizer, context = ways[way]
        started = time.perf_counter()
        with context():
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started)

    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(arguments.repeats + 2):
        ids = torch.randint(3, base.config.vocab_size, (arguments.batch, arguments.length), device=device)
        # Each way comes first, second and last in turn.
        order = [list(ways)[(turn + k) % len(ways)] for k in range(len(ways))]
        taken = {way: step(way, ids) for way in order}
        if turn >= 2:
            for way in ways:
                times[way].append(taken[way])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} CPU threads"
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {where}, torch {torch.__version__}, medians of {arguments.repeats}",
        "model": f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights, {arguments.dtype}, "
        f"{sum(p.numel() for p in trained) / 1e6:.2f} M trained, batches of {arguments.batch} × {arguments.length}",
        "steps": {
            way: {
                "ms": statistics.median(found),
                "x AdamW": statistics.median(t / u for t, u in zip(found, times["AdamW"], strict=True)),
            }
            for way, found in times.items()
        },
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['machine']}\n{result['model']}\n\n| | ms a step | × AdamW fused |\n|---|---:|---:|")
    for way, row in result["steps"].items():
        print(f"| {way} | {row['ms']:.0f} | {row['x AdamW']:.3f} |")


if __name__ == "__main__":
    main()
