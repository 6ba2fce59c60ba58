"""The OpenAI-compatible endpoint, through OpenAI's own client, before the embedded model in the clear."""

import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import trustme
import uvicorn
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from cipherlm import load_model, load_tokenizer
from cipherlm.cli import CommandError, main
from cipherlm.cli import proxy as verb
from cipherlm.serving import proxy as proxy_module
from cipherlm.serving.completion import Job, Text
from cipherlm.serving.errors import ConnectionFailed, ServerError
from cipherlm.serving.proxy import create_proxy
from cipherlm.serving.proxy_run import ProxyServer

PROMPT = "The old man looked at the"


@contextmanager
def served(model, tokenizer, **options) -> Iterator[str]:
    """Serve on a free port of the loopback, and yield the base URL."""
    server = ProxyServer(create_proxy(model, tokenizer, name="tiny", **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def openai_client(url: str, **options) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": url, "api_key": "unused", "max_retries": 0, "timeout": 30, **options})


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def url(model, tokenizer):
    with served(model, tokenizer) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai_client(url) as client:
        yield client


@pytest.fixture(scope="module")
def greedy(model, tokenizer):
    """The greedy continuation of the prompt, as transformers has it: text of 12 tokens."""
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(generated[0, ids.shape[1] :])


class Stepwise:
    """A model whose every token waits for a permit, and which says how far it is."""

    def __init__(self, model):
        self._model = model
        self.config = model.config
        self.permits = threading.Semaphore(0)
        self.running = threading.Event()
        self.tokens = 0

    def generate(self, ids, *, stopping_criteria, **options):
        class Wait(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                model.tokens += 1
                assert model.permits.acquire(timeout=20)
                return torch.tensor([False])

        model = self
        self.running.set()
        try:
            criteria = StoppingCriteriaList([Wait(), *stopping_criteria])  # a reply is given when it is heard
            return self._model.generate(ids, stopping_criteria=criteria, **options)
        finally:
            self.running.clear()


class Failing:
    """A model that fails, after some tokens if it is told to."""

    def __init__(self, model, error, after=0):
        self.config = model.config
        self._model, self._error, self._after = model, error, after

    def generate(self, ids, *, max_new_tokens, **options):
        if self._after:
            self._model.generate(ids, max_new_tokens=self._after, **options)
        raise self._error


def eventually(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def error_of(response: httpx.Response) -> dict:
    """Return the error of a response, which must have OpenAI's form."""
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


# Models


def test_models(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("tiny", "model", "cipherlm")
    assert client.models.retrieve("tiny") == listed


def test_no_such_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("owner/other")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])


def test_no_such_path_or_method(url):
    assert "Not Found" in error_of(httpx.get(url + "/nothing"))["message"]
    response = httpx.get(url + "/completions")
    assert response.status_code == 405
    assert error_of(response)["type"] == "invalid_request_error"
    for page in ("docs", "redoc", "openapi.json"):
        assert httpx.get(url.replace("v1", page)).status_code == 404


# Completions


def test_completion_is_the_model_s(client, tokenizer, greedy):
    completion = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    (choice,) = completion.choices
    assert choice.text == greedy
    assert choice.finish_reason == "length"
    assert completion.object == "text_completion"
    assert completion.model == "tiny"
    assert abs(completion.created - time.time()) < 600
    prompt_tokens = len(tokenizer(PROMPT)["input_ids"])
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, 12)
    assert usage.total_tokens == prompt_tokens + 12


def test_completion_has_16_tokens_by_default(client):
    completion = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    assert completion.usage.completion_tokens == 16


def test_completion_streamed(client, greedy):
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stream=True, extra_body={"user": "me"}
    )
    chunks = list(stream)
    assert len(chunks) > 6
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_on_the_wire(url):
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = httpx.post(url + "/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_several_prompts_and_token_ids(client, tokenizer, greedy):
    ids = tokenizer(PROMPT)["input_ids"]
    other = tokenizer("Once upon a")["input_ids"]
    for prompt in ([PROMPT, "Once upon a"], [ids, other]):
        completion = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, n=2)
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in completion.choices]
        assert texts[0] == texts[1] == greedy
        assert texts[2] == texts[3] != greedy
        assert completion.usage.prompt_tokens == len(ids) + len(other)
        assert completion.usage.completion_tokens == 4 * 12
    completion = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0)
    assert completion.choices[0].text == greedy


def test_echo(client, tokenizer, greedy):
    settings = {"model": "tiny", "max_tokens": 12, "temperature": 0, "echo": True}
    for prompt in (PROMPT, tokenizer(PROMPT)["input_ids"]):
        assert client.completions.create(prompt=prompt, **settings).choices[0].text == PROMPT + greedy
    chunks = client.completions.create(prompt=PROMPT, stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + greedy
    nothing = client.completions.create(prompt=PROMPT, **{**settings, "max_tokens": 0})
    assert nothing.choices[0].text == PROMPT
    assert nothing.usage.completion_tokens == 0


def test_empty_prompt_begins_a_text(client):
    completion = client.completions.create(model="tiny", prompt="", max_tokens=2, temperature=0)
    assert completion.usage.prompt_tokens == 1
    assert completion.choices[0].text


# Choosing tokens


def test_seed_makes_a_reply_reproducible(client):
    def texts(seed, **options):
        completion = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=12, n=3, seed=seed, **options
        )
        return [choice.text for choice in completion.choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) == 3
    stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, n=3, seed=1, stream=True)
    streamed = ["", "", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts(1)


def test_sampling_settings_reach_the_model(client, greedy, tokenizer):
    settings = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 3}
    for narrow in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"temperature": 1e-4}):
        assert client.completions.create(**settings, **narrow).choices[0].text == greedy
    assert client.completions.create(**settings).choices[0].text != greedy


def test_drawing_is_from_the_whole_vocabulary(model, tokenizer):
    heard = {}

    def generate(ids, **options):
        heard.update(options)
        return model.generate(ids, **options)

    spy = SimpleNamespace(config=model.config, generate=generate)
    with served(spy, tokenizer) as url, openai_client(url) as client:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1)
    assert (heard["do_sample"], heard["temperature"], heard["top_p"], heard["top_k"]) == (True, 1, 1, 0)


def test_proposals(model, tokenizer):
    heard = {}

    def generate(ids, **options):
        heard.update(options)
        options.pop("reveal_length")
        return model.generate(ids, **options)

    spy = SimpleNamespace(config=model.config, generate=generate)
    with pytest.raises(ValueError, match="need reveal_length"):
        create_proxy(spy, tokenizer, name="tiny", drafts={"prompt_lookup_num_tokens": 3})
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    with served(model, tokenizer) as url, openai_client(url) as client:
        plain = client.completions.create(**asked)
    with (
        served(spy, tokenizer, drafts={"prompt_lookup_num_tokens": 3}, reveal_length=True) as url,
        openai_client(url) as client,
    ):
        proposed = client.completions.create(**asked)
    assert heard["prompt_lookup_num_tokens"] == 3
    assert proposed.choices[0].text == plain.choices[0].text
    assert proposed.usage.completion_tokens == plain.usage.completion_tokens


def test_equal_choices_are_generated_once(model, tokenizer):
    runs = []

    def generate(ids, **options):
        runs.append(options["max_new_tokens"])
        return model.generate(ids, **options)

    spy = SimpleNamespace(config=model.config, generate=generate)
    with served(spy, tokenizer) as url, openai_client(url) as client:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, n=3, temperature=0)
        assert runs == [2]
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, n=3)
        assert runs == [2] * 4


def test_a_seed_leaves_the_process_s_draws_alone(client):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, seed=5)
    # A reply may come before its generation is over; the next request's turn is behind that.
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, temperature=0)
    assert torch.rand(1) == expected


# Stopping


def test_stop(client, greedy):
    stop = greedy[10:14]
    for given in (stop, ["never in it", stop]):
        settings = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": given}
        completion = client.completions.create(**settings)
        assert completion.choices[0].text == greedy[: greedy.index(stop)]
        assert completion.choices[0].finish_reason == "stop"
        assert completion.usage.completion_tokens < 12
        chunks = list(client.completions.create(stream=True, **settings))
        assert "".join(chunk.choices[0].text for chunk in chunks) == completion.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_end_of_text_is_a_stop(model, tokenizer, greedy):
    class Ending:
        config = model.config

        def generate(self, ids, *, stopping_criteria, **_):
            for token in tokenizer(" yes")["input_ids"] + [0, 5]:
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
                stopping_criteria(ids, None)  # one step too far, as transformers does on some devices
            return ids

    with served(Ending(), tokenizer) as url, openai_client(url) as client:
        completion = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=50)
    assert completion.choices[0].text == " yes"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == len(tokenizer(" yes")["input_ids"]) + 1


@pytest.mark.parametrize(
    "stop", [(), ("c\u00f4t",), ("na\u00efve!!", "zz"), ("\U0001f600",), ("b", "abx"), (" ",)]
)
def test_text_by_tokens_is_the_text(tokenizer, stop):
    """Bytes of half a character and beginnings of stop sequences are held back, and nothing is lost."""
    whole = "na\u00efve c\u00f4t\u00e9 \u4e2d\u6587 \U0001f600 ab ab\ufffd"
    ids = tokenizer(whole)["input_ids"]
    text = Text(tokenizer.decode, stop)
    pieces = [text.add([token]) for token in ids]
    pieces.append(text.end())
    cut = min((whole.index(item) for item in stop if item in whole), default=len(whole))
    assert "".join(pieces) == whole[:cut]
    assert text.finished == (cut < len(whole))
    before = ""
    for piece in pieces:  # nothing is given out that a later token takes back
        before += piece
        assert whole.startswith(before)


# Chat


def test_chat(client, tokenizer):
    chat = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Tell stories."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Once"}, {"type": "text", "text": " more."}],
            },
        ],
        max_completion_tokens=8,
        temperature=0,
    )
    laid_out = "system: Tell stories.\nuser: Once more.\nassistant:"
    assert chat.usage.prompt_tokens == len(tokenizer(laid_out)["input_ids"])
    completion = client.completions.create(
        model="tiny", prompt=laid_out, max_tokens=8, temperature=0, stop=["\nuser:"]
    )
    (choice,) = chat.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == completion.choices[0].text.lstrip()
    assert choice.finish_reason == completion.choices[0].finish_reason
    assert chat.object == "chat.completion"
    # A reply goes back as it came.
    client.chat.completions.create(
        model="tiny", messages=[choice.message, {"role": "user", "content": "On."}], max_tokens=1
    )


def test_chat_streamed(client):
    settings = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Once"}],
        "max_tokens": 8,
        "seed": 4,
        "n": 2,
    }
    whole = client.chat.completions.create(**settings)
    *chunks, last = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **settings
    )
    for index in (0, 1):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert choices[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in choices[1:])
        text = "".join(choice.delta.content or "" for choice in choices)
        assert text == whole.choices[index].message.content
        assert choices[-1].finish_reason == whole.choices[index].finish_reason
    assert last.choices == []
    assert last.usage == whole.usage


def test_chat_without_a_limit_fills_the_context(model, tokenizer):
    with served(model, tokenizer, context_length=24) as url, openai_client(url) as client:
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Once"}], temperature=0
        )
        assert chat.choices[0].finish_reason == "stop" or chat.usage.total_tokens == 24
    # A default gives way to the context; what was asked for does not.
    options = {"default_max_tokens": 64, "context_length": 24}
    with served(model, tokenizer, **options) as url, openai_client(url) as client:
        assert client.completions.create(model="tiny", prompt=PROMPT).usage.total_tokens <= 24
        with pytest.raises(openai.BadRequestError, match="maximum context length is 24"):
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=64)
    with served(model, tokenizer, default_max_tokens=2) as url, openai_client(url) as client:
        chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Once"}])
        assert chat.usage.completion_tokens <= 2


def test_chat_with_the_tokeniser_s_template(model):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}> {{ m.content }}{% endfor %}<reply>"
    )
    with served(model, tokenizer) as url, openai_client(url) as client:
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Once"}], max_tokens=1
        )
        assert chat.usage.prompt_tokens == len(tokenizer("<user> Once<reply>")["input_ids"])
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "assistant", "content": "Once"}], max_tokens=1
            )
        assert caught.value.param == "messages"


# What is refused

COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"logprobs": 2}, "logprobs", "unsupported_parameter"),
        ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 10}}, "logit_bias", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "unsupported_parameter"),
        ({"repetition_penalty": 2}, "repetition_penalty", "unknown_parameter"),
        ({"n": 5}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop.0", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"prompt": 5}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 33}, "prompt", "invalid_value"),
        ({"prompt": ["x", 5]}, "prompt", "invalid_value"),
        ({"prompt": [4096]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": "word " * 300}, "prompt", "context_length_exceeded"),
        ({"max_tokens": 256}, "prompt", "context_length_exceeded"),
        ({"model": None}, "model", "missing_required_parameter"),
    ],
)
def test_refused_completions(url, changes, param, code):
    body = json.dumps({**COMPLETION, **changes})
    response = httpx.post(url + "/completions", content=body)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"].removesuffix(".0.str"), error["code"]) == (param, code)
    assert param.split(".")[0] in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "auto"}, "tool_choice", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"prompt": "x"}, "prompt", "unknown_parameter"),
        ({"echo": True}, "echo", "unknown_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 3}, "max_tokens", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "unsupported_parameter"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 300}]},
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_refused_chats(client, changes, param, code):
    body = {**CHAT, **changes}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_what_asks_for_nothing_is_taken(client):
    client.completions.create(
        **COMPLETION,
        logprobs=None,
        suffix=None,
        best_of=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        stop=None,
    )
    client.chat.completions.create(
        **CHAT, logprobs=False, tools=[], response_format={"type": "text"}, logit_bias={}, metadata={"a": "b"}
    )


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"x"'])
def test_what_is_no_json_object(url, body):
    response = httpx.post(url + "/completions", content=body)
    assert response.status_code == 400
    assert "JSON" in error_of(response)["message"]


def test_text_that_is_no_unicode(url):
    response = httpx.post(url + "/completions", content=b'{"model": "tiny", "prompt": "\\ud800"}')
    assert response.status_code == 400
    error_of(response)


def test_a_body_has_a_limit(url, monkeypatch):
    monkeypatch.setattr(proxy_module, "MAX_BODY_BYTES", 1000)
    response = httpx.post(url + "/completions", json={**COMPLETION, "user": "x" * 1000})
    assert response.status_code == 413
    error_of(response)


# One at a time


@pytest.fixture
def cancelled(monkeypatch):
    """An event that is set when a job has been cancelled."""
    event = threading.Event()
    cancel = Job.cancel

    def spy(job):
        cancel(job)
        event.set()

    monkeypatch.setattr(Job, "cancel", spy)
    return event


def test_disconnect_in_midstream_frees_the_model(model, tokenizer, cancelled):
    slow = Stepwise(model)
    with served(slow, tokenizer) as url, openai_client(url) as client:
        slow.permits.release(3)
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True)
        next(iter(stream))
        eventually(lambda: slow.tokens == 4)
        stream.close()
        # The token that runs cannot be taken back; the next is not begun.
        waiter = httpx.Client(base_url=url, timeout=30)
        assert cancelled.wait(20)
        slow.permits.release(2)
        eventually(lambda: not slow.running.is_set())
        assert slow.tokens == 4
        slow.permits.release(1)
        assert waiter.post("/completions", json=COMPLETION).status_code == 200
        waiter.close()


def test_disconnect_without_a_stream_frees_the_model(model, tokenizer, cancelled):
    slow = Stepwise(model)
    with served(slow, tokenizer) as url, openai_client(url, timeout=0.5) as client:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200)
        assert cancelled.wait(20)
        slow.permits.release(2)
        eventually(lambda: not slow.running.is_set())
        assert slow.tokens <= 2


def test_the_queue_is_bounded_and_in_order(model, tokenizer):
    slow = Stepwise(model)
    with served(slow, tokenizer, waiting=1) as url, openai_client(url) as client:
        replies = []

        def ask(prompt):
            replies.append((prompt, client.completions.create(**{**COMPLETION, "prompt": prompt})))

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("one", "two")]
        threads[0].start()
        eventually(slow.running.is_set)
        threads[1].start()
        # The third is refused as soon as the second waits.
        refused = []

        def third_is_refused():
            try:
                with openai_client(url, timeout=0.2) as impatient:
                    impatient.completions.create(**COMPLETION)
            except openai.RateLimitError as error:
                refused.append(error)
            except openai.APITimeoutError:
                pass
            return refused

        eventually(third_is_refused)
        assert refused[0].code == "queue_full"
        assert refused[0].response.headers["retry-after"]
        assert slow.tokens == 1
        assert replies == []
        slow.permits.release(10)
        for thread in threads:
            thread.join(20)
        assert sorted(prompt for prompt, _ in replies) == ["one", "two"]
        client.completions.create(**COMPLETION)  # the places are free again


def test_who_waits_and_leaves_gives_its_place_back(model, tokenizer, cancelled):
    slow = Stepwise(model)
    with served(slow, tokenizer, waiting=1) as url, openai_client(url) as client:
        thread = threading.Thread(target=lambda: client.completions.create(**COMPLETION))
        thread.start()
        eventually(slow.running.is_set)
        for _ in range(3):
            with openai_client(url, timeout=0.3) as impatient, pytest.raises(openai.APITimeoutError):
                impatient.completions.create(**COMPLETION)
            assert cancelled.wait(20)
            cancelled.clear()
        slow.permits.release(10)
        thread.join(20)
        eventually(lambda: not slow.running.is_set())
        assert slow.tokens == 1  # none of those who left was begun


def test_a_silent_stream_is_kept_alive(model, tokenizer, monkeypatch):
    monkeypatch.setattr(proxy_module, "KEEP_ALIVE_SECONDS", 0.05)
    slow = Stepwise(model)
    body = {**COMPLETION, "max_tokens": 2, "stream": True}
    with served(slow, tokenizer) as url, httpx.stream("POST", url + "/completions", json=body) as response:
        lines = response.iter_lines()
        assert any(line.startswith(":") for line in lines)
        slow.permits.release(2)
        data = [line for line in lines if line.startswith("data:")]
    assert data[-1] == "data: [DONE]"


# Failures

RETRY = {503: "5"}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ConnectionFailed("no server at https://there"), 503, "server_unavailable"),
        (ConnectionRefusedError("refused"), 503, "server_unavailable"),
        (TimeoutError("late"), 503, "server_unavailable"),
        (ServerError("busy", "the queue is full", retry=True), 503, "busy"),
        (ServerError("rate_limited", "you have had 9", retry=True, retry_after=60), 429, "rate_limited"),
        (ServerError("bad_keys", "these are another model's keys"), 502, "bad_keys"),
        (RuntimeError("secret of a prompt"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_server(model, tokenizer, error, status, code, stream, caplog):
    with served(Failing(model, error), tokenizer) as url, openai_client(url) as client:
        for _ in range(2):  # and it goes on serving
            with pytest.raises(openai.APIStatusError) as caught:
                client.completions.create(**COMPLETION, stream=stream)
    assert caught.value.response.headers.get("retry-after") == ("60" if status == 429 else RETRY.get(status))
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "secret" not in str(caught.value)
    assert "secret" not in caplog.text


def test_a_failing_tokeniser(model, caplog):
    def tokenizer(text, **options):
        raise RuntimeError(f"secret {text}")

    with (
        served(model, tokenizer) as url,
        openai_client(url) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(**COMPLETION)
    assert caught.value.code == "internal_error"
    assert "secret" not in str(caught.value) + caplog.text


def test_a_server_lost_in_midstream(model, tokenizer):
    failing = Failing(model, ConnectionFailed("the connection is lost"), after=4)
    with served(failing, tokenizer) as url, openai_client(url) as client:
        stream = client.completions.create(**{**COMPLETION, "max_tokens": 8}, stream=True)
        texts = []
        with pytest.raises(openai.APIError, match="connection is lost"):
            texts += [chunk.choices[0].text for chunk in stream]
        client.models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_the_endpoint_is_told(model, tokenizer, stream, logged):
    """Ctrl-C in midstream: what was generated, then an error event. One line is logged, and no trace."""
    slow = Stepwise(model)
    app = create_proxy(slow, tokenizer, name="tiny")
    server = ProxyServer(app)
    body = {**COMPLETION, "max_tokens": 200, "stream": stream}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        slow.permits.release(3)
        if stream:
            with httpx.stream("POST", url, json=body, timeout=30) as response:
                lines = response.iter_lines()
                assert "text" in next(lines)
                server.should_exit = True
                events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            error = json.loads(events[-1])["error"]
        else:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(httpx.post, url, json=body, timeout=30)
                eventually(lambda: slow.tokens == 4)
                server.should_exit = True
                assert waiting.result().status_code == 503
                error = error_of(waiting.result())
        thread.join(20)
        assert not thread.is_alive()
    assert error["code"] == "shutting_down"
    slow.permits.release(2)  # the token that is computed ends, and no other follows
    eventually(lambda: not slow.running.is_set())
    assert slow.tokens <= 5
    [entry] = map(json.loads, logged.getvalue().splitlines())
    assert entry["event"] == "generation stopped"


# Who is let in


def test_over_tls(model, tokenizer, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    app = create_proxy(model, tokenizer, name="tiny", allowed_hosts=None, api_key="sesame")
    server = ProxyServer(app, certfile=tmp_path / "cert.pem", keyfile=tmp_path / "key.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        place = f"://127.0.0.1:{listener.getsockname()[1]}/v1/models"
        headers = {"Authorization": "Bearer sesame"}
        with httpx.Client(verify=context, headers=headers) as client:
            assert client.get("https" + place).status_code == 200
            with pytest.raises(httpx.HTTPError):
                client.get("http" + place)
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("[::1]:8471", True),
        ("127.0.0.1", True),
        ("evil.example", False),
        ("evil.example:8471", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:80:80", False),
        ("user@localhost", False),
        ("", False),
    ],
)
def test_host(url, host, allowed):
    response = httpx.get(url + "/models", headers={"Host": host})
    assert response.status_code == (200 if allowed else 403)
    if not allowed:
        assert error_of(response)["code"] == "host_not_allowed"


def test_wrong_host_through_the_client(url):
    with (
        openai_client(url, default_headers={"Host": "evil.example"}) as client,
        pytest.raises(openai.PermissionDeniedError),
    ):
        client.completions.create(**COMPLETION)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_web_pages_are_refused(url, origin):
    response = httpx.post(url + "/completions", json=COMPLETION, headers={"Origin": origin})
    assert response.status_code == 403
    assert error_of(response)["code"] == "origin_not_allowed"
    preflight = httpx.options(
        url + "/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 403
    assert not any(name.startswith("access-control") for name in preflight.headers)


def test_api_key(model, tokenizer):
    with served(model, tokenizer, api_key="sesame") as url:
        for wrong in ("Sesame", "sesam", "sesame2", "ses\xe4me"):
            response = httpx.get(
                url + "/models", headers={"Authorization": f"Bearer {wrong}".encode("latin-1")}
            )
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
        assert httpx.get(url + "/nothing").status_code == 401
        with openai_client(url) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with openai_client(url, api_key="sesame") as client:
            assert client.models.list().data
            assert client.completions.create(**COMPLETION).choices


def test_any_host_needs_an_api_key(model, tokenizer):
    for key in (None, ""):
        with pytest.raises(ValueError, match="API key"):
            create_proxy(model, tokenizer, name="tiny", allowed_hosts=None, api_key=key)
    with served(model, tokenizer, allowed_hosts=None, api_key="sesame") as url:
        headers = {"Host": "models.example", "Authorization": "Bearer sesame"}
        assert httpx.get(url + "/models", headers=headers).status_code == 200
        assert httpx.get(url + "/models", headers={"Host": "models.example"}).status_code == 401


def test_logs_hold_no_text(url, caplog):
    words = "xylophone quagmire"
    with caplog.at_level(logging.DEBUG), openai_client(url) as client:
        logging.getLogger("cipherlm.serving").addHandler(caplog.handler)
        try:
            completion = client.completions.create(
                **{**COMPLETION, "prompt": words, "max_tokens": 8, "seed": 1}
            )
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**{**COMPLETION, "prompt": words, "suffix": words})
        finally:
            logging.getLogger("cipherlm.serving").removeHandler(caplog.handler)
    ours = [
        record for record in caplog.records if not record.name.startswith(("openai", "httpcore", "httpx"))
    ]
    assert any(record.name == "cipherlm.serving" for record in ours)
    logged = repr([vars(record) for record in ours])
    assert "xylophone" not in logged
    assert completion.choices[0].text not in logged


# The command


def command(*arguments: str) -> list[str]:
    return ["proxy", "--server", "http://127.0.0.1:1", *arguments]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--allow-remote"),
        (["--host", "192.0.2.1", "--api-key", "x"], "--allow-remote"),
        (["--host", "::"], "--allow-remote"),
        (["--host", ""], "--allow-remote"),
        (["--host", "0.0.0.0", "--allow-remote", "--no-api-key"], "leave --no-api-key out"),
        (["--host", "0.0.0.0", "--allow-remote"], "--insecure-listen-plain-http"),
        (["--no-api-key", "--api-key", "x"], "not allowed with"),
        (["--host", "0.0.0.0", "--allow-remote", "--api-key", "x", "--certfile", "y"], "belong together"),
    ],
)
def test_other_machines_are_let_in_on_purpose_only(capsys, monkeypatch, arguments, words):
    monkeypatch.delenv("CIPHERLM_PROXY_API_KEY", raising=False)
    assert main(command(*arguments)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["proxy"], ["generate", "x"], ["keygen"]])
def test_no_plain_http_to_a_server_on_another_machine(capsys, verb):
    assert main([*verb, "--server", "http://192.0.2.1:1"]) == 1
    assert "--insecure-plain-http" in capsys.readouterr().err


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CommandError, match="--port"):
        verb.listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "environment", "key"),
    [
        ([], None, None),
        (["--api-key", "sesame"], "barley", "sesame"),
        ([], "barley", "barley"),
        (["--no-api-key"], "barley", ""),
        (["--no-api-key"], None, ""),
    ],
)
def test_the_command_serves_and_closes(monkeypatch, capsys, model, tokenizer, arguments, environment, key):
    """With the key that is given, with one of its own, or with none. Its own is another one each time."""
    closed, keys = [], []
    if environment is None:
        monkeypatch.delenv("CIPHERLM_PROXY_API_KEY", raising=False)
    else:
        monkeypatch.setenv("CIPHERLM_PROXY_API_KEY", environment)
    remote = SimpleNamespace(
        config=model.config,
        context_length=256,
        generate=model.generate,
        close=lambda: closed.append(True),
    )
    monkeypatch.setattr(verb, "connect", lambda options: (remote, tokenizer, "remote"))
    monkeypatch.setattr(logging.getLogger("cipherlm.serving"), "handlers", [])

    def run(server, sockets):
        """Serve one request, in place of a run that ends with a signal."""
        serve = uvicorn.Server(server.config)
        thread = threading.Thread(target=original, args=(serve, sockets))
        thread.start()
        printed = capsys.readouterr()
        exported = dict(line.removeprefix("export ").split("=", 1) for line in printed.out.splitlines())
        url = exported.pop("OPENAI_BASE_URL")
        used = key or exported.pop("OPENAI_API_KEY")
        assert not exported
        assert used not in printed.err
        keys.append(used)
        assert httpx.get(url + "/models").status_code == (200 if key == "" else 401)
        with openai_client(url, api_key=used) as client:
            assert client.models.list().data[0].id == "remote"
            assert client.completions.create(model="remote", prompt="x").usage.completion_tokens <= 3
        serve.should_exit = True
        thread.join(20)

    original = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", run)
    for _ in range(2):
        assert main(command("--port", "0", "--max-tokens", "3", *arguments)) == 0
    assert closed == [True, True]
    if key is None:
        assert len({*keys}) == 2
        assert min(map(len, keys)) == 32
    else:
        assert {*keys} == {key or "unused"}


def test_a_conversation_is_read_once(model, tokenizer):
    """Only what a turn adds is read, and the answers are those of a proxy that reads all of it."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    question = {"role": "user", "content": "The old man"}
    try:
        with served(model, tokenizer) as url, openai_client(url) as client:

            def ask(*messages):
                counts.clear()
                reply = client.chat.completions.create(
                    model="tiny", messages=messages, temperature=0, max_tokens=3
                )
                return reply.choices[0].message.content, reply.usage.prompt_tokens

            first, _ = ask(question)
            turns = (question, {"role": "assistant", "content": first}, {"role": "user", "content": "Then"})
            second, tokens = ask(*turns)
            few = max(counts)
            assert few < tokens - 3
            ask({"role": "user", "content": "Another text"})
            assert ask(*turns)[0] == second
            assert counts[0] > few  # another text took the cache
    finally:
        hook.remove()
