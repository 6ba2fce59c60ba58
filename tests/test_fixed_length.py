"""What a server sees of a generation, its evaluations, does not depend on the text that comes of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from cipherlm.linear.prefix import cache_name
from cipherlm.models.backends import Simulated
from cipherlm.models.length import BUCKET, bounded, evaluated_tokens
from cipherlm.serving.completion import Job, Prompt, Settings, Worker, complete
from tests.serving import small


@dataclass
class Server:
    """Computes on clear numbers, and notes what a server sees: which chunk of tokens it is asked for."""

    simulated: Simulated
    answer: object = None
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    def evaluate(self, name, hidden, start, report=None):
        assert np.isfinite(hidden).all()
        geometry = small.GEOMETRY
        self.asked += [(name, *chunk) for chunk in geometry.chunks(start, len(hidden))]
        outputs = self.simulated.evaluate(name, hidden, start, report)
        return outputs if self.answer is None else self.answer(name, start, outputs)


@pytest.fixture(params=["all", "hybrid"])
def model(request):
    encrypted = small.encrypted_model(request.param)
    server = Server(Simulated(encrypted.placement.modules, small.GEOMETRY, noise=False))
    encrypted.connect(server)
    encrypted.set_fhe_mode("execute")
    yield encrypted, server
    encrypted.connect(None)
    encrypted.set_fhe_mode("disable")


def ask(model, tokens=3, count=4, start=5, **options):
    """Generate with a budget of ``count``, and return what the server saw, and the new tokens."""
    encrypted, server = model
    server.asked = []
    ids = encrypted.with_prefix(torch.arange(start, start + tokens)[None])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **options}
    generated = encrypted.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return server.asked, generated[0, ids.shape[1] :].tolist()


def others(model):
    """Return what the server sees of a text that runs to its budget, and the text's tokens."""
    seen, text = ask(model)
    assert len(text) == 4
    assert max(start + count for _, start, count in seen) == 1 + 8
    return seen, text


class After(StoppingCriteria):
    def __init__(self, tokens: int, error: Exception | None = None) -> None:
        self.tokens, self.error = tokens, error

    def __call__(self, input_ids, scores, **_):
        over = input_ids.shape[1] >= self.tokens
        if over and self.error:
            raise self.error
        return torch.full((len(input_ids),), over)


def test_a_token_that_ends_a_text(model):
    seen, text = others(model)
    for at in (0, 1):
        got, short = ask(model, eos_token_id=text[at])
        assert short == text[: text.index(text[at]) + 1]
        assert got == seen
    # Without it, the server sees that the text has ended.
    assert len(ask(model, eos_token_id=text[0], reveal_length=True)[0]) < len(seen) / 2


def test_a_criterion_and_errors(model):
    seen, _ = others(model)
    assert ask(model, stopping_criteria=[After(5)])[0] == seen
    with pytest.raises(ZeroDivisionError):
        ask(model, stopping_criteria=[After(5, ZeroDivisionError())])
    assert model[1].asked == seen

    class Broken(BaseStreamer):
        def put(self, value):
            raise BrokenPipeError

        def end(self):
            """Nothing."""

    with pytest.raises(BrokenPipeError):
        ask(model, streamer=Broken())
    # Nothing was evaluated before transformers handed on the prompt, and nothing of the text is in that.
    assert model[1].asked == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e300, 1e30])
def test_numbers_of_no_model(model, bad):
    """Results that a server has made up end no generation early, drawn or not."""
    seen, _ = others(model)
    for sample in (False, True):
        model[1].answer = lambda name, start, outputs: np.full_like(outputs, bad)
        try:
            ask(model, do_sample=sample)
        except (RuntimeError, ValueError):
            assert sample
        assert model[1].asked == seen


def test_the_text_before(model):
    """A text that goes on where the last one ended is evaluated anew, wherever that ended."""
    encrypted, server = model
    _, text = others(model)
    prompt = torch.cat([encrypted.with_prefix(torch.arange(5, 8)[None]), torch.tensor([text[:1]])], dim=1)
    seen = []
    for count in (1, 2, 4):
        ask(model, count=count)
        server.asked = []
        encrypted.generate(prompt, max_new_tokens=3, do_sample=False)
        seen.append(server.asked)
    assert seen[0] == seen[1] == seen[2] == ask(model, tokens=4, count=3, start=20)[0]


def test_a_cache_that_is_cut_back(model):
    """As a conversation does between its turns; to where would tell how long the answer was."""
    encrypted, server = model
    _, text = others(model)
    prompt, seen = encrypted.with_prefix(torch.arange(5, 8)[None]), []
    for end in (text[0], text[1], None):
        cache = DynamicCache()
        options = {"do_sample": False, cache_name(encrypted): cache, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(prompt)
        encrypted.generate(prompt, max_new_tokens=4, eos_token_id=end, **options)
        cache.crop(prompt.shape[1] - 1 - cache.get_seq_length())
        server.asked = []
        encrypted.generate(prompt, max_new_tokens=3, **options)
        seen.append(list(server.asked))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0][1] == 1


def test_drafts_are_refused(model):
    """How many of their tokens are right depends on the text."""
    encrypted, server = model
    for drafts in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": small.clear_model()}):
        with pytest.raises(ValueError, match="reveal_length=True"):
            ask(model, **drafts)
        assert server.asked == []
        _, text = ask(model, reveal_length=True)
        assert ask(model, reveal_length=True, **drafts)[1] == text
    encrypted.generation_config.prompt_lookup_num_tokens = 2
    try:
        with pytest.raises(ValueError, match="reveal_length=True"):
            ask(model)
    finally:
        encrypted.generation_config.prompt_lookup_num_tokens = None


def test_prompts_of_a_bucket(model):
    """Behind the first ciphertext, a server does not see where a prompt ends, either, if all is remote."""
    if len(model[0].remote_modules) > 1:
        pytest.skip("the order in which modules are asked for a prompt shows its length")
    assert ask(model, tokens=4, count=4)[0] == ask(model, tokens=5, count=4)[0] == ask(model, 3, 6)[0]
    assert ask(model, tokens=3, count=2)[0] != ask(model, tokens=3, count=4)[0]


def test_texts_beside_each_other(model):
    """Whether two drawn texts begin in the same way does not show in how much of them is evaluated."""
    seen = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        seen.append(ask(model, count=3, do_sample=True, top_k=2, num_return_sequences=2)[0])
    assert seen[0] == seen[1] == seen[2]


def test_a_server_that_fails(model):
    """What fails by its form ends at once; behind the end of a text it costs no text."""
    server = model[1]

    def lost(name, start, outputs):
        if start >= 6:
            raise ConnectionError("lost")
        return outputs

    _, text = others(model)
    server.answer = lost
    with pytest.raises(ConnectionError):
        ask(model)
    assert server.asked[-1][1] == 6
    with pytest.warns(UserWarning, match="behind the end of the text: lost"):
        assert ask(model, eos_token_id=text[0])[1] == text[:1]


def test_in_one_process_nothing_is_hidden():
    encrypted = small.encrypted_model("all")
    assert not encrypted.is_elsewhere
    calls = []
    hook = encrypted.register_forward_hook(lambda *_: calls.append(1))
    encrypted.generate(torch.tensor([[0, 5, 6]]), max_new_tokens=1, do_sample=False)
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("longest", "prefix", "room", "expected"),
    [
        *((1, 1, 64, 1), (2, 1, 64, 1), (3, 1, 64, 5), (8, 1, 64, 9), (10, 1, 64, 9), (11, 1, 64, 13)),
        *((63, 1, 62, 62), (9, 0, 64, 8)),
    ],
)
def test_buckets(longest, prefix, room, expected):
    assert evaluated_tokens(longest, prefix, room) == expected
    assert (expected - prefix) % BUCKET == 0 or expected == room


def test_bounded_rows_are_those_of_a_model():
    rows = np.random.default_rng(1).normal(size=(3, 4)) * 3000
    assert (bounded(rows) == rows).all()


def completed(model, settings, cancel_after=None):
    """Run a proxy's job to its end, and return what was sent before the last evaluation, and what came."""
    encrypted, server = model
    server.asked = []

    class Prefixed:
        config, generation_config = encrypted.config, encrypted.generation_config

        @staticmethod
        def generate(ids, **options):
            options.pop("attention_mask")
            return encrypted.generate(encrypted.with_prefix(ids), **options)[:, 1:]

    async def run():
        worker, pieces = Worker(1), []
        prompts = [Prompt(list(range(5, 8)))]
        job = Job(worker, lambda job: complete(Prefixed, small.tokenizer(), prompts, settings, job))
        while (piece := await job.next()) is not None:
            pieces.append(piece)
            if cancel_after is not None and len(pieces) > cancel_after:
                job.cancel()
                break
        at_end = len(server.asked)
        await asyncio.wait_for(asyncio.wrap_future(job._future), 60)
        worker.close()
        return pieces, at_end

    return asyncio.run(run())


def test_the_proxy(model):
    """A stop sequence and a reader who leaves end a reply, and no generation."""
    seen, text = others(model)
    pieces, _ = completed(model, Settings(4, temperature=0))
    assert model[1].asked == seen
    assert pieces[-1].tokens == 4
    stop = small.tokenizer().decode(text[:1])
    pieces, _ = completed(model, Settings(4, temperature=0, stop=[stop]))
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].tokens < 4
    assert model[1].asked == seen
    completed(model, Settings(4, temperature=0), cancel_after=0)
    assert model[1].asked == seen
    completed(model, Settings(4, temperature=0, stop=[stop], reveal_length=True))
    assert len(model[1].asked) < len(seen)


def test_the_proxy_does_not_wait_for_the_end(model):
    """The reply is complete before what hides its length has been evaluated."""
    import threading

    seen, text = others(model)
    told = threading.Event()
    first = len({name for name, _, _ in seen})

    def wait(name, start, outputs):
        if len(model[1].asked) > first:
            assert told.wait(20)
        return outputs

    model[1].answer = wait
    put = Job.put

    def noting(job, item):
        put(job, item)
        if item is None:
            told.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "put", noting)
        completed(model, Settings(4, temperature=0, stop=[small.tokenizer().decode(text[:1])]))
    assert model[1].asked == seen
