"""An OpenAI-compatible server on loopback that answers from PEFT adapters, one request at a time."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Server:
    """Serves the members of an ensemble's folder.

    Attributes:
        url: where.
        requests: the bodies of all completions asked for.
        failures: statuses to answer with, before anything else, the next first; 0 hangs up.
        spoil: a function that may change an answer before it is sent.
        busy, most: how many requests run, and how many ever did.
    """

    def __init__(self, ensemble: Path, base: Path, members: list[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), ensemble / members[0], adapter_name=members[0]
        ).eval()
        for name in members[1:]:
            self.model.load_adapter(ensemble / name, adapter_name=name)
        self.members = members
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        self.spoil = lambda answer: answer
        self.busy = self.most = 0
        self.delay = 0.0
        self.url = ""
        self._one, self._counting = threading.Lock(), threading.Lock()

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in ["base", *self.members]]}

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; every output begins anew, without caches or batches."""
        choices = []
        with self._one:
            self.model.set_adapter(body["model"])
            for index in range(body["n"]):
                generator = torch.Generator().manual_seed(body["seed"] + index)
                ids, logprobs = list(body["prompt"]), []
                while len(logprobs) < body["max_tokens"]:
                    logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
                    if body["temperature"]:
                        probabilities = (logits / body["temperature"]).softmax(-1)
                        token = int(torch.multinomial(probabilities, 1, generator=generator))
                    else:
                        token = int(logits.argmax())
                    ids.append(token)
                    logprobs.append(float(logits.log_softmax(-1)[token]))
                    if token == self.tokenizer.eos_token_id:
                        break
                text = self.tokenizer.decode(ids[len(body["prompt"]) :], skip_special_tokens=True)
                for stop in body.get("stop", []):
                    text = text.split(stop)[0]
                choices.append({"index": index, "text": text, "logprobs": {"token_logprobs": logprobs}})
        return {"object": "text_completion", "choices": choices}


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
            served.headers.append(dict(self.headers))
            status = served.failures.pop(0) if served.failures else 200
            served.busy += 1
            served.most = max(served.most, served.busy)
        try:
            if status == 0:
                self.close_connection = True
            elif status != 200:
                self._answer(status, {"error": {"message": "not\nnow"}})
            else:
                self._answer(200, served.spoil(served.complete(body)))
        finally:
            with served._counting:
                served.busy -= 1

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
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
