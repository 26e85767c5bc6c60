"""OpenAI-style routes over one compiled model, for those who do not need an engine.

pip install fastapi uvicorn
python examples/http_server.py MODEL --plan plan.json --port 8000

Requests wait in a queue and are answered one after another; each streams its tokens as they come.
A client that goes away stops its own request. What is not understood is refused, not ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from typing_extensions import TypedDict

import adaskip_fx


class Message(TypedDict):
    role: str
    content: str


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str = ""
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stream: bool = False


class Completion(Options):
    prompt: str


class Chat(Options):
    messages: list[Message]


class Job(BaseStreamer, StoppingCriteria):
    """One request: ``generate`` streams tokens to it, and asks it whether anybody still listens."""

    def __init__(self, ids: list[int], options: Options) -> None:
        self.ids, self.options = ids, options
        self.loop, self.out = asyncio.get_running_loop(), asyncio.Queue()
        self.left, self.begun = threading.Event(), False

    def tell(self, item: int | Exception | None) -> None:
        self.loop.call_soon_threadsafe(self.out.put_nowait, item)

    def put(self, value: torch.Tensor) -> None:
        if self.begun:  # the prompt comes first
            self.tell(int(value))
        self.begun = True

    def end(self) -> None: ...

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)

    async def tokens(self, request: Request) -> AsyncIterator[int]:
        try:
            while True:
                try:
                    item = await asyncio.wait_for(self.out.get(), timeout=0.5)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise HTTPException(500, str(item))
                yield item
        finally:
            self.left.set()


def run(model: Any, job: Job) -> None:
    asked, ids = job.options, torch.tensor([job.ids], device=model.device)
    options = {"max_new_tokens": asked.max_tokens, "do_sample": asked.temperature > 0}
    if asked.temperature > 0:
        options |= {"temperature": asked.temperature, "top_p": asked.top_p}
    options |= {"attention_mask": torch.ones_like(ids), "stopping_criteria": [job]}
    try:
        if asked.seed is not None:
            torch.manual_seed(asked.seed)
        with torch.no_grad():
            if not job.left.is_set():  # its client may have left while it waited
                model.generate(ids, streamer=job, **options)
        job.tell(None)
    except Exception as error:
        job.tell(error)


def error(status: int, message: str) -> dict:
    """Return an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def create_app(model: Any, tokenizer: Any, name: str, waiting: int = 256) -> FastAPI:
    """Return the application; `waiting` requests may be in the queue at once."""
    app, worker, room = FastAPI(), ThreadPoolExecutor(1), threading.Semaphore(waiting)
    most = getattr(model.config, "max_position_embeddings", None) or float("inf")
    last = model.generation_config.eos_token_id
    ends = last if isinstance(last, list) else [last]

    async def answer(ids: list[int], options: Options, request: Request, chat: bool) -> Any:
        if not 0 < len(ids) <= most - options.max_tokens:
            told = f"{len(ids)} tokens and {options.max_tokens} new ones; there is room for {most}"
            raise HTTPException(400, told)
        if not room.acquire(blocking=False):
            raise HTTPException(503, "too many requests wait")
        job, decoder = Job(ids, options), DecodeStream(skip_special_tokens=True)
        worker.submit(run, model, job).add_done_callback(lambda _: room.release())
        head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": name}
        head["object"] = "chat.completion" if chat else "text_completion"

        def made(text: str, reason: str | None, key: str) -> dict:
            said = {key: {"role": "assistant", "content": text}} if chat else {"text": text}
            return {**head, "choices": [{"index": 0, **said, "finish_reason": reason}]}

        async def events() -> AsyncIterator[str]:
            head["object"] += ".chunk" if chat else ""
            token = None
            try:
                async for token in job.tokens(request):
                    if text := decoder.step(tokenizer.backend_tokenizer, token):
                        yield f"data: {json.dumps(made(text, None, 'delta'))}\n\n"
                last = made("", "stop" if token in ends else "length", "delta")
                yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
            except HTTPException as failed:
                yield f"data: {json.dumps(error(failed.status_code, failed.detail))}\n\n"

        if options.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        tokens = [token async for token in job.tokens(request)]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        reason = "stop" if any(t in ends for t in tokens[-1:]) else "length"
        used = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        return {**made(text, reason, "message"), "usage": used}

    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Any:
        return await answer(tokenizer(body.prompt).input_ids, body, request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: Chat, request: Request) -> Any:
        given = tokenizer.apply_chat_template(body.messages, add_generation_prompt=True)
        return await answer(given.input_ids, body, request, chat=True)

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, failed: Any) -> JSONResponse:
        if isinstance(failed, HTTPException):
            return JSONResponse(error(failed.status_code, failed.detail), failed.status_code)
        (_, *where), told = failed.errors()[0]["loc"], failed.errors()[0]["msg"]
        return JSONResponse(error(400, f"{'.'.join(map(str, where))}: {told}"), 400)

    return app


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--plan", required=True, help="file that adaskip-fx fit wrote")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    fast = adaskip_fx.compile(model, plan=options.plan)
    fast.adaskip.warmup(2048)  # tokens of a request
    uvicorn.run(create_app(fast, tokenizer, options.model), port=options.port)


if __name__ == "__main__":
    main()
