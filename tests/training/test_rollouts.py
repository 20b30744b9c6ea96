"""Reinforcement learning with TRL's own Trainers: what writes completions, and where gradients are taken."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from runs import ranks
from tiny import WORDS
from trainers import as_saved, before_every_loss, same
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from axolotl_ivon import IVONError, Posterior, attach

TOKEN = 44
DRAWS = {"rollouts": "draws", "rollout_draws": 2}
TRAINERS = {
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig),
    "OnlineDPO": (OnlineDPOTrainer, OnlineDPOConfig),
}
LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def reward(completions: Any, completion_ids: Any, **_: Any) -> list[float]:
    """Return the share of one token in each completion."""
    return [ids.count(TOKEN) / len(ids) for ids in completion_ids]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a Trainer of TRL over the tiny Llama with a new adapter."""

    def make(kind: str = "GRPO", wrapped: bool = False, reward: Any = reward, logits: float = 1, **args: Any) -> Any:
        torch.manual_seed(1)
        trainer, config = TRAINERS[kind]
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
        with torch.no_grad():  # TRL trains no adapter of the head, by which alone random weights learn to write a token
            model.lm_head.weight.mul_(logits)
        lora = LoraConfig(**LORA)
        if wrapped:  # with weights that differ from the base model's
            model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
        settings = {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 5,
        }
        settings |= {"max_new_tokens": 8} if kind == "OnlineDPO" else {"num_generations": 8, "max_completion_length": 8}
        rows = [{"prompt": f"{word} {number}"} for number in range(8) for word in WORDS[:16]]  # an epoch is 32 steps
        return trainer(
            model,
            reward_funcs=reward,
            args=config(str(tmp_path), **{**settings, **args}),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_llama),
            peft_config=None if wrapped else lora,
        )

    return make


def lora_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "lora_" in name and ".ref." not in name}


def mean_of(trainer: Any) -> dict[str, torch.Tensor]:
    run = trainer.posterior_training
    return {name: run.optimizer.mean(param) for name, param in run.params.items()}


def passes(trainer: Any, notes: Callable[[Any], Any] = lambda batch: None) -> list[Any]:
    """Let `compute_loss` note the weights at which it takes the gradient, its batch, and what `notes` returns."""
    kept: list[Any] = []

    def note(model: Any, batch: Any, **_: Any) -> None:
        kept.append((lora_weights(trainer.model), {**batch}, notes(batch)))

    before_every_loss(trainer, note)
    return kept


def written(base: Path, weights: dict[str, torch.Tensor], batch: dict[str, Any]) -> torch.Tensor:
    """Return the greedy completions of a batch's prompts by an adapter in a new PEFT model."""
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA)).eval()
    model.load_state_dict(weights, strict=False)
    prompts = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    width = batch["completion_ids"].shape[1]
    return model.generate(**prompts, do_sample=False, max_new_tokens=width)[:, -width:]


@torch.no_grad()
def scored(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return log p of each token of a batch's completions by a model, 0 for padding."""
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    completions = batch["completion_ids"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -completions.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0] * batch["completion_mask"]


@pytest.mark.parametrize("rollouts", [{}, DRAWS], ids=["mean", "draws"])
def test_it_learns_and_a_checkpoint_resumes_exactly(rollouts: dict[str, Any], make: Any, tmp_path: Path) -> None:
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-25")):
        trainer = make(max_steps=30, max_completion_length=16, save_strategy="steps", save_steps=25, logits=30)
        attach(trainer, **rollouts)
        trainer.train(resume_from_checkpoint=resume)
        ends.append(lora_weights(trainer.model))
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        assert sum(rewards[:5]) / 5 < 0.02
        assert sum(rewards[-5:]) / 5 > 0.2
    assert same(*ends)
    sigma = Posterior.from_pretrained(tmp_path / "checkpoint-30").sigma
    assert all((value > 0).all() for key, value in sigma.items() if "lora_" in key)


def test_the_mean_writes_and_the_gradient_is_at_a_draw(make: Any, tiny_llama: Path) -> None:
    trainer, means = make(max_steps=2, generation_kwargs={"do_sample": False}), []
    attach(trainer)
    kept = passes(trainer, lambda _: means.append(mean_of(trainer)))
    trainer.train()
    assert len(kept) == 8
    for mean, (weights, batch, _) in zip(means, kept, strict=True):
        mask = batch["completion_mask"].bool()
        assert torch.equal(written(tiny_llama, mean, batch)[mask], batch["completion_ids"][mask])
        assert not same(weights, mean)
    assert all(not same(weights, other) for (weights, *_), (other, *_) in itertools.pairwise(kept))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_completion_is_trained_on_at_the_draw_that_wrote_it(count: int, make: Any, tiny_llama: Path) -> None:
    trainer = make(generation_kwargs={"do_sample": False})
    attach(trainer, rollouts="draws", rollout_draws=count)
    kept = passes(trainer)
    trainer.train()
    for step in (kept[:4], kept[4:]):
        draws = [weights for weights, *_ in step]
        for place, (weights, batch, _) in enumerate(step):
            mask = batch["completion_mask"].bool()
            assert torch.equal(written(tiny_llama, weights, batch)[mask], batch["completion_ids"][mask])
            assert same(weights, draws[place // (4 // count) * (4 // count)])
            assert place % (4 // count) or not place or not same(weights, draws[place - 1])
        # Pooled: over a group, that is over all draws, and not over the completions of one draw.
        groups: dict[str, list[float]] = {}
        for _, batch, _ in step:
            for prompt, advantage in zip(batch["prompt_ids"].tolist(), batch["advantages"].tolist(), strict=True):
                groups.setdefault(str(prompt), []).append(advantage)
        assert [len(group) for group in groups.values()] == [8] * 4
        assert all(abs(sum(group)) < 1e-4 for group in groups.values())


@pytest.mark.parametrize(
    ("kind", "settings", "args"),
    [
        ("GRPO", {}, {"num_iterations": 2}),
        ("GRPO", DRAWS, {"num_iterations": 2}),
        ("GRPO", {}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        ("RLOO", {}, {"num_iterations": 2}),
    ],
)
def test_the_ratio_is_1_until_the_mean_moves(kind: str, settings: Any, args: Any, make: Any) -> None:
    """Old log-probabilities are at the draw of the gradient, so noise alone clips nothing."""

    def ratio(batch: Any) -> float:
        now = scored(trainer.model, batch)
        old = batch["old_per_token_logps"] * batch["completion_mask"] if kind == "GRPO" else batch["old_logps"]
        return float(((now if kind == "GRPO" else now.sum(1)) - old).abs().max())

    trainer = make(kind, max_steps=2, **args)
    attach(trainer, **settings)
    kept = passes(trainer, ratio)
    trainer.train()
    first = args.get("gradient_accumulation_steps", 4)
    noises = [noise for *_, noise in kept]
    assert max(noises[:first]) < 1e-4 < min(noises[first:])
    if "num_iterations" in args:  # each batch keeps its draw: ε is the same, and the mean has moved
        assert all(kept[i][1]["ivon_draw"] == kept[i + first][1]["ivon_draw"] for i in range(first))


@pytest.mark.parametrize("wrapped", [False, True], ids=["disable_adapter", "ref"])
@pytest.mark.parametrize("rollouts", [{}, DRAWS], ids=["mean", "draws"])
def test_the_reference_is_without_noise(rollouts: Any, wrapped: bool, make: Any, tiny_llama: Path) -> None:
    trainer = make(wrapped=wrapped, beta=0.1)
    attach(trainer, **rollouts)
    start = lora_weights(trainer.model)
    kept = passes(trainer)
    trainer.train()
    reference: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(**LORA)).eval()
    reference.load_state_dict(start, strict=False)
    for weights, batch, _ in kept:
        assert not same(weights, start)
        own = batch["ref_per_token_logps"] * batch["completion_mask"]
        torch.testing.assert_close(own, scored(reference, batch), rtol=0, atol=1e-5)


def test_vllm_is_sent_the_mean_and_merging_never_sees_a_draw(make: Any) -> None:
    trainer, sent, completions = make(max_steps=2), [], [TOKEN, 7, 9]

    def sync() -> None:  # as TRL's does
        trainer.model.merge_adapter()
        sent.append({name: base.weight.detach().clone() for name, base in bases.items()})
        trainer.model.unmerge_adapter()

    def generate(prompts: Any, **_: Any) -> Any:
        return None, [completions] * len(prompts), [[[-5.0]] * 3] * len(prompts), None

    attach(trainer)
    layers = {name: module for name, module in trainer.model.named_modules() if hasattr(module, "lora_A")}
    layers = {name: module for name, module in layers.items() if module.lora_A}
    bases = {name: module.base_layer for name, module in layers.items()}
    before = {name: base.weight.detach().clone() for name, base in bases.items()}
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=sync, generate=generate)
    means: list[Any] = []
    kept = passes(trainer, lambda _: means.append(mean_of(trainer)))
    trainer.train()
    assert len(sent) == 2
    for merged, mean in zip(sent, means[::4], strict=True):
        for name, weight in merged.items():
            a, b = (mean[f"{name}.lora_{x}.default.weight"] for x in "AB")
            torch.testing.assert_close(weight, before[name] + 8 * b @ a, rtol=0, atol=1e-5)
    for name, base in bases.items():
        torch.testing.assert_close(base.weight, before[name], rtol=0, atol=1e-6)
    # TRL's correction for vLLM's own rounding is at the mean on both sides; the clipped ratio is that of one draw.
    assert all("importance_sampling_ratio" in batch and "old_per_token_logps" not in batch for _, batch, _ in kept)


class Server:
    """A vLLM server, and the side of it in axolotl's Trainers: it gets an adapter's folder and writes with that."""

    def __init__(self, trainer: Any, base: Path, folder: Path) -> None:
        self.trainer, self.base, self.folder = trainer, base, folder
        self.sent: list[Any] = []  # the adapters, in the order in which they came
        self.wrote: list[tuple[int, int, int]] = []  # the adapter of each request, its prompts, and outputs for each
        trainer.use_vllm, trainer._last_loaded_step, trainer._sync_lora_adapter = True, -1, self.get_adapter
        trainer.args.vllm_lora_sync = trainer.args.use_data_producer = True
        trainer.args.vllm_mode = "server"
        trainer.vllm_generation = SimpleNamespace(sync_weights=self.get_adapter, generate=self.generate)

    def get_adapter(self) -> None:
        """What axolotl's `_sync_lora_adapter` does: all that it saves it has asked the model for."""
        trainer, version = self.trainer, len(self.sent)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        trainer.model.save_pretrained(self.folder / f"v{version}", state_dict=state)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), self.folder / f"v{version}")
        self.sent.append(model.eval())

    def generate(self, prompts: Any, num_generations: int, **_: Any) -> Any:
        """What TRL's `VLLMGeneration.generate` does: every prompt once, and so many outputs for it."""
        own = prompts[::num_generations]
        assert [ids for ids in own for _ in range(num_generations)] == prompts
        self.wrote.append((len(self.sent) - 1, len(own), num_generations))
        completions, log_probabilities = [], []
        for number, ids in enumerate(prompts):
            torch.manual_seed(number)
            model, tokens = self.sent[-1], torch.tensor([ids])
            with torch.no_grad():
                written = model.generate(input_ids=tokens, do_sample=True, max_new_tokens=8, pad_token_id=0)[0]
                logits = model(input_ids=written[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            new = written[len(ids) :]
            completions.append(new.tolist())
            log_probabilities.append([[float(value)] for value in logits.gather(1, new[:, None])[:, 0]])
        return None, completions, log_probabilities, None


def test_a_server_is_sent_each_draw_as_an_adapter(make: Any, tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make()
    server = Server(trainer, tiny_llama, tmp_path / "server")
    attach(trainer, **DRAWS)
    kept = passes(trainer)
    trainer.train()
    assert server.wrote == [(0, 4, 4), (1, 4, 4), (2, 4, 4), (3, 4, 4)]  # half of each group of 8 by either draw
    for place, (weights, batch, _) in enumerate(kept):
        adapter = server.sent[place // 2]
        assert same(lora_weights(adapter), weights)
        own = batch["sampling_per_token_logps"] * batch["completion_mask"]
        torch.testing.assert_close(own, scored(adapter, batch), rtol=0, atol=1e-5)
        # TRL's correction is for what the server computes in another way, and not for the draw.
        ratio = batch["importance_sampling_ratio"]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)
        assert "old_per_token_logps" not in batch
    # Whoever evaluates then has the mean sent first.
    trainer.model.eval()
    later = "num_generations" in inspect.signature(trl.GRPOTrainer._generate_single_turn).parameters  # since TRL 1.10
    trainer._generate_single_turn([[1, 2]] * 8, None, {}, *([8] if later else []))
    assert same(lora_weights(server.sent[4]), lora_weights(trainer.model))
    assert Posterior.from_pretrained(tmp_path / "server" / "v4").sigma.keys()
    assert not (tmp_path / "server" / "v3" / "ivon_sigma.safetensors").exists()


def test_a_server_that_refuses_a_draw_leaves_the_mean(make: Any, tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make()
    server = Server(trainer, tiny_llama, tmp_path / "server")
    attach(trainer, **DRAWS)
    start = lora_weights(trainer.model)

    def refuse() -> None:
        raise RuntimeError("LoRA adapter sync failed: 404")

    trainer._sync_lora_adapter = refuse
    with pytest.raises(RuntimeError, match="sync failed"):
        trainer.train()
    assert same(lora_weights(trainer.model), start)
    assert trainer.num_generations == 8
    server.get_adapter()  # and a save has the mean again
    assert same(lora_weights(server.sent[0]), start)


@pytest.mark.parametrize("rollouts", [{}, DRAWS], ids=["mean", "draws"])
def test_an_interrupt_while_completions_are_written_leaves_the_mean(rollouts: Any, make: Any, tmp_path: Path) -> None:
    trainer, calls = make(max_steps=3, save_strategy="steps", save_steps=1), []
    attach(trainer, **rollouts)
    generate, drawn = trainer.model.generate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == (4 if rollouts else 2):  # the second draw of the second step
            drawn.append(lora_weights(trainer.model))
            trainer.model.save_pretrained(tmp_path / "interrupted")
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    trainer.model.generate = interrupted
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    left, [drawn_weights] = lora_weights(trainer.model), drawn
    for name in ("checkpoint-1", "interrupted"):
        assert same(Posterior.from_pretrained(tmp_path / name).mean, as_saved(left))
    assert all(torch.equal(drawn_weights[name], left[name]) is not bool(rollouts) for name in left)


def _process(variables: dict[str, str], train: Callable[[int], Any], path: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    for state in (GradientState, AcceleratorState, PartialState):  # of this test's own process
        state._reset_state()
    torch.save(train(2), path)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rollouts", [{}, {**DRAWS, "preset": "paper", "clip": 1.0}], ids=["mean", "draws"])
def test_two_processes_have_the_same_draws_and_weights(
    rollouts: dict[str, Any], make: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    def train(processes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Return the weights at the end and those of each pass; the KL gives equal completions a gradient too."""
        args: dict[str, Any] = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"} if processes == 2 else {}
        args |= {"beta": 0.1, "generation_kwargs": {"do_sample": False}}
        trainer = make(reward=lambda completion_ids, **_: [float(sum(x) % 7) for x in completion_ids], **args)
        assert trainer.args.world_size == processes
        attach(trainer, **rollouts)
        means: list[Any] = []
        kept = passes(trainer, lambda _: means.append(mean_of(trainer)))
        trainer.train()
        for mean, (weights, batch, _) in zip(means, kept, strict=True):
            mask = batch["completion_mask"].bool()
            completions = written(tiny_llama, weights if rollouts else mean, batch)
            assert torch.equal(completions[mask], batch["completion_ids"][mask])
        assert not same(means[0], means[-1])
        return lora_weights(trainer.model), [weights for weights, *_ in kept]

    context, paths = multiprocessing.get_context("fork"), [tmp_path / f"{rank}.pt" for rank in range(2)]
    pairs = zip(ranks(2), paths, strict=True)
    processes = [context.Process(target=_process, args=(variables, train, path)) for variables, path in pairs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    (end, draws), (other_end, other_draws) = map(torch.load, paths)
    assert same(end, other_end)
    assert len(draws) == 8
    assert all(map(same, draws, other_draws))
    # By the mean a process's shuffle decides which completion has which draw, and by "auto" whose squares are added.
    if rollouts:
        torch.testing.assert_close(end, train(1)[0], rtol=1e-4, atol=1e-6)


def test_online_dpo_writes_by_the_mean(make: Any) -> None:
    trainer, means, draws = make("OnlineDPO"), [], []
    attach(trainer)
    start = lora_weights(trainer.model)
    generate, forward = trainer.model.generate, trainer._forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        means.append(lora_weights(trainer.model))
        return generate(*args, **kwargs)

    def noting_forward(*args: Any, **kwargs: Any) -> Any:
        draws.append(lora_weights(trainer.model))
        return forward(*args, **kwargs)

    trainer.model.generate, trainer._forward = noting, noting_forward
    trainer.train()
    assert all(same(start, mean) for mean in means[:4])  # those of the first step
    assert not any(same(start, draw) for draw in draws)
    assert not same(start, lora_weights(trainer.model))


@pytest.mark.parametrize(("kind", "length"), [("GRPO", "tokens"), ("RLOO", "completions")])
def test_squared_gradients_count_the_losses_of_completions(kind: str, length: str, make: Any) -> None:
    trainer = make(kind, max_steps=1)
    attach(trainer)
    kept = passes(trainer)
    trainer.train()
    masks = [batch["completion_mask"] for _, batch, _ in kept]
    expected = sum(int(mask.sum()) if length == "tokens" else len(mask) for mask in masks)
    assert trainer.optimizer.param_groups[0]["batch_size"] == expected


@pytest.mark.parametrize(
    ("kind", "settings", "args", "words"),
    [
        ("GRPO", {"rollouts": "both"}, {}, "rollouts: 'both' is neither"),
        ("GRPO", {"rollout_draws": 2}, {}, "rollout_draws: 2 has no effect without rollouts: draws"),
        ("GRPO", {**DRAWS, "rollout_draws": 0}, {}, "rollout_draws: 0 is refused, it must be at least 1$"),
        ("GRPO", {**DRAWS, "rollout_draws": 3}, {}, "rollout_draws: 3 does not divide num_generations: 8"),
        (
            "GRPO",
            {**DRAWS, "rollout_draws": 8},
            {},
            "rollout_draws: 8 does not divide steps_per_generation: 4; choose a divisor of both num_generations and s",
        ),
        ("RLOO", DRAWS, {}, "rollouts: draws is for GRPO alone"),
        ("OnlineDPO", DRAWS, {}, "rollouts: draws is for GRPO alone"),
        ("GRPO", DRAWS, {"use_vllm": True}, "rollouts: draws needs a vLLM server .*: with use_vllm: true set vllm_mo"),
        ("GRPO", DRAWS, {"tools": [print]}, "rollouts: draws does not go with tools"),
        ("GRPO", {}, {"is_deepspeed_enabled": True}, "DeepSpeed and FSDP are not supported where training writes"),
        ("RLOO", {}, {"is_fsdp_enabled": True}, "DeepSpeed and FSDP are not supported where training writes"),
    ],
)
def test_what_does_not_go_together_is_one_line(kind: str, settings: Any, args: Any, words: str, make: Any) -> None:
    trainer = make(kind)
    vars(trainer).update(args)
    with pytest.raises(IVONError, match=f"^{words}"):
        attach(trainer, **settings)


def test_another_trainer_that_writes_completions_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2)]
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    trainer = GKDTrainer(
        *models,
        args=GKDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=LoraConfig(**{**LORA, "target_modules": ["q_proj"]}),
    )
    with pytest.raises(IVONError, match=r"^GKDTrainer writes completions in training, .* use one of these"):
        attach(trainer)
