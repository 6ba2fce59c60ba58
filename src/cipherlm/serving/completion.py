"""Text from a causal model as it comes, and one generation at a time.

Nothing here knows HTTP. A model's ``generate`` runs on a thread of its own; what it writes goes to the event
loop that asked for it, piece by piece.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from cipherlm.models.kept import KeptCache
from cipherlm.serving.computation import Cancelled

FinishReason = Literal["stop", "length"]

# Below this a softmax over logits divided by the temperature is greedy in float32, or overflows.
GREEDY_TEMPERATURE = 1e-5

REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Settings:
    """How a prompt is continued. ``temperature`` 0 is greedy; ``top_k`` 0 draws from the whole vocabulary."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()
    choices: int = 1
    reveal_length: bool = False
    """Let a generation end with its text, for the server to see."""
    drafts: Mapping[str, Any] = field(default_factory=dict)
    """The options of ``generate`` by which tokens are proposed, such as ``assistant_model``."""
    strip: bool = False
    """Leave out the white space that the text begins with."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, so that all choices are the same."""
        return self.temperature < GREEDY_TEMPERATURE


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, and the text that stands before the continuation, if it is to be repeated."""

    ids: Sequence[int]
    echo: str = ""


@dataclass(frozen=True)
class Piece:
    """The next piece of a choice's text. The last one says why it ends and how many tokens were generated."""

    choice: int
    text: str
    finish_reason: FinishReason | None = None
    tokens: int = 0


@dataclass
class Text:
    """The text of tokens that come one by one, cut at the first stop sequence.

    What may still change is held back: the bytes of half a character, and what may be the beginning of a stop
    sequence.
    """

    decode: Callable[[list[int]], str]
    stop: Sequence[str] = ()
    end_ids: frozenset[int] = frozenset()
    strip: bool = False
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    _given: int = 0

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens and return the text that is now certain."""
        text = ""
        for token in tokens:
            if self.finished:  # transformers may run one step further than the end
                break
            self.tokens.append(token)
            self.finished = token in self.end_ids
            text += self._advance(last=self.finished)
        return text

    def end(self) -> str:
        """Return what was held back."""
        if self.finished:
            return ""
        return self._advance(last=True)

    def _advance(self, *, last: bool) -> str:
        text = self.decode(self.tokens)
        if self.strip:
            text = text.lstrip()
        cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if cuts:
            self.finished = True
            text = text[: min(cuts)]
        elif not last:
            text = text.rstrip(REPLACEMENT)
            text = text[: len(text) - _overlap(text, self.stop)]
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop sequence."""
    longest = 0
    for sequence in stop:
        for length in range(min(len(sequence) - 1, len(text)), longest, -1):
            if text.endswith(sequence[:length]):
                longest = length
                break
    return longest


class _Listener(StoppingCriteria):
    """Hears every token that ``generate`` appends, and ends it.

    ``finish`` is called as soon as the text is finished: ``generate`` may go on behind it for a while, so
    that a server does not learn how long it is.
    """

    def __init__(
        self,
        prompt_length: int,
        max_tokens: int,
        text: Text,
        emit: Callable[[str], None],
        finish: Callable[[], None],
        job: "Job",
    ) -> None:
        self._seen, self._end = prompt_length, prompt_length + max_tokens
        self.over = False
        self._text = text
        self._emit = emit
        self._finish = finish
        self._job = job

    def hear(self, ids: torch.Tensor) -> None:
        """Take all token ids so far (tokens,), the prompt's with them."""
        new = ids[self._seen :].tolist()
        self._seen += len(new)
        if text := self._text.add(new):
            self._emit(text)
        if not self.over and (self._text.finished or self._seen >= self._end):
            self.over = True
            self._finish()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return whether to stop, as one Boolean a sequence; there is one sequence."""
        self.hear(input_ids[0])
        return torch.tensor([self._text.finished or self._job.cancelled], device=input_ids.device)


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Settings,
    job: "Job",
    kept: KeptCache | None = None,
) -> None:
    """Continue every prompt ``settings.choices`` times, one after the other, and put the pieces into ``job``.

    What a prompt has in common with the text before it is not read again where ``kept`` has that.
    Choice k of prompt i has the number ``i * choices + k``. Raises what ``model.generate`` raises, and
    :class:`Cancelled` if ``job`` was cancelled: after a token if the length is revealed, else when the
    generation is over. The job has ended for its listener with the last choice's text.
    """
    last = len(prompts) * settings.choices - 1
    for number, prompt in enumerate(prompts):
        first = number * settings.choices
        # Tokens on encrypted data are dear: equal choices are generated once.
        together = settings.choices if settings.greedy else 1
        with _seeded(settings.seed):
            for choice in range(first, first + settings.choices, together):
                numbers = range(choice, choice + together)
                _complete_one(model, tokenizer, prompt, settings, job, kept, numbers, last in numbers)


def _complete_one(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    settings: Settings,
    job: "Job",
    kept: KeptCache | None,
    choices: range,
    last: bool,
) -> None:
    """Continue a prompt once, for one choice or for several that are the same; the job's ``last`` ends it."""

    def emit(text: str, finish_reason: FinishReason | None = None) -> None:
        for choice in choices:
            job.put(Piece(choice, text, finish_reason, len(written.tokens) if finish_reason else 0))

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def finish() -> None:
        rest = written.end()  # which finishes if it ends with a stop sequence that was held back
        finished = written.finished or len(written.tokens) < settings.max_tokens
        emit(rest, "stop" if finished else "length")
        if last:
            job.put(None)

    written = Text(decode, settings.stop, _end_ids(model, tokenizer), settings.strip)
    if prompt.echo:
        emit(prompt.echo)
    if not settings.max_tokens:
        finish()
        return
    listener = _Listener(len(prompt.ids), settings.max_tokens, written, emit, finish, job)
    options = {
        "max_new_tokens": settings.max_tokens,
        "stopping_criteria": StoppingCriteriaList([listener]),
        **_sampling(settings),
        **({"reveal_length": True} if settings.reveal_length else {}),
        **settings.drafts,
    }
    if kept is not None:
        generated = torch.tensor(kept.generate(prompt.ids, **options))
    else:
        ids = torch.tensor([prompt.ids])
        generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    if job.cancelled:
        raise Cancelled
    listener.hear(generated)
    if not listener.over:
        finish()


def _sampling(settings: Settings) -> dict[str, Any]:
    if settings.greedy:
        return {"do_sample": False}
    # All three always, as transformers would draw among the 50 likeliest without top_k.
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
    }


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Let torch draw from a seed, and go on afterwards as if it had not."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text for this model."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


class Busy(Exception):  # noqa: N818
    """Too many wait already."""


class Stopped(Exception):  # noqa: N818
    """The worker ends before the text does."""


class Worker:
    """Runs one thing at a time on a thread, in order, and lets ``waiting`` more wait."""

    def __init__(self, waiting: int) -> None:
        self._jobs: WeakSet[Job] = WeakSet()
        self._closed = False
        self._places = threading.BoundedSemaphore(waiting + 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cipherlm-generate")

    def submit(self, job: "Job", work: Callable[[], None]) -> "Future[None]":
        """Run a job's work in its turn; cancelling its future gives the place back.

        Raises :class:`Busy`, and :class:`Stopped` where the worker is closed.
        """
        if self._closed:
            raise Stopped
        if not self._places.acquire(blocking=False):
            raise Busy
        future = self._thread.submit(work)
        future.add_done_callback(lambda _: self._places.release())
        self._jobs.add(job)
        return future

    def close(self) -> None:
        """Start nothing more, and end all jobs with :class:`Stopped`; called by their event loop.

        A token that is being computed ends by itself.
        """
        self._closed = True
        for job in list(self._jobs):
            job.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)


class Job:
    """What one request has generated for it, as its event loop sees it: pieces, then an error or the end."""

    def __init__(self, worker: Worker, work: Callable[["Job"], None]) -> None:
        """Queue ``work``, which puts pieces into the job it is given. Raises as :meth:`Worker.submit`."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._future = worker.submit(self, lambda: self._run(work))

    @property
    def cancelled(self) -> bool:
        """Whether the text is no longer wanted; asked between tokens."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Leave the queue, or end the generation after its current token; called by the event loop."""
        self._leave(None)  # for a task that still waits for the next piece

    def stop(self) -> None:
        """Cancel, and have :meth:`next` raise :class:`Stopped` behind the pieces that are there."""
        self._leave(Stopped())

    def _leave(self, last: Exception | None) -> None:
        self._cancelled.set()
        self._future.cancel()
        self._queue.put_nowait(last)

    def put(self, item: Piece | Exception | None) -> None:
        """Hand an item to the event loop; called by the worker's thread."""
        with suppress(RuntimeError):  # the loop has closed, and nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Piece | None:
        """Return the next piece, or None after the last. Raises what the generation raised."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _run(self, work: Callable[["Job"], None]) -> None:
        try:
            work(self)
        except Exception as error:
            self.put(error)
        else:
            self.put(None)
