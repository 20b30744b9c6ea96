"""Generation against PEFT's own `generate` on exported members, teacher forcing, and transformers' top-p."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import NAMES, rename_cache
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from tiny import write_chats
from transformers import AutoModelForCausalLM, TopPLogitsWarper

from axolotl_ivon import IVONError, Posterior
from axolotl_ivon.data.chats import read_chats
from axolotl_ivon.data.encode import render
from axolotl_ivon.generation.local import TransformersEngine, kept_rows, next_tokens
from axolotl_ivon.generation.plan import Output, Plan
from axolotl_ivon.models.session import Session
from axolotl_ivon.posterior.sample import EnsemblePlan, sample

GREEDY = Plan(n=6, per_model=2, temperature=0, max_tokens=12, seed=3)
SAMPLED = Plan(n=12, per_model=4, temperature=0.8, top_p=0.9, max_tokens=12, seed=3)


class Scene:
    """A posterior over the tiny model, its exported ensemble, and prompts of several lengths."""

    def __init__(self, adapter: Path, base: Path, folder: Path) -> None:
        self.posterior = Posterior.from_pretrained(adapter).prune(0.2).temper(0.25)
        self.ensemble, self.base = folder / "ensemble", base
        sample(self.posterior, self.ensemble, EnsemblePlan(3, seed=3))
        self.session = Session.open(self.posterior)
        self.model, self.tokenizer = self.session.model, self.session.tokenizer
        self.prompts = render(self.tokenizer, read_chats(write_chats(folder / "chats.jsonl", 5)))
        # Of 400 tokens nearly each is drawn now and then, and its end with it.
        assert len({len(prompt.ids) for prompt in self.prompts}) > 1

    def engine(self, plan: Plan, **options: Any) -> TransformersEngine:
        return TransformersEngine(self.session, self.posterior, plan, **options)

    def outputs(self, plan: Plan, **options: Any) -> list[list[Output]]:
        return list(self.engine(plan, **options).outputs(self.prompts))

    def member(self, number: int) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(self.base)
        return PeftModel.from_pretrained(base, self.ensemble / f"sample-{number:04d}").eval()


class Numbers(TransformersEngine):
    """Gives token ids for text, so that a test knows what was generated."""

    def _decoded_text(self, sequence: list[int]) -> str:
        return " ".join(map(str, sequence))


@pytest.fixture(scope="module")
def scene(make_adapter: Callable[..., Path], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(make_adapter(), tiny_llama, tmp_path_factory.mktemp("scene"))


@pytest.fixture
def many_ends(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A third of all tokens end an output, so that sequences end at all lengths."""
    ends = list(range(2, len(scene.tokenizer), 10))
    monkeypatch.setattr(scene.model.get_base_model().generation_config, "eos_token_id", ends)
    return ends


def same(one: list[list[Output]], other: list[list[Output]]) -> None:
    for a, b in zip(one, other, strict=True):
        assert [(o.text, o.member, o.tokens) for o in a] == [(o.text, o.member, o.tokens) for o in b]
        assert [o.logprob for o in a] == pytest.approx([o.logprob for o in b], abs=1e-3)


def checked_greedy(scene: Scene, ends: list[int]) -> list[Output]:
    """Check greedy outputs against PEFT's `generate`, one prompt and member at a time, and return them."""
    by_prompt = scene.outputs(GREEDY)
    for number in range(GREEDY.members):
        model = scene.member(number)
        for outputs, prompt in zip(by_prompt, scene.prompts, strict=True):
            ids = torch.tensor([prompt.ids])
            options = {"do_sample": False, "max_new_tokens": GREEDY.max_tokens, "eos_token_id": ends}
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            text = scene.tokenizer.decode(output[0, len(prompt.ids) :].tolist(), skip_special_tokens=True)
            assert [(o.text, o.member) for o in outputs[2 * number : 2 * number + 2]] == [(text, number)] * 2
    return [output for outputs in by_prompt for output in outputs]


def test_greedy_equals_peft_on_exported_members(scene: Scene) -> None:
    outputs = checked_greedy(scene, [scene.tokenizer.eos_token_id])
    assert len({output.text for output in outputs}) > len(scene.prompts)  # members differ


def test_greedy_equals_peft_when_sequences_end_at_all_lengths(scene: Scene, many_ends: list[int]) -> None:
    assert len({output.tokens for output in checked_greedy(scene, many_ends)}) > 2


@pytest.mark.parametrize("name", NAMES)
def test_caches_of_either_name(scene: Scene, many_ends: list[int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scene.outputs(SAMPLED)
    rename_cache(scene.model, name, monkeypatch)
    same(scene.outputs(SAMPLED), expected)


def test_dora_goes_one_member_at_a_time(make_adapter: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    dora = Scene(make_adapter(use_dora=True), tiny_llama, tmp_path)
    checked_greedy(dora, [dora.tokenizer.eos_token_id])


def test_logprob_is_that_of_the_untempered_member(scene: Scene, many_ends: list[int]) -> None:
    engine = Numbers(scene.session, scene.posterior, SAMPLED)
    for number in range(SAMPLED.members):
        model = scene.member(number)
        for prompt, outputs in zip(scene.prompts, engine.outputs(scene.prompts), strict=True):
            for output in outputs[4 * number : 4 * number + 4]:
                tokens = [int(token) for token in output.text.split()]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([prompt.ids + tokens])).logits[0, len(prompt.ids) - 1 : -1]
                expected = logits.log_softmax(-1)[range(len(tokens)), tokens].sum()
                assert output.member == number
                assert output.tokens == len(tokens)
                assert output.logprob == pytest.approx(float(expected), abs=1e-3)
                assert not set(tokens[:-1]) & set(many_ends)
                assert tokens[-1] in many_ends or len(tokens) == SAMPLED.max_tokens


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.95)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_p: float) -> None:
    draws = 4096
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    uniform = (torch.arange(draws) + 0.5) / draws
    tokens = next_tokens(logits.expand(draws, -1), uniform, temperature, top_p)
    drawn = torch.bincount(tokens, minlength=50) / draws
    tempered = logits / temperature
    kept = TopPLogitsWarper(top_p)(None, tempered) if top_p < 1 else tempered
    torch.testing.assert_close(drawn, kept.softmax(-1)[0], rtol=0, atol=2.5 / draws)


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-38, 1e-7])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = 20 * torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    assert next_tokens(logits, torch.rand(8), temperature, 0.9).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_the_batch_does_not_matter(scene: Scene, many_ends: list[int], batch_size: int) -> None:
    same(scene.outputs(SAMPLED, batch_size=batch_size), scene.outputs(SAMPLED))


def test_outputs_depend_on_seed_prompt_member_and_number(scene: Scene) -> None:
    first = scene.outputs(SAMPLED)
    assert len({o.text for own in first for o in own}) > 0.9 * 12 * len(scene.prompts)
    assert scene.outputs(replace(SAMPLED, seed=4)) != first
    turned = list(scene.engine(SAMPLED).outputs(scene.prompts[::-1]))
    same(turned[::-1], first)
    fewer = scene.outputs(replace(SAMPLED, n=4))
    same(fewer, [own[:4] for own in first])


def test_a_late_start_gives_the_rest(scene: Scene) -> None:
    whole = scene.outputs(SAMPLED, batch_size=24)
    assert list(scene.engine(SAMPLED, batch_size=24).outputs(scene.prompts, 3)) == whole[3:]


def test_a_stop_string_ends_the_text_before_it(scene: Scene) -> None:
    free = scene.outputs(SAMPLED)
    stops = (free[0][0].text[4:6], "a")
    stopped = scene.outputs(replace(SAMPLED, stop=stops))
    for one, other in zip((o for own in stopped for o in own), (o for own in free for o in own), strict=True):
        assert one.text == min((other.text.split(stop)[0] for stop in stops), key=len)
        assert one.tokens <= other.tokens
    assert stopped[0][0].tokens < free[0][0].tokens


def test_out_of_memory_halves_the_batch(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, limit = Heard(), 5
    engine = scene.engine(SAMPLED, batch_size=16, reporter=heard)
    forward = engine._forward

    def tight(ids: torch.Tensor, *more: Any) -> Any:
        if len(ids) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(ids, *more)

    monkeypatch.setattr(engine, "_forward", tight)
    same(list(engine.outputs(scene.prompts)), scene.outputs(SAMPLED))
    assert len(heard.notes) == 2
    limit = 0
    with pytest.raises(IVONError, match="single sequence"):
        list(engine.outputs(scene.prompts))


def test_prompts_that_do_not_fit_are_refused(scene: Scene) -> None:
    with pytest.raises(IVONError, match=r"chats.jsonl:1: \d+ tokens and max_tokens 510"):
        next(scene.engine(Plan(max_tokens=510)).outputs(scene.prompts))
    strange = scene.prompts[0]._replace(ids=[9999])
    with pytest.raises(IVONError, match="token 9999 is new"):
        next(scene.engine(GREEDY).outputs([strange]))


@given(st.integers(1, 4).flatmap(lambda k: st.tuples(st.just(k), st.integers(1, 6))), st.randoms())
def test_shrinking_keeps_what_is_alive_and_equal_shares(shape: tuple[int, int], draw: Any) -> None:
    members, each = shape
    alive = [draw.random() < 0.4 for _ in range(members * each)]
    rows = kept_rows(alive, members)
    if rows is None:
        return
    assert len(set(rows)) == len(rows) < len(alive)
    assert {row for row, lives in enumerate(alive) if lives} <= set(rows)
    shares = [row // each for row in rows]
    assert shares == sorted(shares)
    assert len({shares.count(member) for member in range(members)}) == 1
