"""CKKS behind the interface of the transport: what clients get wrong, with real keys and ciphertexts.

Each mistake is an error in words for the client, and the session goes on serving.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import weakref

import numpy as np
import pytest

from cipherlm.engine import Ciphertext, PublicKey, RefreshRequest
from cipherlm.errors import Refused
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL
from cipherlm.schemes.ckks.session import Client
from cipherlm.serving.bounds import Bounds
from cipherlm.serving.ckks import (
    EVALUATION,
    MESSAGE_BYTES,
    MOST_ROUNDS,
    PUBLIC,
    CkksBackend,
    CkksComputation,
    CkksHostedModel,
    geometry_of,
    parameters_of,
)
from cipherlm.serving.errors import RemoteError
from tests.encryption.frames import sealed

from . import small
from .small import at_home  # noqa: F401

MODULE = "transformer.h.0.mlp"
OTHER = Geometry(heads=4, head_dim=32, tokens=4, prefix=1, context=12)


@pytest.fixture(scope="module")
def model() -> CkksHostedModel:
    """The MLP alone, which is evaluated fast."""
    found = small.hosted("mlp")
    assert isinstance(found, CkksHostedModel)
    return found


@pytest.fixture(scope="module")
def client() -> Client:
    return small.party()


@pytest.fixture(scope="module")
def computation(model) -> CkksComputation:
    return model.open(small.paths())


def unheard(done: int, total: int) -> None:
    pass


def hidden(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, small.WIDTH))


def exchange_with(client: Client, change=lambda reply: reply):
    def exchange(request: bytes) -> bytes:
        parameters = client.geometry.parameters
        return change(client.refresh(RefreshRequest.from_bytes(request, parameters)).to_bytes())

    return exchange


def evaluate(computation, client, x, start=1, **options) -> np.ndarray:
    inputs = [ciphertext.to_bytes() for ciphertext in client.encrypt(x, start)]
    exchange = options.get("exchange", exchange_with(client))
    results = computation.evaluate(MODULE, start, len(x), inputs, exchange, unheard)
    ciphertexts = [Ciphertext.from_bytes(result, client.geometry.parameters) for result in results]
    return client.decrypt(ciphertexts, len(x), start)


def expected(x: np.ndarray) -> np.ndarray:
    """The MLP, computed by the clear model."""
    import torch

    with torch.no_grad():
        return small.clear_model().transformer.h[0].mlp(torch.tensor(x, dtype=torch.float32)).numpy()


def serves(computation, client) -> None:
    x = hidden(2)
    assert np.abs(evaluate(computation, client, x) - expected(x)).max() < 0.05


def damaged(frame: bytes):
    """Yield frames that are cut off, changed, or something else, with the word for each."""
    for size in (0, 1, 63, 64, 100, len(frame) // 2, len(frame) - 1):
        yield f"cut at {size}", frame[:size]
    for at in (0, 5, 6, 10, 30, 41, 50, 64, 70, len(frame) // 2, len(frame) - 40, len(frame) - 1):
        flipped = bytearray(frame)
        flipped[at] ^= 0x10
        yield f"bit at {at}", bytes(flipped)
    yield "longer", frame + b"\0"
    yield "zeros", bytes(len(frame))
    yield "residues of no prime", sealed(frame[:-1000] + b"\xff" * 1000)


# Keys.


def test_the_geometry_survives_json():
    for geometry in (small.GEOMETRY, dataclasses.replace(small.GEOMETRY, post_quantum=True)):
        assert geometry_of({"parameters": parameters_of(geometry)}) == geometry
    with pytest.raises(ValueError, match="'window' in the geometry is not known: is it of a newer"):
        Geometry.from_dict({**small.GEOMETRY.to_dict(), "window": 8})
    for parameters in (None, [], {}, {"geometry": small.GEOMETRY.to_dict()}, {"digest": "0"}):
        with pytest.raises(ValueError, match=r"geometry|version"):
            geometry_of({"parameters": parameters})


def opened_with(model, tmp_path, evaluation: bytes | None = None, public: bytes | None = None):
    paths = small.paths()
    for kind, content in ((EVALUATION, evaluation), (PUBLIC, public)):
        if content is not None:
            (tmp_path / kind).write_bytes(content)
            paths[kind] = tmp_path / kind
    return model.open(paths)


def test_damaged_keys_are_refused(model, tmp_path):
    keys = {kind: path.read_bytes() for kind, path in small.paths().items()}
    for kind, content in keys.items():
        # Evaluation keys are long to read: a few of them will do.
        for _, data in list(damaged(content))[slice(None) if kind == PUBLIC else slice(4, None, 6)]:
            with pytest.raises(ValueError, match=r".{10}"):
                opened_with(model, tmp_path, **{kind: data})
    with pytest.raises(ValueError, match="frame of type"):
        opened_with(model, tmp_path, evaluation=keys[PUBLIC])
    with pytest.raises(ValueError, match="frame of type"):
        opened_with(model, tmp_path, public=keys[EVALUATION])
    with pytest.raises(ValueError, match="frame of type 2"):
        opened_with(model, tmp_path, public=small.keys().secret())
    for kinds in ({}, {EVALUATION}, {EVALUATION, PUBLIC, "secret"}):
        with pytest.raises(ValueError, match="of the kinds"):
            model.open(dict.fromkeys(kinds, small.paths()[PUBLIC]))


def test_keys_of_two_clients_are_refused(model, tmp_path):
    stranger = Client.generate(small.GEOMETRY)
    with pytest.raises(ValueError, match="different secret keys"):
        opened_with(model, tmp_path, public=stranger.public_key().to_bytes())


@pytest.mark.slow
def test_keys_for_another_model_are_refused(model, tmp_path):
    """Another geometry needs other rotations, or the same ones at other levels."""
    stranger = Client.generate(OTHER)
    few = stranger.secret_key.evaluation_keys({1: 2}, conjugation=True)
    with pytest.raises(ValueError, match="for another model"):
        opened_with(model, tmp_path, few.to_bytes(), stranger.public_key().to_bytes())
    rotations = small.GEOMETRY.layout.rotations(8)
    low = stranger.secret_key.evaluation_keys(dict.fromkeys(rotations, 1), conjugation=True, level=8)
    with pytest.raises(ValueError, match="for another model"):
        opened_with(model, tmp_path, low.to_bytes(), stranger.public_key().to_bytes())
    bare = stranger.secret_key.evaluation_keys(rotations, conjugation=True, relinearization=False)
    with pytest.raises(ValueError, match="lack the one for products"):
        opened_with(model, tmp_path, bare.to_bytes(), stranger.public_key().to_bytes())
    unconjugated = stranger.secret_key.evaluation_keys(rotations)
    with pytest.raises(ValueError, match="for another model"):
        opened_with(model, tmp_path, unconjugated.to_bytes(), stranger.public_key().to_bytes())


def test_keys_fit_in_what_the_description_allows(model):
    allowed = model.description["keys"]
    for kind, path in small.paths().items():
        assert allowed[kind] // 3 < path.stat().st_size <= allowed[kind] or kind == PUBLIC
        assert path.stat().st_size <= allowed[kind]


# Ciphertexts.


def test_damaged_ciphertexts_are_refused(computation, client):
    [ciphertext] = client.encrypt(hidden(1), 1)
    frame = ciphertext.to_bytes()

    def refused(*inputs: bytes) -> str:
        with pytest.raises(Refused, match=r".{10}") as caught:
            computation.evaluate(MODULE, 1, 1, list(inputs), exchange_with(client), unheard)
        return str(caught.value)

    for what, data in damaged(frame):
        assert refused(data), what
    assert "not in 0" in refused()
    assert "not in 2" in refused(frame, frame)
    assert "not in 9" in refused(*[frame] * 9)
    for level, scale in ((3, None), (8, None), (ATTENTION_LEVEL, 2.0**30)):
        other = client.secret_key.encrypt(np.ones(8), level, scale)
        assert "another level or scale" in refused(other.to_bytes())
    public = small.paths()[PUBLIC].read_bytes()
    assert "frame of type" in refused(public)
    # With a key of its own a client could choose the second half, and read the weights off the result's.
    unseeded = PublicKey.from_bytes(public, small.GEOMETRY.parameters).encrypt(np.ones(8), ATTENTION_LEVEL)
    assert "from a seed" in refused(unseeded.to_bytes())
    serves(computation, client)


def test_ciphertexts_of_another_client_are_refused(computation, client):
    stranger = Client.generate(small.GEOMETRY)
    with pytest.raises(Refused, match="under another key"):
        evaluate(computation, stranger, hidden(1))
    # Whoever puts another name on it gets noise, and nobody else is concerned.
    [ciphertext] = stranger.encrypt(hidden(1), 1)
    frame, name = ciphertext.to_bytes(), small.paths()[PUBLIC].read_bytes()[24:40]
    named = sealed(frame[:24] + name + frame[40:])
    computation.evaluate(MODULE, 1, 1, [named], exchange_with(client), unheard)
    serves(computation, client)


@pytest.mark.parametrize(
    ("module", "start", "count", "message"),
    [
        ("transformer.h.0.attn", 1, 1, "no module"),
        ("", 1, 1, "no module"),
        (MODULE, 1, 0, "do not fit"),
        (MODULE, 1, -1, "do not fit"),
        (MODULE, 1, small.TOKENS, "do not go together"),
        (MODULE, 1, small.TOKENS + 1, "in 2 ciphertexts, not in 1"),
        (MODULE, 0, 1, "position 0 on, where"),
        (MODULE, small.CONTEXT, 1, "do not fit"),
        (MODULE, 10**18, 1, "do not fit"),
        (MODULE, 3, 1, "where 1 was expected"),
        (MODULE, 5, small.TOKENS + 1, "do not go together"),
        (MODULE, 5, 2, "where 1 was expected"),
    ],
)
def test_wrong_requests_are_refused(computation, client, module, start, count, message):
    inputs = [ciphertext.to_bytes() for ciphertext in client.encrypt(hidden(1), 1)]
    with pytest.raises(Refused, match="expected"):  # whatever was before it, is forgotten
        computation.evaluate(MODULE, small.CONTEXT - 1, 1, inputs, exchange_with(client), unheard)
    with pytest.raises(Refused, match=message):
        computation.evaluate(module, start, count, inputs, exchange_with(client), unheard)


def test_a_text_is_taken_back(computation, client):
    x = hidden(8)
    evaluate(computation, client, x[:3])
    evaluate(computation, client, x[3:7], 4)
    for start in (6, 6, 7, 2):
        assert np.abs(evaluate(computation, client, x[4:6], start) - expected(x[4:6])).max() < 0.05
    for start, message in ((5, "where 4 was expected"), (4, "where 1 was expected")):
        with pytest.raises(Refused, match=message):
            evaluate(computation, client, x[4:6], start)


def test_a_closed_session(model, client):
    computation = model.open(small.paths())
    computation.close()
    computation.close()
    with pytest.raises(Refused, match="closed"):
        computation.evaluate(MODULE, 1, 1, [], exchange_with(client), unheard)


def test_what_failed_starts_anew(computation, client):
    """Tokens in order, then a gap; after it the text has to come again from its start."""
    x = hidden(6)
    evaluate(computation, client, x[:3])
    assert np.abs(evaluate(computation, client, x[3:4], 4) - expected(x[3:4])).max() < 0.05
    with pytest.raises(Refused, match="where 5 was expected"):
        evaluate(computation, client, x[5:], 6)
    with pytest.raises(Refused, match="where 1 was expected"):
        evaluate(computation, client, x[4:5], 5)
    serves(computation, client)


# Refreshes.


def test_damaged_refresh_replies_are_refused(computation, client):
    """One evaluation for each kind of damage, which ends at its first refresh."""
    kept: list[bytes] = []

    def keep(reply: bytes) -> bytes:
        kept.append(reply)
        return reply

    x = hidden(1)
    evaluate(computation, client, x, exchange=exchange_with(client, keep))
    assert kept
    for _, data in damaged(kept[0]):
        with pytest.raises(Refused, match=r".{10}"):
            evaluate(computation, client, x, exchange=lambda request, data=data: data)
    [ciphertext] = client.encrypt(x, 1)
    stranger = Client.generate(small.GEOMETRY)
    for reply in (ciphertext.to_bytes(), stranger.public_key().to_bytes()):
        with pytest.raises(Refused, match="frame of type"):
            evaluate(computation, client, x, exchange=lambda request, reply=reply: reply)
    with pytest.raises(Refused, match="frame of type"):
        evaluate(computation, client, x, exchange=lambda request: request)
    serves(computation, client)


def test_a_reply_to_something_else_is_refused(model, computation, client):
    """Of another count, for another level, under another key; an old one only spoils the client's result."""
    parameters = small.GEOMETRY.parameters
    evaluator = model.open(small.paths())._session.arithmetic.evaluator
    public = PublicKey.from_bytes(small.paths()[PUBLIC].read_bytes(), parameters)
    one = client.secret_key.encrypt(np.zeros(4), 1)

    def answer(count: int, level: int) -> bytes:
        request, _ = evaluator.mask([one] * count, public, to_level=level)
        return client.refresh(request).to_bytes()

    x = hidden(1)
    for reply, message in ((answer(3, 8), "3 ciphertexts"), (answer(1, 2), "level 2|1 ciphertexts")):
        with pytest.raises(Refused, match=message):
            evaluate(computation, client, x, exchange=lambda request, reply=reply: reply)
    reply = answer(1, 8)
    stranger = Client.generate(small.GEOMETRY).public_key().to_bytes()[24:40]
    named = sealed(reply[:24] + stranger + reply[40:])
    with pytest.raises(Refused, match="key"):
        evaluate(computation, client, x, exchange=lambda request: named)
    serves(computation, client)


# The client's side.


class Answers:
    """A connection to a server that answers as it likes."""

    def __init__(self, results=(), request: bytes | None = None) -> None:
        self.results, self.request = results, request
        self.reply: bytes | None = None

    def evaluate(self, module, start, count, inputs, refresh, report=None):
        if self.request is not None:
            self.reply = refresh(self.request)
        return list(self.results)

    def reopen(self) -> None:
        raise AssertionError


def test_a_server_s_nonsense_is_an_error(client):
    stranger = Client.generate(small.GEOMETRY)
    [good], [foreign] = client.encrypt(hidden(1), 1), stranger.encrypt(hidden(1), 1)
    frames = [data for _, data in damaged(good.to_bytes())]
    for results in ([], [good.to_bytes()] * 2, *([frame] for frame in frames), [foreign.to_bytes()]):
        with pytest.raises(RemoteError, match="the server sent"):
            CkksBackend(client, Answers(results)).evaluate(MODULE, hidden(1), 1)
    for request in (*frames, foreign.to_bytes(), b""):
        with pytest.raises(RemoteError, match="the server sent"):
            CkksBackend(client, Answers([good.to_bytes()], request)).evaluate(MODULE, hidden(1), 1)


def test_a_request_for_more_than_a_message_holds_is_not_answered(model, client, monkeypatch):
    parameters = small.GEOMETRY.parameters
    evaluator = model.open(small.paths())._session.arithmetic.evaluator
    public = PublicKey.from_bytes(small.paths()[PUBLIC].read_bytes(), parameters)
    masked = [public.encrypt(np.zeros(4), 1)] * 3
    result = client.encrypt(hidden(1), 1)[0].to_bytes()
    for level in (1, parameters.max_level):
        request, _ = evaluator.mask(masked, public, to_level=level)
        size = len(client.refresh(request).to_bytes())
        assert 0 < size - request.reply_bytes < 200  # header and checksum
        answers = Answers([result], request.to_bytes())
        CkksBackend(client, answers, request.reply_bytes).evaluate(MODULE, hidden(1), 1)
        assert len(answers.reply) == size
        answers = Answers([result], request.to_bytes())
        with monkeypatch.context() as patched:
            patched.setattr(client, "refresh", None)  # nothing is computed
            with pytest.raises(RemoteError, match=f"3 fresh ciphertexts at level {level}"):
                CkksBackend(client, answers, request.reply_bytes - 1).evaluate(MODULE, hidden(1), 1)


def test_the_bounds_are_the_bundle_s(tmp_path):
    """Whatever the server says: here, that its messages have 2^40 bytes."""
    with small.serving("mlp", tmp_path) as (url, service):
        service.description["message_bytes"] = 1 << 40
        with small.connect(url, "mlp") as model:
            assert model._connection.describe()["message_bytes"] == 1 << 40
            assert model._connection.bounds == Bounds(MESSAGE_BYTES, rounds=MOST_ROUNDS)
            assert model._connection._session._limit < MESSAGE_BYTES + (1 << 20)


def test_a_client_never_answers_in_the_clear(model, client):
    """Whatever a server asks to refresh, it gets a fresh encryption: other bytes each time, no plaintext.

    It asks for a ciphertext that it knows all about: an encryption of zero without a mask.
    """
    parameters = small.GEOMETRY.parameters
    evaluator = model.open(small.paths())._session.arithmetic.evaluator
    public = PublicKey.from_bytes(small.paths()[PUBLIC].read_bytes(), parameters)
    request, _ = evaluator.mask([public.encrypt(np.zeros(4), 1)], public)
    frame = request.to_bytes()
    held = 2  # bytes that say what the ciphertext holds
    zero = sealed(frame[: 72 + held] + bytes(len(frame) - 72 - held))
    replies = []
    for _ in range(2):
        answers = Answers([client.encrypt(hidden(1), 1)[0].to_bytes()], zero)
        CkksBackend(client, answers).evaluate(MODULE, hidden(1), 1)
        replies.append(np.frombuffer(answers.reply, np.uint8)[200:-4])
    assert np.mean(replies[0] == replies[1]) < 0.01
    # Residues are nearly uniform bits, and those of zeros would be zeros.
    assert np.bincount(replies[0], minlength=256).max() < 2 * len(replies[0]) / 256


def test_files_are_read_to_their_end_only(model, tmp_path):
    file = io.BytesIO(small.paths()[EVALUATION].read_bytes() + b"more")
    with pytest.raises(ValueError, match="followed by something"):
        opened_with(model, tmp_path, evaluation=file.getvalue())


def test_released_keys(model, client):
    """The keys leave the memory, and are read again for the next evaluation."""
    computation = model.open(small.paths())
    serves(computation, client)
    keys = weakref.ref(computation._session.arithmetic.evaluator.evaluation_keys)
    computation.release_keys()
    gc.collect()
    assert keys() is None
    serves(computation, client)
    computation.release_keys()
    computation.close()
    computation.release_keys()
    with pytest.raises(Refused, match="closed"):
        evaluate(computation, client, hidden(1))
