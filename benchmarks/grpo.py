"""What GRPO's gradient at a draw is with the old log-probabilities of the mean, and with those of the draw itself.

    python -m benchmarks.grpo --model .demo/SmolLM2-135M-Instruct --seeds 0 1 2

TRL's GRPOTrainer makes one step with IVON-LoRA by `auto` and keeps the completions, which the mean wrote. TRL's loss of
them is then taken at draws, with either old policy. Advantages are normal random numbers: rewards of a model that has
learned nothing hardly differ. docs/how-it-works.md, "Completions and their gradient", has the derivation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_ivon import attach

GROUP, BATCHES, MOST_TOKENS, RATE = 8, 4, 24, 2e-4
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
THINGS = ("a lemon", "the sea", "a piano", "snow", "a tiger", "bread", "a cloud", "iron")
POLICIES = ("mean", "draw")


def trained(model: str, seed: int, folder: str) -> tuple[Any, list[dict[str, Any]]]:
    """Return a Trainer after its first step, and the batches of that step with new advantages."""
    torch.manual_seed(seed)
    trainer: Any = trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        args=trl.GRPOConfig(
            folder,
            per_device_train_batch_size=GROUP,
            gradient_accumulation_steps=BATCHES,
            num_generations=GROUP,
            max_completion_length=MOST_TOKENS,
            max_steps=1,
            learning_rate=RATE,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"What is {thing}?"} for thing in THINGS]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(**LORA),
    )
    attach(trainer)
    batches: list[dict[str, Any]] = []
    compute_loss = trainer.compute_loss

    def keeping(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append({**batch, "advantages": torch.randn(GROUP).to(batch["advantages"])})
        return compute_loss(model, batch, *args, **kwargs)

    trainer.compute_loss = keeping
    trainer.train()
    trainer.compute_loss = compute_loss
    return trainer, batches


def log_probabilities(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """Return log p of the completions' tokens, shape [completions, tokens], at the weights in place."""
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])[0]


def gradient(trainer: Any, batches: Sequence[dict[str, Any]], old: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the gradient of TRL's loss, of all weights in one row, and the share of tokens that its clip takes out."""
    shares = trainer._metrics["train"]["clip_ratio/region_mean"]
    shares.clear()
    params = list(trainer.posterior_training.params.values())
    for batch, own in zip(batches, old, strict=True):
        trainer.compute_loss(trainer.model, {**batch, "old_per_token_logps": own}).backward()
    flat = torch.cat([param.grad.flatten() for param in params])
    for param in params:
        param.grad = None
    return flat, statistics.mean(shares)


def compare(model: str, seed: int, draws: int, widths: Sequence[float]) -> list[list[float]]:
    """Return for each width of the draws, a factor on σ, the numbers of a row of the table.

    They are the standard deviation of log r with the mean as the old policy, the share of tokens without a gradient,
    the cosine of the gradient averaged over draws with that at m, with either old policy, and likewise ĥ, averaged over
    draws and weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer, batches = trained(model, seed, folder)
    optimizer, params = trainer.posterior_training.optimizer, list(trainer.posterior_training.params.values())
    masks = [batch["completion_mask"].bool() for batch in batches]
    means = torch.cat([optimizer.mean(param).flatten() for param in params])
    sigma = torch.cat([optimizer.sigma(param).flatten() for param in params])
    of_mean = [log_probabilities(trainer, batch) for batch in batches]
    at_mean, _ = gradient(trainer, batches, of_mean)
    rows = []
    for width in widths:
        total, h_hat = {name: torch.zeros_like(at_mean) for name in POLICIES}, dict.fromkeys(POLICIES, 0.0)
        deviations, shares = [], []
        for number in range(draws):
            with optimizer.evaluation_draw(number, tau=1 / width**2):
                moved = torch.cat([param.detach().flatten() for param in params]) - means
                of_draw = [log_probabilities(trainer, batch) for batch in batches]
                for name, old in zip(POLICIES, (of_mean, of_draw), strict=True):
                    flat, share = gradient(trainer, batches, old)
                    total[name] += flat
                    h_hat[name] += float((flat * moved / (width * sigma) ** 2).mean()) / draws
                    if name == "mean":
                        shares.append(share)
            noise = [(a - b)[mask] for a, b, mask in zip(of_draw, of_mean, masks, strict=True)]
            deviations.append(float(torch.cat(noise).std()))
        cosines = [float(torch.cosine_similarity(flat, at_mean, 0)) for flat in total.values()]
        rows.append([statistics.mean(deviations), statistics.mean(shares), *cosines, *h_hat.values()])
    return rows


def table(model: str, seeds: Sequence[int], draws: int, widths: Sequence[float]) -> str:
    """Return the table, averaged over seeds."""
    lines = ["| × σ | deviation of log r | without a gradient | cosine: mean | draw | 10⁵ ĥ: mean | draw |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|")
    for width, *rows in zip(widths, *(compare(model, seed, draws, widths) for seed in seeds), strict=True):
        noise, share, *cosines, h_mean, h_draw = map(statistics.mean, zip(*rows, strict=True))
        cells = [f"{width:g}", f"{noise:.3f}", f"{share:.1%}", *(f"{cosine:.2f}" for cosine in cosines)]
        lines.append(f"| {' | '.join([*cells, f'{1e5 * h_mean:.2f}', f'{1e5 * h_draw:.2f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    args = parser.parse_args()
    print(table(args.model, args.seeds, args.draws, args.widths))


if __name__ == "__main__":
    main()
