"""The example that serves OpenAI-style routes: 200 requests, and clients that go away."""

from __future__ import annotations

import http.client
import importlib.util
import json
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toy_models import TEMPLATE, compiled, tokenizer

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

EXAMPLE = Path(__file__).parents[2] / "examples" / "http_server.py"
WORDS = tokenizer(TEMPLATE)
PROMPTS = [f"{number}: {'abcdefgh'[number % 8] * (1 + number % 5)}" for number in range(20)]
GREEDY = {"temperature": 0, "max_tokens": 4}


class Recorded:
    """The compiled model, and how long each answer became."""

    def __init__(self, model: Any) -> None:
        self.model, self.lengths = model, []
        self.config, self.device = model.config, model.device
        self.generation_config = model.generation_config

    def generate(self, ids: torch.Tensor, **options: Any) -> Any:
        output = self.model.generate(ids, **options)
        self.lengths.append(output.shape[1] - ids.shape[1])
        return output


class Client:
    """Asks over a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def open(self, route: str, body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/v1/{route}", json.dumps(body), headers)
        return connection, connection.getresponse()

    def ask(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        connection, response = self.open(route, body)
        try:
            text = response.read().decode()
        finally:
            connection.close()
        if not body.get("stream") or response.status != 200:
            return response.status, json.loads(text)
        *events, last, rest = text.split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return response.status, [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def serving(model: Any, **options: Any) -> Iterator[Client]:
    spec = importlib.util.spec_from_file_location("examples_http_server", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example  # where pydantic looks types up
    spec.loader.exec_module(example)
    app = example.create_app(model, WORDS, "tiny", **options)
    listening = socket.create_server(("127.0.0.1", 0))  # clients wait there until it serves
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Client(listening.getsockname()[1])
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Client, Recorded]]:
    with compiled().using("0.ffn") as fast:
        model = Recorded(fast)
        with serving(model) as client:
            yield client, model


def direct(fast: Any, ids: list[int]) -> str:
    """What the model says when it is called at once."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        output = fast.generate(tokens, max_new_tokens=4, do_sample=False)
    text: str = WORDS.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text


def said(route: str, answer: Any) -> str:
    if isinstance(answer, list):
        choices = [event["choices"][0] for event in answer]
        reasons = [choice["finish_reason"] for choice in choices]
        assert not any(reasons[:-1])
        assert reasons[-1] in ("stop", "length")
        texts = (c["text"] if route == "completions" else c["delta"]["content"] for c in choices)
        return "".join(texts)
    choice = answer["choices"][0]
    text: str = choice["text"] if route == "completions" else choice["message"]["content"]
    return text


def test_nothing_is_lost_and_nothing_mixed_up(served: Any) -> None:
    client, model = served
    expected = {}
    for prompt in PROMPTS:
        expected["completions", prompt] = direct(model.model, WORDS(prompt).input_ids)
        asked = f"<user>{prompt}\n<assistant>"
        ids = WORDS(asked, add_special_tokens=False).input_ids
        expected["chat/completions", prompt] = direct(model.model, ids)
    assert len(set(expected.values())) > 20  # else nothing would show that two were mixed up
    model.lengths.clear()

    def ask(number: int) -> None:
        prompt, streamed = PROMPTS[number % 20], number % 3 == 0
        route = "completions" if number % 2 else "chat/completions"
        messages = {"messages": [{"role": "user", "content": prompt}]}
        body = {"prompt": prompt} if route == "completions" else messages
        status, answer = client.ask(route, {**body, **GREEDY, "stream": streamed})
        assert status == 200
        assert said(route, answer) == expected[route, prompt]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(200)))
    assert len(model.lengths) == 200


def test_a_client_that_goes_away_stops_its_own_request_alone(served: Any) -> None:
    client, model = served
    model.lengths.clear()
    long = {"prompt": "abc", "temperature": 1.5, "seed": 1, "max_tokens": 3000, "stream": True}
    connection, response = client.open("completions", long)
    assert response.readline().startswith(b"data: {")
    response.close()
    connection.close()
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda p: client.ask("completions", {"prompt": p, **GREEDY}), PROMPTS[:4])
        )
    texts = [said("completions", answer) for _, answer in answers]
    assert texts == [direct(model.model, WORDS(p).input_ids) for p in PROMPTS[:4]]
    stopped, *others = model.lengths
    assert stopped < 3000
    assert len(others) == 4


def test_an_error_of_the_model_is_told(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, model = served

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(model, "generate", fails)
    told = {"message": "no room", "type": "server_error", "param": None, "code": None}
    assert client.ask("completions", {"prompt": "a"}) == (500, {"error": told})
    connection, response = client.open("completions", {"prompt": "a", "stream": True})
    assert json.loads(response.read().removeprefix(b"data: ")) == {"error": told}
    connection.close()


def test_more_than_may_wait_are_sent_away(served: Any) -> None:
    with serving(served[1], waiting=0) as client:
        status, answer = client.ask("completions", {"prompt": "a", **GREEDY})
    assert (status, answer["error"]["message"]) == (503, "too many requests wait")


def test_seeds_and_usage(served: Any) -> None:
    client, _ = served
    body = {"prompt": "abc", "temperature": 1.5, "seed": 3, "max_tokens": 8}
    (_, first), (_, second) = (client.ask("completions", body) for _ in range(2))
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == 3
    assert 1 <= first["usage"]["completion_tokens"] <= 8


def test_what_is_refused(served: Any) -> None:
    client, _ = served
    for body, told in (
        ({"prompt": "a", "n": 2}, "n: Extra inputs are not permitted"),
        ({"prompt": "a", "temperature": -1}, "temperature: Input should be greater than or equal"),
        ({"prompt": ""}, "0 tokens and 16 new ones; there is room for 4096"),
        (
            {"prompt": "a", "max_tokens": 5000},
            "1 tokens and 5000 new ones; there is room for 4096",
        ),
    ):
        status, answer = client.ask("completions", body)
        assert status == 400
        assert told in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
    status, answer = client.ask("chat/completions", {"messages": [{"content": "a"}, {}]})
    assert status == 400
    assert answer["error"]["message"] == "messages.0.role: Field required"
