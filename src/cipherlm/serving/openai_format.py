"""The OpenAI API's completions and chat completions: what requests may say, and how replies are laid out.

Follows OpenAI's API reference of the two endpoints. A field that this package cannot honour is refused,
unless it has the value that asks for nothing; nothing is left out in silence.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from cipherlm.serving.completion import FinishReason

MAX_CHOICES = 4
MAX_STOPS = 4
MAX_PROMPTS = 32
COMPLETION_TOKENS = 16
"""What OpenAI generates for a completion request without ``max_tokens``."""

# Fields of the API that are refused, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# Fields that change nothing in a reply.
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
}


class ApiError(Exception):
    """An error in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}`` with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": _TYPES[status], "param": param, "code": code}}


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
}


def _unsupported(field: str, message: str) -> PydanticCustomError:
    # Pydantic knows where the value stands; a field named here is added to that.
    return PydanticCustomError("unsupported", "{message}", {"field": field, "message": message})


class _Body(BaseModel):
    """A JSON object. ``null`` is the same as nothing, as with OpenAI."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _as_prompts(value: Any) -> Any:
    """Return the prompts: texts, or token ids."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not all(isinstance(item, str) or _is_ids(item) for item in prompts):
        raise PydanticCustomError("prompt", "Use a string, a list of strings, token ids, or a list of them")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise PydanticCustomError("prompt", "Use 1 to {most} prompts", {"most": MAX_PROMPTS})
    return prompts


Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(_Body):
    """``stream_options`` of a request."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against those who watch the wire; there is no wire on the loopback, and none is sent."""


class GenerationRequest(_Body):
    """What both endpoints take. ``top_k`` is this package's addition; 0 draws from the whole vocabulary."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name in _UNSUPPORTED and value is not None:
                neutral = _UNSUPPORTED[name]
                if not any(type(value) is type(other) and value == other for other in neutral):
                    raise _unsupported(name, f"'{name}' is not supported")
        return {key: value for key, value in data.items() if key not in _UNSUPPORTED and key not in _IGNORED}

    @model_validator(mode="after")
    def _stream_options_with_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _unsupported("stream_options", "'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``. Without a prompt the text begins anew."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)] = [""]
    echo: bool = False


class Message(_Body):
    """One message of a chat, its content one text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None
    """Who speaks, where several share a role. Taken and not used: the templates have no place for it."""

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """Join parts of text, refuse what is no text, and drop what replies carry and requests repeat."""
        if not isinstance(data, dict):
            return data
        if data.get("role") in ("tool", "function"):
            raise _unsupported("role", f"messages with the role '{data['role']}' are not supported")
        for name in ("audio", "function_call", "tool_calls"):
            if data.get(name):
                raise _unsupported(name, f"'{name}' is not supported")
        plain = {key: data[key] for key in data if key in cls.model_fields or data[key] not in (None, [])}
        content = plain.get("content")
        if isinstance(content, list):
            for number, part in enumerate(content):
                if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                    kind = part.get("type") if isinstance(part, dict) else None
                    raise _unsupported(
                        f"content.{number}", f"content of the type {str(kind)!r} is not supported, only text"
                    )
            plain["content"] = "".join(part["text"] for part in content)
        return plain


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None:
                raise _unsupported(
                    "max_tokens", "'max_tokens' and 'max_completion_tokens' are the same limit"
                )
            self.max_tokens = self.max_completion_tokens
        return self


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """Return a request from its JSON text. Raises :class:`ApiError` (400) that names the field."""
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False).encode()  # "\\ud800" is JSON, and no text
    except (ValueError, RecursionError):  # what is not Unicode is a ValueError too
        raise ApiError(400, "The body of the request is not valid JSON.") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body of the request is not a JSON object.")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _validation_error(error) from None


def _validation_error(error: ValidationError) -> ApiError:
    """Return the first thing that is wrong. Says where and why, and does not repeat the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    context = first.get("ctx", {})
    where = ".".join(str(part) for part in (*first["loc"], context.get("field")) if part is not None)
    kind = first["type"]
    if kind == "unsupported":
        return ApiError(400, f"{context['message']}.", param=where, code="unsupported_parameter")
    if kind == "missing":
        message, code = f"Missing required parameter: '{where}'.", "missing_required_parameter"
    elif kind == "extra_forbidden":
        message, code = f"Unknown parameter: '{where}'.", "unknown_parameter"
    else:
        message, code = f"Invalid value for '{where}': {first['msg']}.", "invalid_value"
    return ApiError(400, message, param=where or None, code=code)


@dataclass
class Choice:
    """One finished text."""

    index: int
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class Usage:
    """Tokens of all prompts, and of all choices."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, int]:
        """Return OpenAI's ``usage``."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass
class Reply:
    """The layout of one reply of ``/v1/completions``, whole or in chunks."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return the reply to a request that does not stream."""
        listed = [
            {
                "index": choice.index,
                **self._content(choice.text),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._head(self.object), "choices": listed, "usage": usage.as_json()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice, if there is one."""
        return None

    def chunk(self, index: int, text: str, finish_reason: FinishReason | None = None) -> dict[str, Any]:
        """Return one chunk of a choice; the one with a finish reason ends it."""
        return self._chunk(index, {"text": text}, finish_reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the last chunk, if usage was asked for."""
        return {**self._head(self.chunk_object), "choices": [], "usage": usage.as_json()}

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _chunk(
        self, index: int, content: Mapping[str, Any], finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head(self.chunk_object), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass
class ChatReply(Reply):
    """The layout of one reply of ``/v1/chat/completions``."""

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """Return the chunk that says who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(index, {"delta": delta}, None)

    def chunk(self, index: int, text: str, finish_reason: FinishReason | None = None) -> dict[str, Any]:
        """Return one chunk of a choice; the one with a finish reason ends it."""
        return self._chunk(index, {"delta": {"content": text} if text else {}}, finish_reason)

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


def server_sent_event(data: Any) -> str:
    """Return one event of a stream, on one line as OpenAI sends it."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


LAST_EVENT = "data: [DONE]\n\n"
