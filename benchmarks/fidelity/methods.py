"""The methods that are compared: AdamW and what is made of it, BLoB, ivon-opt, IVON-LoRA.

Every method trains the same parameters (LoRA and the classifier) for the same steps on the same batches, with the
learning rate warming up over 5 % of the steps and then falling linearly to 0. One trained run gives several rows.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axolotl_ivon import IVONLoRA, Posterior, effective_sample_size
from axolotl_ivon.fitting import tfb
from axolotl_ivon.fitting.fisher import Squares, residuals, squarer
from axolotl_ivon.fitting.ivon import Averages, iterate
from axolotl_ivon.fitting.precision import FACTORS, Prior
from axolotl_ivon.fitting.tfb import TOLERANCE
from axolotl_ivon.metrics.scores import Scores, entropy, metrics
from axolotl_ivon.models.gradients import ExampleGradients
from axolotl_ivon.settings.presets import PRESETS, Preset

from .blocks import BlockIVON
from .data import Encoder, Example, Task, collate, labels_of, predict, training_batches

Weights = Mapping[str, Tensor]
WARMUP = 0.05


@dataclass
class Trained:
    """A trained model: q over its trained parameters (σ = 0 where a method has none), and what it cost."""

    model: Encoder
    posterior: Posterior
    train_seconds: float  # of this process's CPU: what else runs on the machine does not count
    state_bytes: int
    note: dict[str, Any] = field(default_factory=dict)
    roots: Weights = field(default_factory=dict)  # of `blocks.correlated`, where weights are


# -------------------------------------------------------------------- training


def learning_rate(settings: Mapping[str, Any], steps: int, clip: float | None = None) -> float:
    """Return the peak rate: `lr`, or from `travel` the one with which clipped steps carry a weight so far at most.

    Warmup and decay are both linear, so the rates of a run add up to steps/2 times the peak.
    """
    if "travel" in settings and clip is not None:
        return 2 * settings["travel"] / (clip * steps)
    return settings["lr"]


def schedule(optimizer: torch.optim.Optimizer, steps: int, share: float = WARMUP) -> torch.optim.lr_scheduler.LambdaLR:
    """Return linear warmup over a share of the steps, 5 % or what is given, then linear decay to 0."""
    warmup = max(1, round(share * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


def loop(
    model: nn.Module,
    examples: Sequence[Example],
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    sampled: Callable[[], AbstractContextManager[Any]] = nullcontext,
    after_step: Callable[[int], None] | None = None,
    mirror: Callable[[], None] | None = None,
    losses: list[float] | None = None,
) -> float:
    """Train for `settings["steps"]` steps and return the CPU seconds that it took.

    `sampled` wraps each forward and backward pass; `accumulate` micro-batches make a step, and with `one_draw` they
    share one draw, which with `antithetic` is mirrored at the mean between them. The loss of every step is added to
    `losses`.
    """
    steps, parts = settings["steps"], settings.get("accumulate", 1)
    shared = settings.get("one_draw", False)
    batches = training_batches(examples, settings["batch"] // parts, settings["seed"])
    scheduler = schedule(optimizer, steps, settings.get("warmup", WARMUP))
    model.train()
    begun = time.process_time()
    for step in range(steps):
        count, total = 0, 0.0
        with sampled() if shared else nullcontext():
            for part in range(parts):
                with nullcontext() if shared else sampled():
                    if part and mirror and settings.get("antithetic"):
                        mirror()
                    batch = next(batches)
                    count += len(batch["labels"])
                    loss = F.cross_entropy(model(batch), batch["labels"]) / parts
                    loss.backward()
                    total += loss.item()
        for group in optimizer.param_groups:
            if "batch_size" in group:  # as in training by a Trainer, where it is known at each step only
                group["batch_size"] = count
        optimizer.step()
        optimizer.zero_grad()
        if after_step:
            after_step(step)
        scheduler.step()
        if losses is not None:
            losses.append(total)
    model.eval()
    return time.process_time() - begun


def eighths(losses: Sequence[float]) -> list[float]:
    """Return the mean loss of each eighth of a run, which for IVON-LoRA is that at its draws."""
    return [float(part.mean()) for part in torch.tensor(losses).tensor_split(8)]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimizer's state tensors."""
    # ivon-opt keeps its state in the groups, and numbers that are no tensors in `state`.
    places = [*optimizer.param_groups, *(entry for entry in optimizer.state.values() if isinstance(entry, dict))]
    tensors = (value for place in places for value in place.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def as_posterior(mean: Weights, sigma: Weights | None = None) -> Posterior:
    """Wrap tensors by name; without σ it is 0."""
    mean = {name: value.detach().float().clone() for name, value in mean.items()}
    sigma = {name: torch.zeros_like(value) for name, value in mean.items()} | dict(sigma or {})
    return Posterior(mean, sigma, {}, {})


class Curve:
    """Accuracy, NLL and ECE on the validation data at some points of a run, at the mean and averaged over draws.

    `points` lists {"step", "accuracy", …, "draws": {"accuracy", …}}, the last where `posterior()` gives one; what it
    costs, `seconds` of CPU time, is not counted as training. With the setting `keep_best`, `best` is the copy of the
    weights at the point with the lowest NLL of the mean, which is early stopping without a run that is cut short.
    """

    def __init__(
        self,
        model: Encoder,
        task: Task,
        settings: Mapping[str, Any],
        posterior: Callable[[], Posterior] | None = None,
        draws: int = 8,
    ) -> None:
        self.model, self.examples, self.posterior, self.draws = model, task.validation, posterior, draws
        self.points: list[dict[str, Any]] = []
        self.keep, self.best = settings.get("keep_best", False), dict[str, Tensor]()
        count = settings.get("curve", 0)
        self.steps = {round(settings["steps"] * (i + 1) / count) - 1 for i in range(count)}
        self.seconds = 0.0

    def __call__(self, step: int) -> None:
        """Measure, if it is the time for it."""
        if step not in self.steps:
            return
        begun = time.process_time()
        self.model.eval()
        point: dict[str, Any] = {"step": step + 1, **self.measure(Predictions.of([predict(self.model, self.examples)]))}
        if self.posterior is not None:
            point["draws"] = self.measure(predict_posterior(self.model, self.posterior(), self.examples, self.draws))
        if self.keep and all(point["nll"] < earlier["nll"] for earlier in self.points):
            self.best = {name: value.detach().clone() for name, value in self.model.trained().items()}
        self.points.append(point)
        self.model.train()
        self.seconds += time.process_time() - begun

    def measure(self, predictions: Predictions) -> dict[str, float]:
        """Return accuracy, NLL and ECE."""
        found = metrics(Scores.of(predictions.probabilities, labels_of(self.examples)))
        return {name: found[name] or 0.0 for name in ("accuracy", "nll", "ece")}


def train_adamw(model: Encoder, task: Task, settings: Mapping[str, Any]) -> Trained:
    """AdamW without weight decay; with `keep_best` stopped early, by the NLL of the `curve`."""
    parameters, curve = model.trained(), Curve(model, task, settings)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings["lr"], weight_decay=0.0)
    losses: list[float] = []
    seconds = loop(model, task.train, optimizer, settings, after_step=curve, losses=losses) - curve.seconds
    facts = {"curve": curve.points, "losses": eighths(losses)}
    return Trained(model, as_posterior(curve.best or parameters), seconds, state_bytes(optimizer), facts)


def train_lion(model: Encoder, task: Task, settings: Mapping[str, Any]) -> Trained:
    """Lion (arXiv 2302.06675), signed steps without a posterior, at the rate of a travel and without weight decay."""
    from lion_pytorch import Lion

    parameters = model.trained()
    rate = travel_rate(settings["travel"], settings["steps"], settings.get("warmup", WARMUP))
    optimizer = Lion(list(parameters.values()), lr=rate)
    losses: list[float] = []
    seconds = loop(model, task.train, optimizer, settings, losses=losses)
    return Trained(model, as_posterior(parameters), seconds, state_bytes(optimizer), {"losses": eighths(losses)})


def train_ivon_auto(model: Encoder, task: Task, settings: Mapping[str, Any]) -> Trained:
    """IVON-LoRA as `ivon_preset: auto` sets it up, where `settings` do not say otherwise.

    `lr` is the most that a step may move a weight, as AdamW's learning rate is in a YAML; without it steps are signs,
    at the rate of the preset's travel, as by `ivon_direction: newton` in 1,000 steps and more. `per_weight` is
    λ/(N·weights), and `averaged` the share of the steps, the last ones, whose means are averaged. With `blocks` the
    precision is a matrix over the rank (`blocks.BlockIVON`). `gradients` are taken at a draw; those of "flat" at a draw
    with one σ for each tensor, of the same mean of σ²; of "mean" there. p comes of them by the same rule.
    """
    parameters, preset = model.trained(), PRESETS["auto"]
    given = {name: settings[name] for name in preset._fields if name in settings}
    preset = preset._replace(**({} if "lr" in settings else {"direction": "newton"}) | given)
    weights, steps = sum(value.numel() for value in parameters.values()), settings["steps"]
    epochs = steps * settings["batch"] / len(task.train)
    ess = settings["per_weight"] * weights * len(task.train) if "per_weight" in settings else 0.0
    ess = ess or preset.ess(len(task.train), weights, epochs)
    fan_ins = [value.shape[1] for name, value in parameters.items() if ".lora_A." in name]
    h0 = preset.first_h0(ess, fan_ins)
    step = preset.step(settings.get("lr") or 0.0, steps, epochs)
    share = settings.get("warmup", WARMUP)
    bound = settings.get("lr") or travel_rate(preset.travel or 0.0, steps, share)
    if settings.get("blocks"):
        return _train_blocks(model, task, settings, preset, ess, bound / preset.clip, h0)
    optimizer = IVONLoRA(
        parameters.items(),
        lr=bound / preset.clip,
        ess=ess,
        betas=(0.9, preset.second_beta(steps, step.direction)),
        h0=h0,
        clip=preset.clip,
        prior=settings.get("prior", "empirical"),
        prior_strength=preset.prior_strength,
        hessian=preset.hessian,  # type: ignore[arg-type]
        **step._asdict(),
        h0_steps=preset.h0_steps,
        seed=settings["seed"],
    )

    def posterior() -> Posterior:
        mean = {name: optimizer.mean(value) for name, value in parameters.items()}
        return as_posterior(mean, {name: optimizer.sigma(value) for name, value in parameters.items()})

    @torch.no_grad()
    def mirror() -> None:
        for value in parameters.values():
            value.copy_(2 * optimizer.mean(value) - value)

    @contextmanager
    def sampled() -> Iterator[None]:
        with optimizer.sampled_params():
            with torch.no_grad():
                for value in parameters.values() if "gradients" in settings else ():
                    mean, sigma = optimizer.mean(value), optimizer.sigma(value)
                    width = sigma.square().mean().sqrt() if settings["gradients"] == "flat" else 0.0
                    value.copy_(mean + (value - mean) / sigma * width)
            yield

    first = round(steps * (1 - settings.get("averaged", 0.0)))
    total: dict[str, Tensor] = {}

    def after_step(step: int) -> None:
        curve(step)
        if step >= first:
            for name, value in parameters.items():
                total[name] = total.get(name, torch.zeros(())) + optimizer.mean(value) / (steps - first)

    curve = Curve(model, task, settings, posterior)
    losses: list[float] = []
    ways = (sampled, after_step, mirror, losses)
    seconds = loop(model, task.train, optimizer, settings, *ways) - curve.seconds
    facts = {**optimizer.summary(), "curve": curve.points, "losses": eighths(losses)}
    found = as_posterior(total, dict(posterior().sigma)) if total else posterior()
    return Trained(model, found, seconds, state_bytes(optimizer), facts)


def _train_blocks(
    model: Encoder, task: Task, settings: Mapping[str, Any], preset: Preset, ess: float, lr: float, h0: float
) -> Trained:
    parameters, beta2 = model.trained(), preset.second_beta(settings["steps"])
    optimizer = BlockIVON(
        parameters, lr, ess, beta2, h0, preset.clip, preset.prior_strength, preset.h0_steps or 0.0, settings["seed"]
    )
    curve = Curve(model, task, settings, optimizer.posterior)
    seconds = loop(model, task.train, optimizer, settings, optimizer.sampled_params, curve) - curve.seconds
    found = optimizer.posterior()
    facts = {"curve": curve.points, "ivon_ess": ess}
    return Trained(model, found, seconds, 4 * (optimizer.P.numel() + optimizer.g.numel()), facts, found.roots)


def travel_rate(travel: float, steps: int, share: float) -> float:
    """Return the peak of a warmup and a linear decay whose rates add up to `travel`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = schedule(optimizer, steps, share).lr_lambdas[0]
    return travel / sum(rate(step) for step in range(steps))


def train_ivon_lora(model: Encoder, task: Task, settings: Mapping[str, Any]) -> Trained:
    """IVON-LoRA: `axolotl_ivon.IVONLoRA` on all trained parameters."""
    parameters = model.trained()
    if settings.get("bf16"):
        for name, parameter in parameters.items():
            if "lora_" in name:  # PEFT casts what comes in and what goes out
                parameter.data = parameter.data.bfloat16()
    if weight := settings.get("weight"):
        ess = weight * len(task.train)
    else:
        ess = effective_sample_size(len(task.train), settings["gamma"])
    optimizer = IVONLoRA(
        parameters.values(),
        lr=learning_rate(settings, settings["steps"], settings["clip"]),
        ess=ess,
        betas=(0.9, settings["beta2"]),
        h0=settings["h0"],
        clip=settings["clip"],
        prior=settings.get("prior", "empirical"),
        seed=settings["seed"],
    )
    seconds = loop(model, task.train, optimizer, settings, optimizer.sampled_params)
    mean = {name: optimizer.mean(value) for name, value in parameters.items()}
    sigma = {name: optimizer.sigma(value) for name, value in parameters.items()}
    return Trained(model, as_posterior(mean, sigma), seconds, state_bytes(optimizer), optimizer.summary())


class AlgorithmOne(torch.optim.Optimizer):
    """IVON-LoRA as its paper's Algorithm 1 has it: h is averaged over the steps, and the newest δ is added to it.

    For the ablation alone: σ² = 1/(λ·(h + δ)), where h + δ has a floor, as it turns negative when δ jumps.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, ess: float, beta2: float, h0: float, clip: float, seed: int
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.ess, self.beta2, self.clip, self.floor = ess, beta2, clip, 1e-3 * h0
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.floored = 0, 0
        for p in self.param_groups[0]["params"]:
            m = p.detach().clone()
            delta = 1 / (ess * (m.square() + 1 / (ess * h0)).mean())
            self.state[p] = {"m": m, "g": torch.zeros_like(m), "h": torch.full_like(m, h0), "delta": delta}

    def precision(self, p: Tensor) -> Tensor:
        """Return h + δ, not below the floor."""
        return (self.state[p]["h"] + self.state[p]["delta"]).clamp_min(self.floor)

    def sigma(self, p: Tensor) -> Tensor:
        """Return σ."""
        return (self.ess * self.precision(p)).rsqrt()

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """Put a draw into the parameters inside the context; keep ĥ."""
        with torch.no_grad():
            for p in self.state:
                p.add_(self.sigma(p) * torch.randn(p.shape, generator=self.generator))
        yield
        with torch.no_grad():
            for p, state in self.state.items():
                state["hessian"] = p.grad * (p - state["m"]) * self.ess * self.precision(p)
                p.copy_(state["m"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        self.steps += 1
        for p, state in self.state.items():
            m, g, h = state["m"], state["g"], state["h"]
            state["delta"] = 1 / (self.ess * (m.square() + self.sigma(p).square()).mean())
            g.lerp_(p.grad, 0.1)
            gap = h - state["hessian"]
            h += (self.beta2 - 1) * gap + 0.5 * (1 - self.beta2) ** 2 * gap.square() / self.precision(p)
            self.floored += int((h + state["delta"] < self.floor).sum())
            direction = g / (1 - 0.9**self.steps) / self.precision(p)
            m -= self.param_groups[0]["lr"] * direction.clamp(-self.clip, self.clip)
            p.copy_(m)


def train_algorithm_one(model: Encoder, task: Task, settings: Mapping[str, Any]) -> Trained:
    """IVON-LoRA with h, and not the precision, as the state."""
    parameters = model.trained()
    optimizer = AlgorithmOne(
        parameters.values(),
        learning_rate(settings, settings["steps"], settings["clip"]),
        effective_sample_size(len(task.train), settings["gamma"]),
        settings["beta2"],
        settings["h0"],
        settings["clip"],
        settings["seed"],
    )
    seconds = loop(model, task.train, optimizer, settings, optimizer.sampled_params)
    sigma = {name: optimizer.sigma(value) for name, value in parameters.items()}
    floored = optimizer.floored / optimizer.steps
    return Trained(model, as_posterior(parameters, sigma), seconds, state_bytes(optimizer), {"floored_a_step": floored})


def train_ivon_opt(model: Encoder, task: Task, settings: Mapping[str, Any]) -> Trained:
    """IVON with its fixed prior, by the package `ivon-opt`."""
    import ivon

    parameters = model.trained()
    ess = effective_sample_size(len(task.train), settings["gamma"])
    optimizer = ivon.IVON(
        list(parameters.values()),
        lr=settings["lr"],
        ess=ess,
        hess_init=settings["h0"],
        beta1=0.9,
        beta2=settings["beta2"],
        weight_decay=settings["weight_decay"],
        clip_radius=settings["clip"],
        rescale_lr=False,
    )
    seconds = loop(model, task.train, optimizer, settings, lambda: optimizer.sampled_params(train=True))
    [group] = optimizer.param_groups
    flat = (ess * (group["hess"] + settings["weight_decay"])).rsqrt()
    parts = flat.split([value.numel() for value in parameters.values()])
    sigma = {name: part.view_as(value) for (name, value), part in zip(parameters.items(), parts, strict=True)}
    return Trained(model, as_posterior(parameters, sigma), seconds, state_bytes(optimizer))


class BlobLinear(nn.Module):
    """LoRA's A with a mean-field Gaussian q(A) = N(weight, (g²)²), as in BLoB (arXiv 2406.11675).

    In training the noise is that of flipout (arXiv 1803.04386): one draw of g²∘ε for the batch, with its own random
    signs on input and output for every token. In evaluation only the mean is used.
    """

    def __init__(self, linear: nn.Linear, width: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = linear.weight
        start = torch.rand(self.weight.shape, generator=generator)
        self.g = nn.Parameter(width * (1 / math.sqrt(2) + (1 - 1 / math.sqrt(2)) * start))
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, rank)."""
        y = F.linear(x, self.weight)
        if not self.training:
            return y
        noise = self.g.square() * torch.randn(self.g.shape, generator=self.generator)
        return y + F.linear(x * self.signs(x), noise) * self.signs(y)

    def signs(self, like: Tensor) -> Tensor:
        """Return ±1 with equal chance, in the shape of `like`."""
        return torch.randint(0, 2, like.shape, generator=self.generator, dtype=like.dtype) * 2 - 1

    def kl(self, prior_sigma: float) -> Tensor:
        """Return KL(q(A) ‖ N(0, prior_sigma²)), which equals that over the whole update BA (theorem 3.2)."""
        variance = self.g.square().square()
        ratio = (self.weight.square() + variance) / prior_sigma**2
        return 0.5 * (ratio - 1 - torch.log(variance / prior_sigma**2)).sum()


def kl_weight(step: int, cycle: int) -> float:
    """Return BLoB's weight of the KL at a step: 2^i / (2^(M+1) − 1), i = 1 … M again and again; about 1 a cycle."""
    return 2.0 ** (step % cycle + 1 - cycle) / (2 - 2.0**-cycle)


def train_blob(model: Encoder, task: Task, settings: Mapping[str, Any]) -> Trained:
    """BLoB: AdamW on the likelihood and SGD on the reweighted KL, with the constants of the authors' code.

    They are σ_p = 0.2, ε = 0.05, a KL rate of 0.02, and a cycle of 100·N^(π/8)/batch steps (for the reweighting).
    """
    generator = torch.Generator().manual_seed(settings["seed"])
    layers: dict[str, BlobLinear] = {}
    for name, module in list(model.peft.named_modules()):
        if name.endswith("lora_A.default"):
            layers[name] = BlobLinear(module, settings["width"], generator)
            parent, _, child = name.rpartition(".")
            model.peft.get_submodule(parent)[child] = layers[name]
    parameters = model.trained()
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings["lr"], weight_decay=0.0)
    q_parameters = [value for layer in layers.values() for value in (layer.weight, layer.g)]
    kl_optimizer = torch.optim.SGD(q_parameters, lr=settings["kl_lr"])
    kl_schedule = schedule(kl_optimizer, settings["steps"])
    cycle = max(1, int(100 * len(task.train) ** (math.pi / 8) / settings["batch"]))

    def kl_step(step: int) -> None:
        weight = kl_weight(step, cycle)
        if weight > 1e-6:
            torch.stack([weight * layer.kl(settings["prior_sigma"]) for layer in layers.values()]).sum().backward()
            kl_optimizer.step()
            kl_optimizer.zero_grad()
        kl_schedule.step()

    seconds = loop(model, task.train, optimizer, settings, after_step=kl_step)
    mean = {name: value for name, value in parameters.items() if not name.endswith(".g")}
    sigma = {f"{name}.weight": layer.g.detach().square() for name, layer in layers.items()}
    width = torch.cat([value.flatten() for value in sigma.values()]).mean().item()
    return Trained(model, as_posterior(mean, sigma), seconds, state_bytes(optimizer), {"sigma_mean": width})


TRAINERS: dict[str, Callable[[Encoder, Task, Mapping[str, Any]], Trained]] = {
    "adamw": train_adamw,
    "lion": train_lion,
    "ivon-lora": train_ivon_lora,
    "ivon-auto": train_ivon_auto,
    "algorithm-1": train_algorithm_one,
    "ivon-opt": train_ivon_opt,
    "blob": train_blob,
}


# -------------------------------------------------------------------- σ that is fitted afterwards


def fit_sigma(
    model: Encoder, task: Task, method: str, validated: bool, draws: int, seed: int
) -> tuple[Posterior, dict[str, Any]]:
    """Return the posterior that `ivon-post fit` puts around the mean of a run, and the facts to note.

    λ is that of `ivon_preset: auto`, or if `validated` the multiple of it with the lowest validation NLL; tfb takes the
    training data as anchor. The model holds the mean, and does so afterwards.
    """
    parameters, examples, begun = model.trained(), task.train, time.process_time()
    weights = sum(value.numel() for value in parameters.values())
    mean = {name: value.detach().clone() for name, value in parameters.items()}

    def nll(sigma: Weights, of: Sequence[Example]) -> float:
        found = predict_posterior(model, as_posterior(mean, sigma), of, draws)
        labels = labels_of(of)
        return float(-found.probabilities[torch.arange(len(of)), labels].log().mean())

    if method == "tfb":
        shape = tfb.noise_shape(model.peft, parameters)
        at_mean = nll({name: torch.zeros_like(value) for name, value in mean.items()}, examples)

        def scaled(width: float) -> dict[str, Tensor]:
            return {name: value * width for name, value in shape.items()}

        found, tried = tfb.widest(
            lambda width: nll(scaled(width), examples) - at_mean - TOLERANCE, tfb.first_width(shape, mean), tfb.MOST - 1
        )
        facts = {"sigma_q": found, "evaluations": 1 + len(tried)}
        return as_posterior(mean, scaled(found)), {**facts, "fit_seconds": time.process_time() - begun}
    generator = torch.Generator().manual_seed(seed)

    def losses(some: Sequence[Example]) -> Tensor:
        logits = model(collate(some))
        return (logits * residuals(logits, generator)).sum(-1)

    def batches() -> Iterator[list[Example]]:
        random = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(examples), generator=random).tolist()
            yield from ([examples[i] for i in order[at : at + 8]] for at in range(0, len(order), 8))

    prior = Prior(PRESETS["auto"].ess(len(examples), weights))
    fan_ins = [value.shape[1] for name, value in parameters.items() if ".lora_A." in name]
    start: Any = PRESETS["auto"].first_h0(prior.ess, fan_ins)
    steps = 0

    def sigma(information: Weights, prior: Prior) -> dict[str, Tensor]:
        return {name: prior.sigma(h, prior.delta(h, mean[name])) for name, h in information.items()}

    with ExampleGradients(model, parameters, losses) as gradients:
        square = squarer(gradients, lambda example: 1)
        for stage in range(1 + validated):
            if method == "fisher":
                once = itertools.islice(batches(), math.ceil(len(examples) / 8))
                sums = functools.reduce(Squares.add, map(square, once))
                information = sums.information()
            else:
                *_, progress = iterate(parameters, square, batches(), prior, start, Averages(), seed)
                information, steps = progress.information(), steps + progress.step
            if validated and stage == 0:
                priors = [prior._replace(ess=prior.ess * factor) for factor in FACTORS]
                prior = min(priors, key=lambda one: nll(sigma(information, one), task.validation))
                start = information
                if method == "fisher":
                    break
    facts = {"ess": prior.ess, "steps": steps, "fit_seconds": time.process_time() - begun}
    return as_posterior(mean, sigma(information, prior)), facts


# -------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Predictions:
    """Class probabilities (n, classes) averaged over draws, float64, and the mean entropy of the draws (n,)."""

    probabilities: Tensor
    expected_entropy: Tensor

    @classmethod
    def of(cls, logits: Iterable[Tensor]) -> Predictions:
        """Average the softmax over draws of logits (n, classes)."""
        draws = torch.stack([x.softmax(1) for x in logits])
        return cls(draws.mean(0), entropy(draws).mean(0))


@contextmanager
def loaded(model: Encoder, weights: Weights) -> Iterator[None]:
    """Put weights into the model's trained parameters inside the context."""
    parameters = {name: value for name, value in model.trained().items() if name in weights}
    kept = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(weights[name])
        yield
    finally:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(kept[name])


def predict_at(model: Encoder, weights: Iterable[Weights], examples: Sequence[Example]) -> Predictions:
    """Return the predictions averaged over sets of weights."""

    def logits() -> Iterator[Tensor]:
        for one in weights:
            with loaded(model, one):
                yield predict(model, examples)

    return Predictions.of(logits())


def predict_posterior(model: Encoder, q: Posterior, examples: Sequence[Example], draws: int) -> Predictions:
    """Return the average over `draws` draws, or the prediction at the mean for 0 draws."""
    weights = (q.sample(0, member) for member in range(1, draws + 1)) if draws else iter([dict(q.mean)])
    return predict_at(model, weights, examples)


def predict_dropout(model: Encoder, examples: Sequence[Example], draws: int) -> Predictions:
    """MC dropout (arXiv 1506.02142): the average over passes with LoRA's dropout switched on."""
    torch.manual_seed(0)
    model.train()
    predictions = Predictions.of(predict(model, examples) for _ in range(draws))
    model.eval()
    return predictions


class _Loader:
    """What laplace-torch needs of a data loader: batches, and a data set with a length."""

    def __init__(self, examples: Sequence[Example], size: int) -> None:
        self.dataset = examples
        order = sorted(examples, key=lambda example: len(example.ids))
        self.batches = [collate(order[i : i + size]) for i in range(0, len(order), size)]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def fit_laplace(model: Encoder, task: Task, structure: str) -> Any:
    """Laplace-LoRA (arXiv 2308.13111) by laplace-torch: GGN around the AdamW run, prior by marginal likelihood.

    `structure` is "diag" or "kron" over LoRA and the classifier, or "last_layer" ("kron" over the classifier alone).
    """
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN

    parameters = model.trained()
    for name, value in parameters.items():
        value.requires_grad_(structure != "last_layer" or "classifier" in name)
    laplace = Laplace(
        model,
        "classification",
        subset_of_weights="all",  # of those that require a gradient
        hessian_structure="diag" if structure == "diag" else "kron",
        backend=CurvlinopsGGN,
    )
    laplace.fit(_Loader(task.train, 8))
    laplace.optimize_prior_precision(method="marglik", pred_type="glm")
    return laplace


def predict_laplace(laplace: Any, examples: Sequence[Example], samples: int = 1000) -> Predictions:
    """Return the linearized predictive: the softmax averaged over `samples` draws of the Gaussian over logits."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    probabilities = torch.empty(len(examples), laplace.n_outputs, dtype=torch.float64)
    expected = torch.empty(len(examples), dtype=torch.float64)
    for start in range(0, len(order), 8):
        chosen = order[start : start + 8]
        mean, covariance = laplace._glm_predictive_distribution(collate([examples[i] for i in chosen]))
        root = torch.linalg.cholesky(covariance.double() + 1e-9 * torch.eye(mean.shape[1], dtype=torch.float64))
        noise = torch.randn(samples, *mean.shape, generator=torch.Generator().manual_seed(start), dtype=torch.float64)
        drawn = (mean.double() + (root @ noise[..., None]).squeeze(-1)).softmax(-1)
        probabilities[chosen], expected[chosen] = drawn.mean(0).detach(), entropy(drawn).mean(0).detach()
    return Predictions(probabilities, expected)
