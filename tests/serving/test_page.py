"""The page at / in a real browser: a person types, and sees the answer with its colours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from served import ask, until

from axolotl_ivon.decisions.rule import DecisionRule
from axolotl_ivon.serving.api.app import Guard

ENTER = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true})"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def wait(browser: Browser, condition: str) -> Any:
    return until(lambda: browser.run(condition), 30)


def type_in(browser: Browser, text: str) -> None:
    browser.run(f"document.getElementById('question').value = {json.dumps(text)}")
    browser.run(f"document.getElementById('question').dispatchEvent({ENTER})")


def test_a_person_types_and_sees_how_sure_the_answer_is(serve: Callable[..., Any], browser: Browser) -> None:
    with serve(max_tokens=12) as url:
        browser.open(f"{url}/", 900, 700)
        wait(browser, "document.querySelectorAll('#model option').length == 6")
        type_in(browser, "red <b>dog</b>")
        wait(browser, "document.querySelector('.facts b') !== null")
        assert browser.run("document.querySelector('article.user').textContent") == "red <b>dog</b>"
        spans = browser.run(
            "[...document.querySelectorAll('article.assistant .text span')].map(s => "
            "[s.textContent, Number(s.dataset.mutualInformation), s.style.backgroundColor, s.title])"
        )
        messages = [{"role": "user", "content": "red <b>dog</b>"}]
        body = {"model": "tiny", "messages": messages, "temperature": 0, "logprobs": True}
        expected = ask(url, "/v1/chat/completions", body)[2]
        tokens = expected["ivon"]["tokens"]
        assert [(text, mutual) for text, mutual, _, _ in spans] == [
            (own["token"], pytest.approx(own["mutual_information"], rel=1e-3)) for own in tokens
        ]
        assert all(colour.startswith("rgba(200, 80, 10, ") for _, _, colour, _ in spans)
        assert all("mutual information" in title for *_, title in spans)
        shown = browser.run("document.querySelector('.facts').textContent")
        assert f" {expected['ivon']['confidence']:.3f}" in shown
        assert "3 members" in shown
        type_in(browser, "and a cat?")  # the conversation goes on
        wait(browser, "document.querySelectorAll('.facts').length == 2")
        assert not browser.complaints
        for scheme, width in ((False, 900), (True, 900), (False, 390)):
            browser.open(f"{url}/", width, 700, dark=scheme)
            assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert {address.split("/")[2] for address in browser.requests if "//" in address} == {url.split("/")[2]}


def test_choices_are_bars_and_a_new_chat_begins_with_the_system_prompt(
    serve: Callable[..., Any], browser: Browser, make_engine: Callable[..., Any], tiny_adapter: Path
) -> None:
    with serve(make_engine(tiny_adapter, DecisionRule(threshold=0.6))) as url:
        browser.open(f"{url}/", 400, 700)
        wait(browser, "document.querySelectorAll('#model option').length == 6")
        system, labels = "dog or cat?", ["A", "yes no", "B"]
        for name, text in (("system", system), ("choices", "\n".join(labels))):
            browser.run(f"document.getElementById('{name}').value = {json.dumps(text)}")
        for _ in range(2):
            browser.run("document.getElementById('new').click()")
            assert browser.run("document.querySelectorAll('article').length") == 0
            type_in(browser, "red")
            wait(browser, "document.querySelector('.facts') !== null")
            rows = browser.run(
                "[...document.querySelectorAll('.choices tr')].map(r => [...r.cells].map(c => c.textContent))"
            )
            messages = [{"role": "system", "content": system}, {"role": "user", "content": "red"}]
            body = {"model": "tiny", "messages": messages, "temperature": 0, "guided_choice": labels}
            choices = ask(url, "/v1/chat/completions", body)[2]["ivon"]["choices"]
            expected = sorted(choices.items(), key=lambda one: -one[1])
            assert [(label, float(p)) for label, _, p in rows] == [
                (label, pytest.approx(p, abs=1e-3)) for label, p in expected
            ]
            drawn = browser.run(
                "[...document.querySelectorAll('.track')].map(t => [t.children[0].offsetWidth, "
                "t.children[1].offsetLeft].map(x => x / t.clientWidth))"
            )
            assert drawn == [[pytest.approx(p, abs=0.02), pytest.approx(0.6, abs=0.02)] for _, p in expected]
            assert "abstains below 0.600" in browser.run("document.querySelector('.facts').textContent")
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert not browser.complaints


def test_a_key_is_asked_for_and_errors_are_shown(serve: Callable[..., Any], browser: Browser) -> None:
    with serve(guard=Guard(api_key="secret"), max_tokens=4) as url:
        browser.open(f"{url}/", 900, 700)
        wait(browser, "!document.getElementById('key-field').hidden")
        type_in(browser, "red")
        assert "no such API key" in wait(browser, "document.querySelector('.error')?.textContent")
        browser.run(
            "document.getElementById('key').value = 'secret'; "
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        wait(browser, "document.querySelectorAll('#model option').length == 6")
        type_in(browser, "red")
        wait(browser, "document.querySelector('.facts') !== null")


def test_it_is_one_file_that_needs_no_other(url: str) -> None:
    status, headers, text = ask(url, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in text
    assert "https://" not in text
    assert "src=" not in text
