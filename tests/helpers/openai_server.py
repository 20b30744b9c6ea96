"""An OpenAI-compatible server on loopback that answers from PEFT adapters, one request at a time."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MEMBERS = ["mean", "sample-0000", "sample-0001", "sample-0002"]  # of three draws and their mean


class Server:
    """Serves the members of an ensemble's folder.

    Attributes:
        url: where.
        requests: the bodies of all completions asked for.
        failures: statuses to answer with, before anything else, the next first; 0 hangs up, -1 in the middle.
        spoil: a function that may change an answer before it is sent.
        dies_after: how many events of a stream are sent before the connection breaks; None: all.
        busy, most: how many requests run, and how many ever did.
        longest: the most tokens of a prompt and its answer, as the list of models has it.
    """

    def __init__(self, ensemble: Path, base: Path, members: list[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), ensemble / members[0], adapter_name=members[0]
        ).eval()
        for name in members[1:]:
            self.model.load_adapter(ensemble / name, adapter_name=name)
        self.members, self.base = members, str(base)
        self.url = ""
        self.busy = 0
        self._one, self._counting = threading.Lock(), threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget all requests, and answer as a server should."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.failures: list[int] = []
        self.spoil = lambda answer: answer
        self.most = 0
        self.dies_after: int | None = None
        self.longest = 2048

    def models(self) -> dict[str, Any]:
        """Return the models as vLLM lists them."""
        base = {"id": "base", "object": "model", "root": self.base, "max_model_len": self.longest}
        lora = [{"id": name, "object": "model", "parent": "base", "max_model_len": None} for name in self.members]
        return {"object": "list", "data": [base, *lora]}

    @torch.no_grad()
    def complete(self, body: dict[str, Any], chat: bool = False) -> dict[str, Any]:
        """Answer one request as vLLM does; every output begins anew, without caches or batches."""
        prompt = body["prompt"] if not chat else self._rendered(body["messages"])
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        choices, generated = [], 0
        with self._one, self._weights(body["model"]):
            rows = self._prompt_logprobs(list(prompt), body)
            for index in range(body.get("n", 1)):
                generator = torch.Generator().manual_seed(body.get("seed", 0) + index)
                ids, finish, stopped = list(prompt), "length", None
                while len(ids) - len(prompt) < body.get("max_tokens", 16):
                    logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
                    if body["temperature"]:
                        probabilities = (logits / body["temperature"]).softmax(-1)
                        token = int(torch.multinomial(probabilities, 1, generator=generator))
                    else:
                        token = int(logits.argmax())
                    ids.append(token)
                    if token == self.tokenizer.eos_token_id:
                        finish = "stop"
                        break
                generated += len(ids) - len(prompt)
                text = self._decode(ids[len(prompt) :])
                for stop in body.get("stop", []):
                    if stop in text:
                        text, finish, stopped = text.split(stop)[0], "stop", stop
                choices.append(
                    {
                        "index": index,
                        **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
                        "logprobs": self._logprobs(ids, len(prompt), body, chat),
                        "finish_reason": finish,
                        "stop_reason": stopped,
                        "prompt_logprobs": rows,
                        **({"token_ids": ids[len(prompt) :]} if body.get("return_token_ids") else {}),
                        **({"prompt_token_ids": list(prompt)} if body.get("return_token_ids") and not chat else {}),
                    }
                )
        usage = {"prompt_tokens": len(prompt), "completion_tokens": generated, "total_tokens": len(prompt) + generated}
        kind = "chat.completion" if chat else "text_completion"
        ids = {"prompt_token_ids": list(prompt)} if body.get("return_token_ids") and chat else {}
        return {"object": kind, "model": body["model"], "choices": choices, "usage": usage, **ids}

    def _rendered(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _weights(self, model: str) -> contextlib.AbstractContextManager[Any]:
        """Choose what answers, inside the block."""
        if model == "base":
            return self.model.disable_adapter()
        self.model.set_adapter(model)
        return contextlib.nullcontext()

    def _prompt_logprobs(self, ids: list[int], body: dict[str, Any]) -> list[Any] | None:
        """Return what vLLM does with `prompt_logprobs`: the likeliest tokens, and the one that stands there."""
        if (count := body.get("prompt_logprobs")) is None:
            return None
        table: list[Any] = [None]
        for row, token in zip(
            self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1), ids[1:], strict=False
        ):
            told = [token, *row.topk(count).indices.tolist()]
            entries = {str(id): {"logprob": float(row[id]), "rank": int((row > row[id]).sum()) + 1} for id in told}
            table.append({id: {**entry, "decoded_token": self._decode([int(id)])} for id, entry in entries.items()})
        return table

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _logprobs(self, ids: list[int], start: int, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        rows = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        count = body.get("top_logprobs", 0) if chat else body.get("logprobs") or 0
        tokens, logprobs, tops = [], [], []
        for row, token in zip(rows[start - 1 :], ids[start:], strict=False):
            tokens.append(self.tokenizer.decode([token]))
            logprobs.append(float(row[token]))
            likeliest = [*row.topk(count).indices.tolist(), token] if count else []
            tops.append({self.tokenizer.decode([other]): float(row[other]) for other in likeliest})
        if not chat:
            return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops}
        return {
            "content": [
                {"token": t, "logprob": p, "top_logprobs": [{"token": k, "logprob": v} for k, v in top.items()]}
                for t, p, top in zip(tokens, logprobs, tops, strict=True)
            ]
        }

    def events(self, body: dict[str, Any], chat: bool) -> Iterator[dict[str, Any]]:
        """Yield an answer as a stream has it: a choice in two halves."""
        whole = self.complete({**body, "stream": False}, chat)
        kind = "chat.completion.chunk" if chat else "text_completion"
        for choice in whole["choices"]:
            text = choice["message"]["content"] if chat else choice["text"]
            half = len(text) // 2
            parts = [(text[:half], None, None), (text[half:], choice["logprobs"], choice["finish_reason"])]
            for part, logprobs, finish in parts:
                told = {"delta": {"content": part}} if chat else {"text": part}
                own = {"index": choice["index"], **told, "logprobs": logprobs, "finish_reason": finish}
                yield {"object": kind, "choices": [own], "usage": None}
        yield {"object": kind, "choices": [], "usage": whole["usage"]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Server
    timeout = 30.0

    def do_GET(self) -> None:
        self._answer(200, self.served.models()) if self.path == "/v1/models" else self._answer(404, {})

    def do_POST(self) -> None:
        served = self.served
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served._counting:
            served.requests.append(body)
            served.headers.append(self.headers)
            status = served.failures.pop(0) if served.failures else 200
            served.busy += 1
            served.most = max(served.most, served.busy)
        try:
            if status == 0:
                self.close_connection = True
            elif status == -1:
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
            elif status != 200:
                self._answer(status, {"error": {"message": "not\nnow"}})
            elif body.get("stream"):
                self._stream(served.events(body, "chat" in self.path))
            else:
                self._answer(200, served.spoil(served.complete(body, "chat" in self.path)))
        finally:
            with served._counting:
                served.busy -= 1

    def _stream(self, events: Iterator[dict[str, Any]]) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for number, event in enumerate(events):
                if number == self.served.dies_after:
                    return
                data = f"data: {json.dumps(event)}\n\n".encode()
                self.wfile.write(b"%x\r\n" % len(data) + data + b"\r\n")
            self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status != 200:
            self.send_header("Retry-After-Ms", "1")  # else the openai client waits for half a second and more
        with contextlib.suppress(ConnectionError):  # the client may be gone
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(served: Server) -> Iterator[Server]:
    """Run a server inside the block."""
    handler = type("Handler", (_Handler,), {"served": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        http.daemon_threads = False  # a thread inside torch must not outlive the interpreter
        served.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            http.shutdown()
            thread.join()
