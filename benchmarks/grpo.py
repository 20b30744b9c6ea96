"""GRPO: AdamW, IVON-LoRA whose mean writes the completions, and IVON-LoRA whose draws do; and the old policy's ratio.

    python example_configs/smollm2/prepare_reinforce.py
    python -m benchmarks.grpo run --quick        # SmolLM2-135M names capitals; one seed, 15 minutes of one core
    python -m benchmarks.grpo run                # Qwen2.5-Coder-0.5B, sums by reasoning-gym; two seeds, hours
    python -m benchmarks.grpo report
    python -m benchmarks.grpo ratio --model .demo/SmolLM2-135M-Instruct --seeds 0 1 2

`run` trains every method by TRL's GRPOTrainer at one learning rate, IVON-LoRA by `auto`, and has the mean (AdamW: the
weights) answer test questions eight times: pass@1 is the share of right answers, pass@8 that of questions with a right
one among eight. It appends a line of JSON a method and seed, and goes on from the lines that are there. The capitals
are those of `example_configs/smollm2/prepare_reinforce.py`, and their reward is the example's.

`ratio`: what GRPO's gradient at a draw is with the old log-probabilities of the mean, and with those of the draw.
A step is made with IVON-LoRA by `auto` and its completions, which the mean wrote, are kept. TRL's loss of them is then
taken at draws, with either old policy. Advantages are normal random numbers: rewards of a model that has learned
nothing hardly differ. docs/how-it-works.md, "Completions and their gradient", has the derivation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_ivon import attach
from example_configs import rewards

from .fidelity.report import table as markdown
from .fidelity.run import append, current_commit, read_results

GROUP, BATCHES, MOST_TOKENS, RATE = 8, 4, 24, 2e-4
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
THINGS = ("a lemon", "the sea", "a piano", "snow", "a tiger", "bread", "a cloud", "iron")
POLICIES = ("mean", "draw")
METHODS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "IVON, mean": {},
    "IVON, 2 draws": {"rollouts": "draws", "rollout_draws": 2},
    "IVON, 4 draws": {"rollouts": "draws", "rollout_draws": 4},
    "untrained": None,
}
DEMO = Path(".demo")
RESULTS = Path(__file__).with_name("grpo.jsonl")
Rows = list[dict[str, Any]]


def sums(count: int, split: str, seed: int) -> Rows:
    """Return sums of two or three numbers below 100; none is in two splits."""
    import reasoning_gym

    rows: Rows = []
    numbers = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    for entry in reasoning_gym.create_dataset("chain_sum", size=20 * count, seed=seed, **numbers):
        # By the digits of the question: a tenth of all questions are for tests.
        if (sum(map(ord, entry["question"])) % 10 == 0) == (split == "test"):
            rows.append(
                {"prompt": _chat("Answer with the number alone.", entry["question"]), "answer": entry["answer"]}
            )
    return rows[:count]


def capitals(count: int, split: str, seed: int, folder: Path = DEMO / "capitals") -> Rows:
    """Return questions of the example, as often as are needed, those for training in an order of the seed."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    if split == "train":
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
        lines = [lines[place] for place in order]
        lines *= -(-count // len(lines))
    chats = [json.loads(line)["messages"] for line in lines[:count]]
    return [{"prompt": chat[:-1], "answer": chat[-1]["content"]} for chat in chats]


def _chat(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


class Task(NamedTuple):
    """Questions, a reward that is 1 for a right answer, the tokens of an answer, and the model that learns it."""

    rows: Callable[[int, str, int], Rows]
    reward: Callable[..., list[float]]
    tokens: int
    model: str


TASKS = {
    "sums": Task(sums, rewards.result, 8, "Qwen2.5-Coder-0.5B-Instruct"),
    "capitals": Task(capitals, rewards.named, 10, "SmolLM2-135M-Instruct"),
}
# `prompts` of a step, with GROUP completions each; `test` questions.
FULL: dict[str, Any] = {"task": "sums", "steps": 100, "prompts": 4, "rate": 2e-4, "test": 100}
QUICK: dict[str, Any] = {"task": "capitals", "steps": 24, "prompts": 1, "rate": 5e-4, "test": 16}


def grpo_trainer(model: str, rows: Rows, reward: Any, seed: int, folder: str, **settings: Any) -> Any:
    """Return TRL's GRPOTrainer over a new adapter, nothing attached to it yet; a step is of BATCHES micro-batches."""
    torch.manual_seed(seed)
    args = {
        "gradient_accumulation_steps": BATCHES,
        "num_generations": GROUP,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
    }
    return trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=trl.GRPOConfig(folder, **{**args, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(**LORA),
    )


def train(model: str, task: Task, method: str, seed: int, setting: dict[str, Any]) -> dict[str, Any]:
    """Train and test a method; return what is measured, by the names of a line of results."""
    distinct: list[float] = []

    def reward(completions: Any, **others: Any) -> list[float]:
        texts = [completion[-1]["content"] for completion in completions]
        distinct.append(statistics.mean(len(set(group)) for group in _groups(texts)))
        return task.reward(completions=completions, **others)

    steps, prompts = setting["steps"], setting["prompts"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(
            model,
            task.rows(steps * prompts, "train", seed),
            reward,
            seed,
            folder,
            per_device_train_batch_size=prompts * GROUP // BATCHES,
            max_completion_length=task.tokens,
            max_steps=steps,
            learning_rate=setting["rate"],
            logging_steps=1,
        )
        read_prompt_once(trainer.model)
        if (draws := METHODS[method]) is not None:
            attach(trainer, **draws)
        began = time.process_time()
        if method != "untrained":
            trainer.train()
        seconds = (time.process_time() - began) / steps
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    curves = {"reward": [entry["reward"] for entry in log], "entropy": [entry["entropy"] for entry in log]}
    curves["distinct"] = distinct
    rounded = {name: [round(value, 4) for value in values] for name, values in curves.items()}
    return {**rounded, "seconds": round(seconds, 2), **answered(trainer, task, setting["test"])}


def read_prompt_once(model: Any) -> None:
    """Let `generate` read the prompt once for all of its completions, where a batch has one prompt alone."""
    generate = model.generate

    def reading_once(input_ids: Tensor, **others: Any) -> Any:
        if len(input_ids) > 1 and bool((input_ids == input_ids[0]).all()):
            cache = model(input_ids[:1, :-1], use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(input_ids))
            others["past_key_values"] = cache
        return generate(input_ids=input_ids, **others)

    model.generate = reading_once


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), GROUP):
        yield texts[start : start + GROUP]


@torch.no_grad()
def answered(trainer: Any, task: Task, count: int) -> dict[str, float]:
    """Return pass@1 and pass@8 of sampled answers to test questions, at softmax temperature 1."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    torch.manual_seed(0)
    right = []
    for row in task.rows(count, "test", 10_000):
        ids = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].repeat(GROUP, 1)
        ids, width = ids.to(model.device), ids.shape[1]
        own = {"do_sample": True, "top_k": 0, "max_new_tokens": task.tokens, "pad_token_id": tokenizer.pad_token_id}
        # A mask of its own, as the token that ends a turn pads too.
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **own)
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        right.append([value == 1 for value in task.reward(completions=completions, answer=[row["answer"]] * GROUP)])
    return {"pass@1": statistics.mean(map(statistics.mean, right)), "pass@8": statistics.mean(map(any, right))}


def run(
    results: Path, seeds: Sequence[int], methods: Sequence[str], model: str | None, setting: dict[str, Any]
) -> None:
    """Train and test what has no line in `results` yet."""
    task = TASKS[setting["task"]]
    for seed in seeds:
        for method in methods:
            line = {**setting, "seed": seed, "method": method}
            if any(line.items() <= done.items() for done in map(_plain, read_results(results))):
                continue
            measured = train(model or str(DEMO / task.model), task, method, seed, setting)
            append(results, {**line, **measured, "commit": current_commit()})


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not isinstance(value, list)}


HEADS = (
    "",
    "seeds",
    "reward, first quarter",
    "last quarter",
    "pass@1",
    "pass@8",
    "entropy",
    "distinct of 8",
    "CPU s a step",
)


def report(results: Path) -> str:
    """Return a table a setting, averaged over seeds; entropy and distinct completions are those of the last quarter."""
    by_setting: dict[str, Rows] = {}
    for line in read_results(results):
        title = ", ".join(f"{name} {line[name]}" for name in FULL)
        by_setting.setdefault(title, []).append(line)
    tables = []
    for title, lines in by_setting.items():
        rows = []
        for method in METHODS:
            if own := [line for line in lines if line["method"] == method]:
                quarter = max(1, own[0]["steps"] // 4)
                curves = [("reward", slice(quarter)), *((name, slice(-quarter, None)) for name in CURVES)]
                first, *last = (_mean([line[name][part] for line in own]) for name, part in curves)
                passes = (f"{statistics.mean(line[name] for line in own):.3f}" for name in ("pass@1", "pass@8"))
                seconds = statistics.mean(line["seconds"] for line in own)
                cost = [f"{seconds:.1f}" if last[0] else ""]
                rows.append([method, str(len(own)), first, last[0], *passes, *last[1:], *cost])
        tables.append(f"{title}:\n\n{markdown(HEADS, rows)}")
    return "\n\n".join(tables)


CURVES = ("reward", "entropy", "distinct")


def _mean(curves: Sequence[Sequence[float]]) -> str:
    values = [value for curve in curves for value in curve]
    return f"{statistics.mean(values):.3f}" if values else ""


def trained(model: str, seed: int, folder: str) -> tuple[Any, list[dict[str, Any]]]:
    """Return a Trainer after its first step, and the batches of that step with new advantages."""
    trainer = grpo_trainer(
        model,
        [{"prompt": f"What is {thing}?"} for thing in THINGS],
        lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        seed,
        folder,
        per_device_train_batch_size=GROUP,
        max_completion_length=MOST_TOKENS,
        max_steps=1,
        learning_rate=RATE,
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
    commands = parser.add_subparsers(dest="command", required=True)
    of_run, of_report, of_ratio = map(commands.add_parser, ("run", "report", "ratio"))
    for command in (of_run, of_report):
        command.add_argument("--results", type=Path, default=RESULTS)
    of_run.add_argument("--quick", action="store_true", help="the small setting, 15 minutes of one core")
    of_run.add_argument("--task", choices=TASKS)
    of_run.add_argument("--model")
    of_run.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    of_run.add_argument("--seeds", type=int, nargs="+")
    for name in ("steps", "prompts", "test"):
        of_run.add_argument(f"--{name}", type=int)
    of_run.add_argument("--rate", type=float)
    of_ratio.add_argument("--model", required=True)
    of_ratio.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    of_ratio.add_argument("--draws", type=int, default=16)
    of_ratio.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    args = parser.parse_args()
    if args.command == "ratio":
        print(table(args.model, args.seeds, args.draws, args.widths))
    elif args.command == "report":
        print(report(args.results))
    else:
        setting = dict(QUICK if args.quick else FULL)
        given = {name: getattr(args, name) for name in setting}
        setting |= {name: value for name, value in given.items() if value is not None}
        run(args.results, args.seeds or ([0] if args.quick else [0, 1]), args.methods, args.model, setting)


if __name__ == "__main__":
    main()
