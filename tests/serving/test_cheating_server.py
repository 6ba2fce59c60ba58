"""A server that cheats: it would read the secret key and the prompt from whether the client's texts go on.

The client is CipherLM's own. What answers "evaluate" is the attack's, with the client's public material.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from cipherlm.engine import Ciphertext, EvaluationKeys, Evaluator, Plaintext
from cipherlm.schemes.ckks.session import Client
from cipherlm.serving.ckks import CkksBackend
from tests.encryption.frames import frame
from tests.serving import small

END, OTHER = 63, 7
SLOTS = small.GEOMETRY.parameters.slots
DEGREE = small.GEOMETRY.parameters.degree


class CheatingServer:
    """Puts a number that it chose into all slots, and lets it decide whether the next token ends the text."""

    def __init__(self, keys: EvaluationKeys, embeddings: np.ndarray) -> None:
        self.parameters = small.GEOMETRY.parameters
        self.evaluator = Evaluator(self.parameters, keys)
        powers = {pow(5, rotation, 2 * DEGREE): rotation for rotation in range(SLOTS)}
        self.rotations = {powers[element] for element in keys.galois_levels if element in powers}
        self.embeddings = embeddings - embeddings.mean(1, keepdims=True)
        self.evaluations = 0
        self.secret: Callable[[Ciphertext], Ciphertext] = lambda sent: sent

    def evaluate(self, name, position, count, inputs: Sequence[bytes], refresh, report=None) -> list[bytes]:
        """Answer as a server does; the first evaluation of a text brings the secret."""
        self.evaluations += 1
        sent = Ciphertext.from_bytes(inputs[0], self.parameters)
        layout, prefix = small.GEOMETRY.layout, small.GEOMETRY.prefix
        if position > prefix:
            return [self.evaluator.add(sent, sent).to_bytes()]
        up, down = (
            layout.pack(np.repeat(size * self._direction(token)[None], layout.tokens, 0))[0]
            for token, size in ((END, 1), (OTHER, 0.35))
        )
        result = self.evaluator.add(self.evaluator.multiply(self.secret(sent), up), down)
        return [result.to_bytes()]

    def coefficient(self, index: int) -> Callable[[Ciphertext], Ciphertext]:
        """Return what encrypts one coefficient of the secret key, in all slots, out of nothing."""
        exponents = np.array([pow(5, j, 2 * DEGREE) for j in range(SLOTS)])

        def encrypted(sent: Ciphertext) -> Ciphertext:
            key = self.evaluator.set_scale(self._key(sent, 2.0**36), 2.0**36)
            total = self._total(
                self.evaluator.multiply(key, np.exp(-1j * np.pi * exponents * index / DEGREE))
            )
            total = self.evaluator.add(total, self.evaluator.conjugate(total))
            return self.evaluator.set_scale(total, total.scale * DEGREE)

        return encrypted

    def second_token_is(self, token: int) -> Callable[[Ciphertext], Ciphertext]:
        """Return what is about one, in all slots, if the prompt's second token is this one."""
        layout, embedding = small.GEOMETRY.layout, self.embeddings[token]
        test = np.zeros((layout.period, layout.tokens))
        test[: small.WIDTH, small.GEOMETRY.prefix + 1] = embedding
        size = SLOTS / (layout.period * layout.tokens) * (embedding @ embedding)

        def encrypted(sent: Ciphertext) -> Ciphertext:
            total = self._total(self.evaluator.multiply(sent, layout.repeated(test)))
            return self.evaluator.set_scale(total, total.scale * size)

        return encrypted

    def _direction(self, token: int) -> np.ndarray:
        embedding = self.embeddings[token]
        return 8 * embedding / np.linalg.norm(embedding)

    def _key(self, sent: Ciphertext, size: float) -> Ciphertext:
        """Return (0, K), which decrypts to K times the secret key: the constant is the second half."""
        constant = Plaintext.encode(self.parameters, np.full(SLOTS, 1.0), sent.level, size).to_bytes()
        body = constant[64 + 8 + 20 : -32]
        data = self.evaluator.add(sent, sent).to_bytes()
        return Ciphertext.from_bytes(
            frame(data, data[64 : 64 + 8 + 20] + bytes(len(body)) + body), self.parameters
        )

    def _total(self, value: Ciphertext) -> Ciphertext:
        """Return the sum over all slots, in all slots."""
        for bit in range(SLOTS.bit_length() - 1):
            moved = value
            for rotation in self._steps(1 << bit):
                moved = self.evaluator.rotate(moved, rotation)
            value = self.evaluator.add(value, moved)
        return value

    def _steps(self, rotation: int) -> list[int]:
        """Return rotations, of those that there are keys for, that make one up."""
        ends = {0: []}
        for _ in range(3):
            if rotation in ends:
                break
            ends = {
                (at + one) % SLOTS: [*way, one] for at, way in ends.items() for one in self.rotations
            } | ends
        return ends[rotation]


@pytest.fixture(scope="module")
def attack():
    """A client of the small model, and the server that it is connected to."""
    model = small.encrypted_model("all")
    client = small.party()
    keys = EvaluationKeys.from_bytes(small.paths()["evaluation"].read_bytes(), small.GEOMETRY.parameters)
    server = CheatingServer(keys, model.transformer.wte.weight.detach().numpy().astype(float))
    model.connect(CkksBackend(client, server))
    model.set_fhe_mode("execute")
    yield model, client, server
    model.connect(None)
    model.set_fhe_mode("disable")


def evaluations(attack, secret, prompt=(1, 2), **options) -> int:
    """Return all that the server looks at: how many evaluations come when the secret decides on the end."""
    model, _, server = attack
    server.secret, server.evaluations = secret, 0
    ids = model.with_prefix(torch.tensor([prompt]))
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False,
        eos_token_id=END, pad_token_id=END, **options,
    )  # fmt: skip
    return server.evaluations


def coefficients(client: Client) -> np.ndarray:
    """Return the secret key, to compare with."""
    packed = np.frombuffer(client.secret_key.to_bytes()[64:-32], np.uint8)
    codes = (packed[:, None] >> np.arange(0, 8, 2) & 3).reshape(-1)
    return np.where(codes == 2, -1, codes).astype(int)


def test_coefficients_of_the_secret_key(attack):
    """Where texts end when they end, one evaluation tells a coefficient. At full length it tells nothing."""
    _, client, server = attack
    secret = coefficients(client)
    chosen = [int(np.flatnonzero(secret == value)[0]) for value in (1, 0, -1)]
    told = [evaluations(attack, server.coefficient(i), reveal_length=True) == 1 for i in chosen]
    assert told == [True, False, False]
    assert len({evaluations(attack, server.coefficient(i)) for i in chosen}) == 1


def test_a_token_of_the_prompt(attack):
    _, _, server = attack
    guess, unlike = server.second_token_is(12), int(np.argmin(server.embeddings @ server.embeddings[12]))
    told = [evaluations(attack, guess, (5, token), reveal_length=True) == 1 for token in (12, unlike)]
    assert told == [True, False]
    assert len({evaluations(attack, guess, (5, token)) for token in (12, unlike)}) == 1
