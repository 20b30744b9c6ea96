"""What a run logs and keeps, the posterior's evaluation loss, rates, hooks, and the adapter in several processes."""

from __future__ import annotations

import logging
import math
import multiprocessing
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import build_llama
from torch.optim.lr_scheduler import LambdaLR
from toy import posterior_of
from trainers import Rates, Spy, as_saved, before_every_loss, lora_weights, make_trainer, same
from transformers import TrainerCallback

from axolotl_ivon import IVONError, IVONLoRA, Posterior, attach, hookimpl
from axolotl_ivon.plugins import plugin_manager
from axolotl_ivon.training.callback import trained_parameters
from axolotl_ivon.training.posterior_loss import evaluating
from axolotl_ivon.training.processes import agree_on_gradients, average, check_sharding
from axolotl_ivon.training.rates import rate_for, rates
from axolotl_ivon.training.sharded import ANCHOR, STATE_FILE, ReplicatedAdapter

TENSOR = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight"


def header(folder: Path) -> dict[str, str]:
    return Posterior.from_pretrained(folder).metadata


def train_with_bad_gradients(attached: Any, bad: set[int], **args: Any) -> Spy:
    """Train with a gradient that is not finite, in `TENSOR` and the one after it, at steps `bad`."""
    spy = Spy()
    trainer = attached(callbacks=[spy], learning_rate=1e-3, **args)
    names = dict(trainer.model.named_parameters())
    for name in (TENSOR, TENSOR.replace("lora_A", "lora_B")):
        names[name].register_hook(lambda g: g * (math.nan if trainer.state.global_step + 1 in bad else 1.0))
    trainer.train()
    trainer.save_model(str(Path(trainer.args.output_dir) / "final"))
    return spy


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "axolotl_ivon.training.callback"]


def test_a_skipped_step_is_logged_with_its_first_tensor(attached: Any, caplog: pytest.LogCaptureFixture) -> None:
    spy = train_with_bad_gradients(attached, {2, 5}, max_steps=6)
    skipped = [text for _, text in messages(caplog) if "skipped" in text]
    assert skipped == [f"step {step} was skipped: the gradient of {TENSOR} is not finite" for step in (2, 5)]
    assert same(spy.means[1], spy.means[0])
    assert same(spy.means[4], spy.means[3])
    assert not same(spy.means[2], spy.means[1])


def test_a_run_that_diverges_says_so_once_and_keeps_the_last_good_state(
    attached: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = train_with_bad_gradients(attached, set(range(4, 17)), max_steps=16, save_strategy="no")
    assert sum("was skipped" in text for _, text in messages(caplog)) == 9  # from the tenth on it is one story
    (error,) = (text for level, text in messages(caplog) if level == logging.ERROR)
    assert error.startswith("the run diverges: the last 10 steps were skipped")
    assert TENSOR in error
    assert "those of step 3:" in error
    posterior = Posterior.from_pretrained(tmp_path / "final")
    assert same(posterior.mean, as_saved(spy.means[2]))
    assert all(sigma.isfinite().all() and (sigma > 0).all() for sigma in posterior.sigma.values())


@pytest.mark.parametrize(("given", "kept"), [({}, 0), ({"max_grad_norm": 0.3}, 0.3)])
def test_gradient_clipping_is_off_unless_it_was_asked_for(given: Any, kept: float, trained: Any, caplog: Any) -> None:
    assert trained(max_steps=1, **given).args.max_grad_norm == kept
    assert ("max_grad_norm 0.3" in caplog.text) is bool(given)


def test_warnings_say_why(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    trained({"preset": "paper", "clip": 0.01}, max_steps=4, learning_rate=2e-4, lr_scheduler_type="linear")
    assert "learning_rate 0.0002 looks like one for Adam" in caplog.text
    reach = 2e-4 * 0.01 * (1 + 0.75 + 0.5 + 0.25)
    assert f"can move by {reach:.3g} at most" in caplog.text
    assert f"with {2e-4 * 0.13 / reach:.2g} it is 0.13" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trained({"clip": 1.0, "calibrate": False}, max_steps=4, learning_rate=0.01)
    assert "axolotl_ivon" not in caplog.text


def test_the_last_words_say_how_far_the_weights_moved_and_the_header_keeps_it(
    attached: Any, trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = {"settings": {"preset": "paper", "clip": 0.01}, "max_steps": 4, "save_steps": 2}
    trainer = attached(**run)
    before = lora_weights(trainer.model)
    with caplog.at_level(logging.INFO, "axolotl_ivon"):
        trainer.train()
    after = lora_weights(trainer.model)
    apart = [(after[name] - before[name]).abs().flatten() for name in after if "lora_B" in name]
    moved, allowed = float(torch.cat(apart).mean()), 3e-2 * 0.01 * (1 + 0.75 + 0.5 + 0.25)
    last = header(tmp_path / "checkpoint-4")
    assert float(last["moved"]) == pytest.approx(moved, rel=1e-3)
    assert float(last["travel"]) == pytest.approx(allowed, rel=1e-4)
    (weights_level, weights), (sigma_level, sigma), (_, following), (_, calibrated) = messages(caplog)[-4:]
    assert (weights_level, sigma_level) == (logging.WARNING, logging.INFO)
    assert f"hardly moved: by {moved:.1g} on average, {moved / allowed:.0%} of the {allowed:.3g}" in weights
    assert "σ was not learned" in sigma
    assert f"ivon-post check {tmp_path}" in following
    assert calibrated.startswith("not calibrated: 24 evaluation examples")
    # Half a run allows what its first steps allow, and a resumed one what an uninterrupted one does.
    assert float(header(tmp_path / "checkpoint-2")["travel"]) == pytest.approx(3e-2 * 0.01 * 1.75, rel=1e-4)
    trained(**run, resume=tmp_path / "checkpoint-2")
    assert header(tmp_path / "checkpoint-4") == last


def test_how_far_weights_moved_is_measured_from_where_they_were(made: Any, trained: Any, tmp_path: Path) -> None:
    trainer = trained({"clip": 0.01}, lora={"init_lora_weights": "pissa"}, max_steps=1, save_steps=1)
    moved = trainer.posterior_training.movement(1)
    assert 0 < moved["moved"] <= moved["travel"]
    # A resumed run, whose header must be the same, would not know where it began.
    assert "moved" not in header(tmp_path / "checkpoint-1")
    plain = made("plain", max_steps=1, save_steps=1)
    for name, param in plain.model.named_parameters():
        param.requires_grad_("lora_A" in name)
    attach(plain)
    plain.train()
    assert "moved" not in header(tmp_path / "plain" / "checkpoint-1")
    assert float(header(tmp_path / "plain" / "checkpoint-1")["travel"]) > 0


def test_a_third_party_s_hooks_add_to_ours_or_take_their_place(trained: Any, tmp_path: Path) -> None:
    entered, saved = [], []

    class Mine(IVONLoRA):
        pass

    class ThirdParty:
        @hookimpl
        def create_optimizer(self, named_parameters: Any, settings: Any) -> Any:
            return Mine(named_parameters, **{**settings, "h0": 0.5})

        @hookimpl
        @contextmanager
        def sampling_context(self, trainer: Any, optimizer: Any) -> Any:
            with optimizer.sampled_params():
                entered.append(trainer.state.global_step)
                yield

        @hookimpl
        def log_metrics(self, trainer: Any, optimizer: Any) -> dict[str, float]:
            return {"my_metric": 1.5}

        @hookimpl
        def posterior_saved(self, folder: str) -> None:
            assert Posterior.from_pretrained(folder)
            saved.append(folder)

    plugin = ThirdParty()
    plugin_manager().register(plugin)
    try:
        trainer = trained()
    finally:
        plugin_manager().unregister(plugin)
    assert isinstance(trainer.optimizer.optimizer, Mine)
    assert entered == list(range(6))
    assert header(tmp_path / "checkpoint-6")["h0"] == "0.5"
    assert saved == [str(tmp_path / name) for name in ("checkpoint-3", "checkpoint-6")]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["my_metric"] == 1.5
    assert entry["ivon_sigma_mean"] > 0


def test_whoever_reads_the_model_at_a_draw_reads_the_mean_which_an_exception_leaves(
    attached: Any, tmp_path: Path
) -> None:
    spy, checked = Spy(), []
    trainer = attached({"gamma": 10.0}, callbacks=[spy], save_strategy="no")

    def read(model: Any, *_: Any, **__: Any) -> None:
        if spy.means:
            drawn, state, mean = lora_weights(model), model.state_dict(), spy.means[-1]
            model.save_pretrained(tmp_path / "mid-step")
            assert not any(torch.equal(drawn[name], mean[name]) for name in mean)
            assert same({name: state[name] for name in mean}, mean)
            assert same(Posterior.from_pretrained(tmp_path / "mid-step").mean, as_saved(mean))
            assert same(drawn, lora_weights(model)), "the draw goes on"
            checked.append(True)
        if len(checked) == 5:
            raise MemoryError

    before_every_loss(trainer, read)
    with pytest.raises(MemoryError):
        trainer.train()
    assert same(spy.means[-1], lora_weights(trainer.model))


def test_a_weight_that_modules_share_is_one_weight_under_both_names(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "tied", tie_word_embeddings=True)
    lora = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "lora_dropout": 0.0}
    trainer, checked = make_trainer(base, tmp_path, lora=lora, max_steps=2, save_steps=2), []
    names = [f"base_model.model.{m}.modules_to_save.default.weight" for m in ("model.embed_tokens", "lm_head")]

    def read(model: Any, *_: Any, **__: Any) -> None:
        drawn, state = model.get_parameter(names[0]), model.state_dict()
        mean = trainer.posterior_training.optimizer.mean(drawn)
        checked.append(not torch.equal(drawn, mean) and all(torch.equal(state[name], mean) for name in names))

    before_every_loss(trainer, read)
    attach(trainer)
    trainer.train()
    assert checked == [True, True]
    posterior = Posterior.from_pretrained(tmp_path / "checkpoint-2")
    keys = [name.replace(".modules_to_save.default", "") for name in names]
    for tensors in (posterior.mean, posterior.sigma):
        assert torch.equal(tensors[keys[0]], tensors[keys[1]])
        assert tensors[keys[0]].abs().max() > 0

    model, inputs = make_trainer(base, tmp_path, lora=lora).model.eval(), torch.arange(3, 9)[None]
    logits = model(inputs).logits
    ReplicatedAdapter(trainer, model, trained_parameters(model))
    assert list(trained_parameters(model)) == [ANCHOR]
    assert torch.equal(model(inputs).logits, logits)


def test_it_is_the_likelihood_of_the_averaged_prediction(trained: Any) -> None:
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 5}
    trainer = trained({"gamma": 1.0, "eval_samples": 4}, save_strategy="no", **evaluation)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [set(entry) >= {"eval_loss", "eval_loss_posterior"} for entry in logged] == [True, True]

    model, optimizer = trainer.model.eval(), trainer.optimizer.optimizer
    mean = lora_weights(model)
    rows = torch.tensor(trainer.eval_dataset["input_ids"])
    probabilities = torch.zeros(rows.shape[0], rows.shape[1] - 1, dtype=torch.float64)
    for number in range(4):
        with optimizer.evaluation_draw(number), torch.no_grad():
            assert not torch.equal(next(iter(lora_weights(model).values())), next(iter(mean.values())))
            predicted = model(input_ids=rows).logits[:, :-1].double().softmax(-1)
        probabilities += predicted.gather(-1, rows[:, 1:, None])[..., 0] / 4
    assert logged[-1]["eval_loss_posterior"] == pytest.approx(-probabilities.log().mean().item(), rel=1e-4)
    assert logged[-1]["eval_loss_posterior"] != pytest.approx(logged[-1]["eval_loss"], rel=1e-4)
    assert same(mean, lora_weights(model))


def test_evaluating_changes_nothing_in_the_run(trained: Any) -> None:
    run = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2}
    run |= {"per_device_train_batch_size": 2}
    without, with_it = (lora_weights(trained({"eval_samples": n}, str(n), **run).model) for n in (0, 3))
    assert same(without, with_it)


def test_each_module_gets_its_own_mode_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


def test_data_without_labels_is_refused(attached: Any) -> None:
    class WithoutLabels(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.eval_dataset = trainer.eval_dataset.remove_columns("labels")

    trainer = attached({"eval_samples": 2}, callbacks=[WithoutLabels()], eval_strategy="steps", eval_steps=2)
    labelled = trainer.eval_dataset
    with pytest.raises(IVONError, match="`labels`"):
        trainer.train()
    predicted = trainer.predict(trainer.eval_dataset)  # which asks for no score
    assert predicted.predictions.shape[:2] == (24, 12)
    assert "test_loss_posterior" not in predicted.metrics
    assert "test_loss_posterior" in trainer.predict(labelled).metrics


@settings(deadline=None)  # torch's first step imports for a second
@given(shape=st.lists(st.floats(0.01, 1), min_size=1, max_size=30), travel=st.floats(1e-3, 10), clip=st.floats(1e-4, 1))
def test_the_rates_of_a_run_add_up_to_the_travel(shape: list[float], travel: float, clip: float) -> None:
    def schedule(lr: float, optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: shape[min(step, len(shape) - 1)])

    assert rate_for(travel, clip, len(shape), schedule) * sum(shape) * clip == pytest.approx(travel)


def test_a_schedule_that_wants_the_loss_is_taken_to_stay_at_its_peak() -> None:
    class Plateau:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        def step(self, loss: float) -> None:
            raise AssertionError

    assert rate_for(0.15, 0.01, 10, lambda lr, optimizer: Plateau(optimizer)) == pytest.approx(1.5)
    assert rates(Plateau(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)), 3) == [0.1] * 3


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("linear", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
        ("reduce_lr_on_plateau", {"min_lr": 1e-4, "factor": 0.1, "patience": 0, "threshold": 10.0}),
        ("rex", {}),
        ("one_cycle", {}),
        ("jagged", {}),
    ],
)
def test_the_travel_is_the_sum_of_the_rates_and_these_end_where_adamw_s_do(
    schedule: str, options: dict[str, float], made: Any, tmp_path: Path
) -> None:
    """Every rate of the run, the optional ends of a schedule included, is 1/ξ times what AdamW's would be."""
    from axolotl.utils.schedulers import JaggedLRRestartScheduler, RexLR
    from torch.optim.lr_scheduler import OneCycleLR

    def of_axolotl(trainer: Any, steps: int, optimizer: Any) -> Any:
        peak = trainer.args.learning_rate
        if schedule == "rex":
            return RexLR(optimizer, peak, 0, total_steps=steps, num_warmup_steps=2)
        if schedule == "one_cycle":
            return OneCycleLR(optimizer, max_lr=peak, total_steps=steps)
        return JaggedLRRestartScheduler(optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps), 4, 2)

    kind = {} if schedule in ("rex", "one_cycle", "jagged") else {"lr_scheduler_type": schedule}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2} if "plateau" in schedule else {}
    seen = []
    for ivon in (False, True):
        spy = Rates()
        trainer = made(
            callbacks=[spy], learning_rate=1e-3, lr_scheduler_kwargs=options, max_steps=12, **kind, **evaluation
        )
        if not kind:

            def create(num_training_steps: int, optimizer: Any = None, trainer: Any = trainer) -> Any:
                trainer.lr_scheduler = of_axolotl(trainer, num_training_steps, optimizer or trainer.optimizer)
                return trainer.lr_scheduler

            trainer.create_scheduler = create
        if ivon:
            attach(trainer)
        trainer.train()
        seen.append(spy.rates)
    adamw, ours = seen
    assert [rate * 0.01 for rate in ours] == pytest.approx(adamw, rel=1e-4)
    assert trainer.posterior_training.movement(12)["travel"] == pytest.approx(sum(ours) * 0.01)
    for step in (3, 12):
        travel = float(header(tmp_path / f"checkpoint-{step}")["travel"])
        assert travel == pytest.approx(sum(ours[:step]) * 0.01, rel=1e-3)


def fake_trainer(
    deepspeed: Any = None, fsdp: int = 0, fp16: bool = False, max_grad_norm: float = 0.0, **parallelism: int
) -> Any:
    """What `check_sharding` looks at: the config of DeepSpeed and the version of FSDP, where there are any."""
    plugins = {
        "deepspeed_plugin": SimpleNamespace(deepspeed_config=deepspeed),
        "fsdp_plugin": SimpleNamespace(fsdp_version=fsdp),
    }
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            state=SimpleNamespace(**plugins), parallelism_config=SimpleNamespace(**parallelism)
        ),
        is_deepspeed_enabled=deepspeed is not None,
        is_fsdp_enabled=fsdp > 0,
        args=SimpleNamespace(fp16=fp16, max_grad_norm=max_grad_norm),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deepspeed": {"optimizer": {"type": "AdamW"}}}, "has an optimizer.*remove"),
        ({"fsdp": 1}, "fsdp_version: 2"),
        ({"fsdp": 2, "fp16": True}, "fp16.*bf16: true"),
        ({"deepspeed": {}, "max_grad_norm": 1.0}, "max_grad_norm: 1.*remove"),
        ({"tp_size": 2}, "tensor_parallel_size: 2"),
        ({"cp_size": 4}, "context_parallel_size: 4"),
        ({}, None),
        ({"deepspeed": {}}, None),
        ({"fsdp": 2}, None),
        ({"fp16": True}, None),
    ],
)
def test_sharding_that_would_train_something_else_is_refused(changes: dict[str, Any], words: str | None) -> None:
    with pytest.raises(IVONError, match=words) if words else nullcontext():
        check_sharding(fake_trainer(**changes))


def _averaged(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tensors = [torch.full((2, 3), float(rank)), torch.tensor([1.0, 10.0**rank], dtype=torch.bfloat16)]
    average(tensors)
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    params[rank].grad = torch.full((2,), 3.0)  # the third has none in either process
    agreed = agree_on_gradients(params)
    results.put((rank, [t.tolist() for t in tensors], [g.tolist() for g in agreed], params[2].grad))
    dist.destroy_process_group()


def test_two_processes_average_and_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    processes = [context.Process(target=_averaged, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank, averaged, agreed, nowhere in sorted(results.get() for _ in processes):
        assert averaged == [[[0.5] * 3] * 2, [1.0, 5.5]]
        assert agreed == [[3.0 * (rank == 0)] * 2, [3.0 * (rank == 1)] * 2]
        assert nowhere is None


def test_one_process_is_left_alone() -> None:
    tensor, params = torch.ones(2), [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    params[1].grad = torch.ones(2)
    average([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert agree_on_gradients(params) == [params[1].grad]
    assert params[0].grad is None


@pytest.fixture
def replicated(made: Any) -> Any:
    """A function that takes an adapter out of its model and makes a step with it."""

    def replicate(seed: int = 0) -> ReplicatedAdapter:
        trainer = made()
        adapter = ReplicatedAdapter(trainer, trainer.model, trained_parameters(trainer.model))
        optimizer = IVONLoRA(list(adapter.params.items()), ess=1e4, clip=0.1, seed=seed)
        trainer.optimizer = adapter.anchor_optimizer(optimizer)
        with optimizer.sampled_params():
            for param in adapter.params.values():
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        adapter.on_pre_optimizer_step(None, None, None)
        adapter.on_optimizer_step(None, None, None)
        return adapter

    return replicate


def test_the_engine_sees_an_anchor_and_no_adapter(made: Any) -> None:
    trainer = made()
    model, inputs = trainer.model.eval(), torch.arange(3, 9)[None]
    before, logits = trained_parameters(model), model(inputs).logits
    adapter = ReplicatedAdapter(trainer, model, before)
    assert list(trained_parameters(model)) == [ANCHOR]
    assert list(adapter.params) == list(before)
    assert same(adapter.params, before)
    assert torch.equal(model(inputs).logits, logits), "the forward pass reads the replica"
    adapter.on_train_end(None, None, None)
    after = trained_parameters(model)
    assert set(after) == {*before, ANCHOR}
    assert all(after[name] is param for name, param in adapter.params.items())


def test_where_the_anchor_steps_the_adapter_does(replicated: Any, made: Any) -> None:
    adapter, start = replicated(), trained_parameters(made().model)
    sizes = sum(param.numel() for param in start.values())
    assert float(adapter.gradient_norm) == pytest.approx(sizes**0.5, rel=0.2)  # of standard normals
    assert all(not torch.equal(param, start[name]) for name, param in adapter.params.items())
    assert all(param.grad is None for param in adapter.params.values())
    assert same(adapter.add_mean({"other": torch.ones(1)}), {"other": torch.ones(1), **adapter.params})


def test_the_state_comes_back_from_its_file(replicated: Any, tmp_path: Path) -> None:
    one, other, path = replicated(0), replicated(1), tmp_path / STATE_FILE
    one.save_state(path)
    assert set(load_file(path)) == {f"{name}/{key}" for name, p in one.params.items() for key in one.optimizer.state[p]}
    other.load_state(path)
    assert same(one.params, other.params)
    assert all(map(torch.equal, *(posterior_of(adapter.params, adapter.optimizer) for adapter in (one, other))))
    assert other.optimizer.param_groups[0]["draws"] == one.optimizer.param_groups[0]["draws"] == 1


def test_a_state_that_is_not_this_adapter_s_is_one_line(replicated: Any, tmp_path: Path) -> None:
    adapter, path = replicated(), tmp_path / STATE_FILE

    def refused(words: str) -> None:
        with pytest.raises(IVONError, match=rf"^{path}.* {words}[^\n]*$"):
            adapter.load_state(path)

    refused("is missing or damaged")
    path.write_bytes(b"{}")
    refused("is missing or damaged")
    adapter.save_state(path)
    tensors: dict[str, Any] = load_file(path)
    metadata = {"format": "ivon-state", "format_version": "1", "draws": "1"}
    save_file(tensors, path, metadata={**metadata, "format_version": "2"})
    refused("has format ivon-state 2")
    first = next(iter(adapter.params))
    save_file({key: t for key, t in tensors.items() if not key.startswith(f"{first}/")}, path, metadata=metadata)
    refused("no state of")
    save_file({key: t.reshape(-1)[:1].clone() for key, t in tensors.items()}, path, metadata=metadata)
    refused("does not fit the adapter")


def test_runs_on_other_data_are_other_runs_though_their_losses_are_equal(tiny_llama: Path, tmp_path: Path) -> None:
    ids = []
    for number, shift in enumerate((0, 0, 1)):
        trainer = make_trainer(tiny_llama, tmp_path / str(number), max_steps=1, save_strategy="no")
        rows = [{key: list(value) for key, value in row.items()} for row in trainer.train_dataset]
        for row in rows:
            row["input_ids"][0] += shift
        trainer.train_dataset = rows
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, compute=compute_loss, **given: 0 * compute(*args, **given)
        attach(trainer)
        trainer.train()
        ids.append(trainer.posterior_training.header["run_ids"])
    assert ids[0] == ids[1] != ids[2]
