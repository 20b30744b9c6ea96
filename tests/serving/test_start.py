"""From an adapter to what answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from heard import Heard

from axolotl_ivon import IVONError, predict
from axolotl_ivon.data.encode import ChatFormat
from axolotl_ivon.decisions.rule import DecisionRule
from axolotl_ivon.models.session import Loading, load_tokenizer
from axolotl_ivon.records.recommendation import PredictionSet
from axolotl_ivon.serving.api.backend import Limits
from axolotl_ivon.serving.api.prompts import PromptReader
from axolotl_ivon.serving.api.protocol import ChatRequest, ClassifyRequest, Request, read_request
from axolotl_ivon.serving.start import Drawing, check_key, local_backend, served_name


def test_only_this_machine_is_served_without_a_key() -> None:
    for host, key in (("127.0.0.1", None), ("::1", None), ("0.0.0.0", "secret")):
        check_key(host, key)
    for host in ("0.0.0.0", "192.168.0.7", "::"):
        with pytest.raises(IVONError, match="others can reach it; set a key with IVON_API_KEY"):
            check_key(host, None)
    with pytest.raises(IVONError, match="an empty key keeps nobody out"):
        check_key("127.0.0.1", "")


@pytest.mark.parametrize("name", ["", "a:b", "a\nb"])
def test_a_name_is_one_word_without_a_colon(name: str) -> None:
    with pytest.raises(IVONError, match="name"):
        served_name(name, "adapter")
    assert served_name("my-adapter v2", "adapter") == "my-adapter v2"


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{{ m.name }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking %}<t>{% endif %}{% endif %}"
)


def test_a_chat_is_rendered_as_in_training_or_as_the_request_wants(tiny_adapter: Path) -> None:
    tokenizer = load_tokenizer(tiny_adapter, "")
    tokenizer.chat_template = TEMPLATE
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "sun"}], "name": "bob"}]}
    prompts = PromptReader(lambda: tokenizer, ChatFormat(generation_prompt="\nassistant: <t></t>"))
    for kwargs, end in (
        (None, "assistant: <t></t>"), ({}, "assistant: "), ({"enable_thinking": True}, "assistant: <t>")
    ):  # fmt: skip
        request = read_request(ChatRequest, {**body, "chat_template_kwargs": kwargs})
        [prompt] = asyncio.run(prompts.read(request))
        assert tokenizer.decode(prompt.ids) == f"userbob: sun\n{end}"
    for template, role in ((TEMPLATE, "system"), (f"{TEMPLATE}{{# developer #}}", "developer")):
        tokenizer.chat_template = template
        chat = [{"role": "developer", "content": "x"}, {"role": "user", "content": "sun"}]
        assert tokenizer.decode(prompts.encode(chat)).startswith(f"{role}: x\n")


def test_a_chat_with_choices_is_asked_after_the_system_prompt_of_training(tiny_adapter: Path) -> None:
    """As `/classify` asks it; the template would put a system message of its own there. One in the chat stays."""
    tokenizer = load_tokenizer(tiny_adapter, "")
    own = "{% if messages[0].role not in ['system', 'developer'] %}system: I help.\n{% endif %}"
    user, other = {"role": "user", "content": "sun"}, {"role": "system", "content": "x"}
    trained = ChatFormat(system_prompt="good or bad")

    def text(request: Request) -> str:
        [prompt] = asyncio.run(PromptReader(lambda: tokenizer, trained).read(request))
        return str(tokenizer.decode(prompt.ids)).rstrip()

    def chat(*messages: object, **more: object) -> Request:
        return read_request(ChatRequest, {"model": "m", "messages": [*messages], **more})

    [classified] = ClassifyRequest(model="m", input="sun").requests(["A", "B"])
    for template in (own + TEMPLATE, f"{own}{TEMPLATE}{{# developer #}}"):
        tokenizer.chat_template = template
        for choices in ({"guided_choice": ["A", "B"]}, {"structured_outputs": {"choice": ["A", "B"]}}):
            assert text(chat(user, **choices)) == text(classified) == "system: good or bad\nuser: sun\nassistant:"
            assert text(chat(other, user, **choices)) == "system: x\nuser: sun\nassistant:"
            assert "good" not in text(chat({**other, "role": "developer"}, user, **choices))
        assert text(chat(user)) == "system: I help.\nuser: sun\nassistant:"  # a chat for any text, as it is


def test_the_labels_of_training_are_those_of_the_server(make_adapter: Callable[..., Path]) -> None:
    adapter = make_adapter(facts={"choices": '["A", "B"]'})

    async def run() -> tuple[Sequence[str], Any]:
        sets = PredictionSet(coverage=0.9, threshold=0.0, examples=99)
        rule = DecisionRule(2.0, 1.0, prediction_set=sets)
        backend = local_backend(Drawing(str(adapter), samples=2), rule, Limits(), Loading())
        [request] = ClassifyRequest(model="adapter", input="red").requests(backend.prompts.labels)
        answers = await backend.answer(request)
        ivon = [delta async for delta in answers.deltas][-1].ivon
        await backend.close()
        return backend.prompts.labels, ivon

    labels, ivon = asyncio.run(run())
    [expected] = predict(adapter, ["red"], n=2)
    halved = {label: p**0.5 for label, p in expected.probabilities.items()}  # at temperature 2
    assert tuple(labels) == ("A", "B")
    assert ivon["choices"] == pytest.approx({label: p / sum(halved.values()) for label, p in halved.items()}, rel=1e-4)
    assert (ivon["abstain"], sorted(ivon["set"])) == (True, ["A", "B"])


def test_an_adapter_answers_under_its_own_name(tiny_adapter: Path) -> None:
    heard, drawing = Heard(), Drawing(f"{tiny_adapter}/", samples=2)
    backend = local_backend(drawing, DecisionRule(), Limits(), Loading(), reporter=heard)
    asyncio.run(backend.close())
    assert list(backend.models) == [
        f"adapter{of}" for of in ("", ":mean", ":posterior", ":member-0000", ":member-0001")
    ]
    assert list(heard.counts) == ["loading the base model", "drawing 2 members"]
