"""An OpenAI-compatible endpoint on the client's own machine.

Any program that speaks OpenAI's HTTP API becomes a private client by changing its base URL to this endpoint:
it sends text here, and only ciphertexts go on to the server. This endpoint sees plaintext and has the
client's keys behind it, so it is for the machine it runs on. It answers no web page: requests must name the
loopback as their host, which stops DNS rebinding, and carry no foreign origin.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cipherlm.models.kept import KeptCache
from cipherlm.serving.auth import Tokens
from cipherlm.serving.completion import Busy, Job, Piece, Prompt, Settings, Stopped, Worker, complete
from cipherlm.serving.errors import ConnectionFailed, RemoteError, ServerError, SessionLost
from cipherlm.serving.hosts import LOOPBACK_HOSTS
from cipherlm.serving.logs import log, log_exception
from cipherlm.serving.openai_format import (
    COMPLETION_TOKENS,
    LAST_EVENT,
    ApiError,
    ChatReply,
    ChatRequest,
    Choice,
    CompletionRequest,
    GenerationRequest,
    Message,
    Reply,
    RequestT,
    Usage,
    parse,
    server_sent_event,
)
from cipherlm.serving.proxy_guard import Guard, error_response

MAX_BODY_BYTES = 4 << 20
KEEP_ALIVE_SECONDS = 15.0
"""How long a stream is silent before a comment tells the program that its request is alive."""

CLIENT_GONE = 499  # nginx's status for a request whose client has left; nobody reads it


def create_proxy(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    api_key: str | None = None,
    allowed_hosts: Collection[str] | None = LOOPBACK_HOSTS,
    waiting: int = 8,
    default_max_tokens: int | None = None,
    context_length: int | None = None,
    reveal_length: bool = False,
    drafts: Mapping[str, Any] | None = None,
) -> FastAPI:
    """Return an ASGI application that serves ``model`` as OpenAI's API does, under the name ``name``.

    ``model`` has the ``generate`` of ``transformers``: it is called with ``input_ids`` (1, tokens) and
    ``attention_mask``, ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``, ``top_k`` (0 is the
    whole vocabulary) and ``stopping_criteria``, on one thread and never twice at once. ``waiting`` more
    requests may wait for their turn; the next is refused with 429. ``seed`` makes a reply reproducible; with
    ``temperature`` 0 all ``n`` choices are the same and are generated once.

    A reply is given when its text ends. A model at a server is then asked on until the limit of tokens is
    reached, so that the server does not learn how long the text is; the next request waits for that. So it
    is behind a request whose client has gone. With ``reveal_length``, nothing is asked behind the end of a
    text, and a request whose client has gone ends after its current token. ``drafts`` are options of
    ``generate`` by which tokens are proposed that are verified together (``assistant_model``,
    ``prompt_lookup_num_tokens``); they go with ``reveal_length`` only.

    Endpoints: ``GET /v1/models``, ``GET /v1/models/{id}``, ``POST /v1/completions`` and
    ``POST /v1/chat/completions``. What cannot be honoured is refused with an error that names the field.

    A chat is laid out by the tokeniser's own template. A tokeniser without one gets a line ``role: content``
    for each message and then ``assistant:``; the reply ends where the model begins a line of another role,
    and the white space before its first word is left out.

    A request without a limit gets ``default_max_tokens``; if that is None, 16 tokens for a completion and
    what the context leaves for a chat. The context is ``context_length`` tokens, or what the model's
    configuration says. With an ``api_key``, requests must carry it as a bearer token. ``allowed_hosts`` are
    the names under which the endpoint may be addressed; None allows all, and then needs an ``api_key``.

    Nothing of a prompt or a reply is logged. ``app.state.close()``, called in the loop that serves, ends all
    replies with an error; :mod:`cipherlm.serving.proxy_run` does it when the process is to end.

    Raises ``ValueError`` for arguments that do not go together.
    """
    if allowed_hosts is None and not api_key:
        raise ValueError("an endpoint that answers to any host needs an API key, as it sees plaintext")
    if drafts and not reveal_length:
        raise ValueError("drafts show a server how many proposals are right: they need reveal_length")
    keys = Tokens([("API key", api_key)] if api_key else [])
    proxy = _Proxy(
        model,
        tokenizer,
        name,
        Worker(waiting),
        default_max_tokens,
        context_length or _context_length(model),
        reveal_length,
        drafts or {},
        int(time.time()),
        # What is no model of transformers has no cache to keep.
        KeptCache(model, getattr(model, "public_prefix", None)) if hasattr(model, "forward") else None,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        proxy.worker.close()

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.close = proxy.worker.close
    app.add_middleware(Guard, keys=keys, allowed_hosts=allowed_hosts)
    app.add_api_route("/v1/models", proxy.models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", proxy.model_card, methods=["GET"])
    app.add_api_route("/v1/completions", proxy.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", proxy.chat, methods=["POST"], response_model=None)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    return app


@dataclass(frozen=True)
class _Proxy:
    """The endpoints."""

    model: Any
    tokenizer: Any
    name: str
    worker: Worker
    default_max_tokens: int | None
    context_length: int
    reveal_length: bool
    drafts: Mapping[str, Any]
    created: int
    kept: KeptCache | None

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model_card(self, model: str) -> dict[str, Any]:
        self._check_name(model)
        return self._card()

    async def completions(self, http: Request) -> Response:
        with _api_errors():
            return await self._completions(http)

    async def chat(self, http: Request) -> Response:
        with _api_errors():
            return await self._chat(http)

    async def _completions(self, http: Request) -> Response:
        request = await self._read(http, CompletionRequest)
        prompts = [self._prompt(prompt, request.echo) for prompt in request.prompt]
        default = COMPLETION_TOKENS if self.default_max_tokens is None else self.default_max_tokens
        settings = self._settings(request, self._max_tokens(request, default, prompts, "prompt"))
        return await self._respond(http, request, Reply(self.name), prompts, settings)

    async def _chat(self, http: Request) -> Response:
        request = await self._read(http, ChatRequest)
        text = _chat_text(self.tokenizer, request.messages)
        prompts = [Prompt(self._encode(text, "messages"))]
        limit = self._max_tokens(request, self.default_max_tokens, prompts, "messages")
        settings = self._settings(request, limit)
        if not self.tokenizer.chat_template:
            settings = replace(settings, strip=True, stop=[*settings.stop, *_OTHER_ROLES])
        prefix = list(getattr(self.model, "prefix", ()))
        # A prefix that the model puts before a text would be in the cache, and not in the text.
        kept = self.kept if list(prompts[0].ids[: len(prefix)]) == prefix else None
        return await self._respond(http, request, ChatReply(self.name), prompts, settings, kept)

    async def _read(self, http: Request, kind: type[RequestT]) -> RequestT:
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, f"The body of the request is over {MAX_BODY_BYTES} bytes.")
        request = parse(kind, bytes(body))
        self._check_name(request.model)
        return request

    def _check_name(self, model: str) -> None:
        if model != self.name:
            raise ApiError(
                404,
                f"The model '{model}' does not exist; this endpoint has '{self.name}'.",
                param="model",
                code="model_not_found",
            )

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "cipherlm"}

    def _prompt(self, prompt: str | list[int], echo: bool) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(self._encode(prompt, "prompt"), prompt if echo else "")
        if not all(0 <= token < len(self.tokenizer) for token in prompt):
            raise ApiError(
                400,
                f"Invalid value for 'prompt': token ids are from 0 to {len(self.tokenizer) - 1}.",
                param="prompt",
                code="invalid_value",
            )
        return Prompt(prompt, str(self.tokenizer.decode(prompt)) if echo else "")

    def _encode(self, text: str, param: str) -> list[int]:
        # A chat template writes the special tokens itself.
        special = param == "prompt"
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if not ids and self.tokenizer.bos_token_id is None:
            raise ApiError(400, f"'{param}' is empty, and this model cannot begin a text.", param=param)
        return ids or [self.tokenizer.bos_token_id]

    def _max_tokens(
        self, request: GenerationRequest, default: int | None, prompts: Sequence[Prompt], param: str
    ) -> int:
        """Return how many tokens to generate: what was asked for, or what the context has room for."""
        longest = max(map(getattr(self.model, "context_tokens", len), (prompt.ids for prompt in prompts)))
        room = self.context_length - longest
        tokens = request.max_tokens
        if tokens is None:
            tokens = max(1, room if default is None else min(default, room))
        if tokens > room:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context_length} tokens. You asked for "
                f"{longest + tokens} ({longest} in the {param}, {tokens} in the completion). Please reduce "
                f"the length of the {param} or of the completion.",
                param=param,
                code="context_length_exceeded",
            )
        return tokens

    def _settings(self, request: GenerationRequest, max_tokens: int) -> Settings:
        return Settings(
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop=request.stop,
            choices=request.n,
            reveal_length=self.reveal_length,
            drafts=self.drafts,
        )

    async def _respond(
        self,
        http: Request,
        request: GenerationRequest,
        reply: Reply,
        prompts: Sequence[Prompt],
        settings: Settings,
        kept: KeptCache | None = None,
    ) -> Response:
        """Generate, and answer with a whole reply or with a stream."""
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        try:
            job = Job(
                self.worker, lambda job: complete(self.model, self.tokenizer, prompts, settings, job, kept)
            )
        except Busy:
            raise ApiError(
                429,
                "Too many requests wait for this model already. Try again later.",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        # A whole reply is waited for as long as it takes. A stream begins soon, but a first piece that comes
        # sooner may be an error, which then has its own status.
        answer: asyncio.Task[Any] = asyncio.ensure_future(
            job.next() if request.stream else _whole(job, reply, prompt_tokens)
        )
        gone = asyncio.ensure_future(_gone(http))
        try:
            timeout = KEEP_ALIVE_SECONDS if request.stream else None
            await asyncio.wait({answer, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
            elif gone.done():
                raise ClientDisconnect
        except BaseException:
            job.cancel()
            answer.cancel()
            raise
        finally:
            gone.cancel()
        if not request.stream:
            return JSONResponse(answer.result())
        return _EventStream(job, _events(job, answer, reply, prompt_tokens, request.include_usage))


def _context_length(model: Any) -> int:
    for name in ("max_position_embeddings", "n_positions"):
        length = getattr(model.config, name, None)
        if length is not None:
            return int(length)
    raise ValueError("the model's configuration does not say how long its context is: give context_length")


_OTHER_ROLES = ("\nuser:", "\nsystem:", "\nassistant:")


def _chat_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Return a chat as the text that the model continues."""
    # "developer" is the later name for "system", which templates know.
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    if not tokenizer.chat_template:
        lines = [f"{role}: {message.content}\n" for role, message in zip(roles, messages, strict=True)]
        return "".join(lines) + "assistant:"
    chat = [{"role": role, "content": message.content} for role, message in zip(roles, messages, strict=True)]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises what it likes about roles it does not know
        log_exception("chat template refused", error)
        raise ApiError(
            400, "The model's chat template does not take these messages.", param="messages"
        ) from None


async def _gone(http: Request) -> None:
    """Return when the client has closed its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _whole(job: Job, reply: Reply, prompt_tokens: int) -> dict[str, Any]:
    start = time.perf_counter()
    choices: dict[int, Choice] = {}
    tokens = 0
    while (piece := await job.next()) is not None:
        choice = choices.setdefault(piece.choice, Choice(piece.choice, "", "length"))
        choice.text += piece.text
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
            tokens += piece.tokens
    _log_done(reply, prompt_tokens, tokens, start)
    return reply.whole([choices[index] for index in sorted(choices)], Usage(prompt_tokens, tokens))


async def _events(
    job: Job,
    pending: "asyncio.Task[Piece | None]",
    reply: Reply,
    prompt_tokens: int,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield server-sent events. An error in midstream is an event of its own, and the last."""
    start = time.perf_counter()
    extra = {"usage": None} if include_usage else {}
    opened: set[int] = set()
    tokens = 0
    while True:
        done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
        if not done:
            yield ": keep-alive\n\n"
            continue
        try:
            piece = pending.result()
        except Exception as error:
            yield server_sent_event(_as_api_error(error).body)
            return
        if piece is None:
            break
        if piece.choice not in opened:
            opened.add(piece.choice)
            if opening := reply.opening(piece.choice):
                yield server_sent_event({**opening, **extra})
        if piece.text:
            yield server_sent_event({**reply.chunk(piece.choice, piece.text), **extra})
        if piece.finish_reason is not None:
            tokens += piece.tokens
            yield server_sent_event({**reply.chunk(piece.choice, "", piece.finish_reason), **extra})
        pending = asyncio.ensure_future(job.next())
    if include_usage:
        yield server_sent_event(reply.usage_chunk(Usage(prompt_tokens, tokens)))
    yield LAST_EVENT
    _log_done(reply, prompt_tokens, tokens, start)


class _EventStream(StreamingResponse):
    """A stream of events that cancels its job when it ends, however it ends."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


def _log_done(reply: Reply, prompt_tokens: int, tokens: int, start: float) -> None:
    seconds = round(time.perf_counter() - start, 3)
    log(reply.object, prompt_tokens=prompt_tokens, completion_tokens=tokens, seconds=seconds)


@contextmanager
def _api_errors() -> Iterator[None]:
    """Turn whatever is raised into an error in OpenAI's form."""
    try:
        yield
    except (ApiError, ClientDisconnect):
        raise
    except Exception as error:
        raise _as_api_error(error) from None


def _as_api_error(error: Exception) -> ApiError:
    """Return what a program is told. Texts of unforeseen errors stay out of it and out of the log.

    What the server says about itself is passed on: those texts hold nothing of a prompt.
    """
    if isinstance(error, Stopped):
        log("generation stopped")
        return ApiError(503, "This endpoint is shutting down.", code="shutting_down")
    reference = log_exception("generation failed", error)
    if isinstance(error, RemoteError):
        for_now = isinstance(error, (ConnectionFailed, SessionLost))
        if isinstance(error, ServerError):
            for_now = error.retry
            if error.retry_after is not None:
                headers = {"Retry-After": str(error.retry_after)}
                return ApiError(
                    429, f"The encrypted model's server: {error}", code=error.code, headers=headers
                )
        code = error.code if isinstance(error, ServerError) else None
        return _remote_error(f"The encrypted model's server: {error}", code, for_now=for_now)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return _remote_error("The encrypted model's server cannot be reached.", None, for_now=True)
    message = f"The generation failed; the log has more under the reference {reference}."
    return ApiError(500, message, code="internal_error")


def _remote_error(message: str, code: str | None, *, for_now: bool) -> ApiError:
    if for_now:
        return ApiError(503, message, code=code or "server_unavailable", headers={"Retry-After": "5"})
    return ApiError(502, message, code=code or "server_failed")
