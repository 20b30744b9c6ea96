"""`ivon-post serve` as a process: what it prints, that it answers, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from command_line import PROCESS
from served import official

MESSAGES: Any = [{"role": "user", "content": "red dog"}]


@contextmanager
def process(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run the command, and give it with the document that it prints when it is there."""
    server = subprocess.Popen(
        [*PROCESS, "serve", *map(str, words), "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert server.stdout
    try:
        text = ""
        for line in server.stdout:
            text += line
            if line == "}\n":
                break
        yield server, json.loads(text)
    finally:
        server.kill()
        server.communicate()


def test_it_serves_until_it_is_told_to_end_and_finishes_what_runs(tiny_adapter: Path) -> None:
    with process(tiny_adapter, "-n", 2, "--name", "ours") as (server, document), ThreadPoolExecutor(1) as pool:
        assert document["models"] == [f"ours{of}" for of in ("", ":mean", ":posterior", ":member-0000", ":member-0001")]
        ours = official(document["url"])
        stream = ours.completions.create(model="ours", prompt="x", max_tokens=300, seed=1, stream=True)
        chunks = [next(stream)]
        waiting = pool.submit(ours.chat.completions.create, model="ours", messages=MESSAGES, max_tokens=2)
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason
        assert waiting.result().model_extra["ivon"]["members"] == 2  # type: ignore[index]
        assert server.wait(30) == 0
        with pytest.raises(openai.APIConnectionError):
            ours.models.list()


def test_where_the_mean_is_recommended_it_answers_as_the_merged_model_does(
    calibrated: Callable[..., Path], tmp_path: Path, ivon_post: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    adapter, ids = calibrated(), [5, 40, 7]
    ivon_post("merge", adapter, "-o", tmp_path / "merged", "-q")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(torch.tensor([ids])).logits[0, -1]
    with process(adapter, "--host", "0.0.0.0", IVON_API_KEY="sesame") as (server, document):
        with pytest.raises(openai.AuthenticationError):
            official(document["url"]).models.list()
        client = official(document["url"], "sesame")

        def answer(of: str) -> Any:
            asked: Any = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 3}
            return client.completions.create(model=f"adapter{of}", **asked)

        mean, draws = answer(""), answer(":posterior")
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
        assert (server.returncode, out) == (0, "")  # the document is all that there was
        assert "taken from the adapter's recommended.json: the mean with T 1.5" in err
        assert "sesame" not in err
        assert "Traceback" not in err
    likeliest = logits.log_softmax(-1).topk(3).values.tolist()
    assert sorted(mean.choices[0].logprobs.top_logprobs[0].values(), reverse=True) == pytest.approx(likeliest, abs=1e-3)
    sure, unsure = mean.model_extra["ivon"], draws.model_extra["ivon"]
    assert sure["confidence"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-3)
    assert (sure["members"], sure["mutual_information"]) == (1, 0)
    assert unsure["members"] == 8
    assert unsure["mutual_information"] > 0


def test_it_serves_in_front_of_itself(
    tiny_adapter: Path, tmp_path: Path, ivon_post: Any, tiny_llama: Path, calibrated: Callable[..., Path]
) -> None:
    """What is served behind it is the project's own fake of vLLM, with two members; the mean is not among them."""
    from openai_server import Server, serving

    ivon_post("sample", tiny_adapter, "-n", 2, "-o", tmp_path / "ensemble")
    members = ["sample-0000", "sample-0001"]
    with serving(Server(tmp_path / "ensemble", tiny_llama, members)) as behind:
        words = [tmp_path / "ensemble", "--endpoint", behind.url, "--candidates", 2]
        for combine in ("exact", "rescore"):
            with process(*words, "--combine", combine) as (server, document):
                names = [name.removeprefix("ensemble") for name in document["models"]]
                assert names == ["", ":posterior", ":member-0000", ":member-0001"]
                ours = official(document["url"])
                found = ours.chat.completions.create(model="ensemble", messages=MESSAGES, max_tokens=2)
                assert found.model_extra["ivon"]["members"] == 2  # type: ignore[index]
                server.send_signal(signal.SIGTERM)
                assert server.wait(30) == 0
        told = ivon_post.error("serve", *words, "--recommended", calibrated() / "recommended.json", "--port", 0)
        assert "--recommended: the mean is recommended, and" in told
        assert "include the mean, or let the draws answer with --samples" in told


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, ivon_post: Any, tiny_adapter: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = ivon_post.error("serve", tiny_adapter)
    assert "the server needs the package starlette: pip install 'axolotl-ivon[serve]'" in told
