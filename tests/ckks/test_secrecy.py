"""The client's view of a whole encrypted evaluation: what it decrypts in refreshes tells it nothing.

The client is taken at its word: with its secret key it decrypts each refresh request to integers modulo Q, in
Python, and applies statistics to them. Each test also runs on masks that are too weak, and must find them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.engine import Ciphertext, Plaintext, RefreshRequest, SecretKey, Subring
from cipherlm.schemes.ckks.refresh import MaskedRefresh
from cipherlm.schemes.ckks.session import Client, Hosted, Server, Session
from tests.encryption.opener import Opener
from tests.encryption.rings import PrimeRing
from tests.encryption.subrings import known, projected, sent

from .parties import InProcessRefresh

BINS = 64
SIGMAS = 6.0


class Decryption:
    """Decrypts as the mathematics says, from the bytes of keys and ciphertexts."""

    def __init__(self, secret_key: SecretKey) -> None:
        self.parameters, self.opener = secret_key.parameters, Opener(secret_key)
        self.size = self.parameters.degree
        packed = np.frombuffer(secret_key.to_bytes()[64:-32], np.uint8)
        codes = (packed[:, None] >> np.arange(0, 8, 2) & 3).reshape(-1)
        self.primes = self.parameters.q[:2]
        self.modulus = self.primes[0] * self.primes[1]
        self.rings = [PrimeRing(self.size, prime) for prime in self.primes]
        secret = np.where(codes == 2, -1, codes).astype(np.int64)
        self.secret = [ring.ntt(secret) for ring in self.rings]

    def integers(self, c0, c1) -> np.ndarray:
        """Return c0 + c1 s modulo Q in [0, Q), coefficients of the polynomial, of residues in NTT form."""
        return self._joined(
            *(
                ring.intt(ring.reduce(a + ring.multiply(b, s)))
                for ring, a, b, s in zip(self.rings, c0, c1, self.secret, strict=True)
            )
        )

    def compact(self, subring, c0, c1) -> np.ndarray:
        """Return the same of a subring, whose coefficients the first component has."""
        return self._joined(
            *(
                ring.reduce(a + projected(ring, subring, ring.intt(ring.multiply(b, s))))
                for ring, a, b, s in zip(self.rings, c0, c1, self.secret, strict=True)
            )
        )

    def _joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        (p, q), ring = self.primes, self.rings[1]
        quotient = ring.multiply(ring.reduce(second - first), pow(p, -1, q))
        return first + p * quotient.astype(object)

    def centred(self, integers: np.ndarray) -> np.ndarray:
        return np.where(integers > self.modulus // 2, integers - self.modulus, integers)

    def request(self, request: RefreshRequest) -> list[tuple[Subring, list[np.ndarray], list[np.ndarray]]]:
        """Return subrings and components of the ciphertexts in a request, by prime: see the opener."""
        masked = self.opener.compact_request(request.to_bytes())
        assert (request.level, request.size) == (1, len(masked))
        return masked

    def ciphertext(self, ciphertext: Ciphertext) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the components of a computed ciphertext modulo Q, in NTT form."""
        data = ciphertext.to_bytes()
        assert data[64] == ciphertext.degree == 1
        at, components = 64 + 8 + 20, []
        for _ in range(2):
            component = []
            for prime in self.parameters.q[: ciphertext.level + 1]:
                component.append(self._unpacked(data, at, prime.bit_length()))
                at += self.size * prime.bit_length() // 8
            components.append(component[:2])
        assert at == len(data) - 4
        return components[0], components[1]

    def _unpacked(self, data: bytes, at: int, width: int) -> np.ndarray:
        bits = np.unpackbits(
            np.frombuffer(data, np.uint8, self.size * width // 8, at), bitorder="little"
        ).reshape(self.size, width)
        low, high = (
            (part.astype(np.uint64) << np.arange(part.shape[1], dtype=np.uint64)).sum(1, dtype=np.uint64)
            for part in (bits[:, :32], bits[:, 32:])
        )
        return (low | high << np.uint64(32)).astype(np.int64)


@dataclass
class View:
    """What a client decrypts in the refreshes of one evaluation, and what it must not learn."""

    seen: list[np.ndarray] = field(default_factory=list)
    """Integers modulo Q, one array a ciphertext: coefficients of its subring."""
    true: list[np.ndarray] = field(default_factory=list)
    """The integers under the masks, centred."""
    second: list[list[np.ndarray]] = field(default_factory=list)
    """The second components as they were sent, by prime in NTT form."""
    unmasked_second: list[list[np.ndarray]] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    """Of the integers' sizes, of each message that the client takes apart."""


class Watched:
    """A masked refresh that notes both sides, and answers with what the client answered."""

    def __init__(self, evaluator, public_key, secret_key, decryption, view: View) -> None:
        self._evaluator, self._decryption, self._view = evaluator, decryption, view
        self._public_key, self._secret_key = public_key, secret_key
        self._masked = MaskedRefresh(evaluator, public_key, self._exchange)

    def __call__(self, ciphertexts, held, level, shift):
        for ciphertext, subrings in zip(ciphertexts, held, strict=True):
            c0, c1 = self._decryption.ciphertext(self._evaluator.drop_level(ciphertext, 1))
            integers = self._decryption.centred(self._decryption.integers(c0, c1))
            self._view.true.append(known(sent(subrings), integers))
            half = len(integers) // 2
            divided = np.concatenate([integers[half:], -integers[:half]])  # by X^(N/2), the imaginary unit
            for subring, message in zip(subrings, (integers, divided), strict=False):
                self._view.sums.append(sum(abs(int(value)) for value in known(subring, message)))
            self._view.unmasked_second.append(c1)
        return self._masked(ciphertexts, held, level, shift)

    def _exchange(self, request):
        for subring, c0, c1 in self._decryption.request(request):
            self._view.seen.append(self._decryption.compact(subring, c0, c1))
            self._view.second.append(c1)
        return self._secret_key.refresh(request)


@dataclass
class Parties:
    client: Client
    server: Server
    decryption: Decryption
    module: str

    def evaluate(self, ciphertext: Ciphertext, refresh=None) -> tuple[View, list[Ciphertext]]:
        """Evaluate the block on a prompt of three tokens."""
        view = View()
        session = self._session()
        if refresh is None:
            secret_key, public_key = self.client.secret_key, self.client.public_key()
            refresh = Watched(self.evaluator, public_key, secret_key, self.decryption, view)
        session.arithmetic._refresher = refresh
        results = session.evaluate(self.module, 1, [ciphertext], 3)
        session.close()
        return view, results

    def _session(self) -> Session:
        session = self.server.open(self._keys, self._public, self.client.refresh)
        self.evaluator = session.arithmetic.evaluator
        return session

    def prepare(self) -> None:
        self._keys, self._public = self.client.evaluation_keys(), self.client.public_key()


WIDTH = 32


@pytest.fixture(scope="module")
def parties() -> Parties:
    """A block of width 32."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=64, n_positions=16, n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=0)
        config.initializer_range = 0.3
        model = GPT2LMHeadModel(config).eval()
        texts = [torch.randint(0, 64, (8,)) for _ in range(20)]
    encrypted = get_encrypted_model(model, EncryptionConfig("all", scheme="ckks", tokens=4, context=8))
    encrypted.compile(texts)
    geometry = encrypted.placement.geometry
    [(name, remote)] = encrypted.remote_modules.items()
    module = Hosted(remote.exact.module.fitted(remote.ranges, geometry.context), remote.exact.prefixes)
    client = Client.generate(geometry)
    made = Parties(client, Server({name: module}, geometry), Decryption(client.secret_key), name)
    made.prepare()
    return made


def hidden(seed: int, size: float) -> np.ndarray:
    """Hidden states (3, width) of mean zero."""
    x = np.random.default_rng(seed).normal(size=(3, WIDTH))
    x -= x.mean(1, keepdims=True)
    return size * x / x.std()


@pytest.fixture(scope="module")
def views(parties) -> list[View]:
    """Two evaluations of the same ciphertext, and one of a very different text."""
    first = parties.client.encrypt(hidden(1, 0.5), 1)[0]
    other = parties.client.encrypt(np.repeat(hidden(2, 0.25)[:1], 3, axis=0), 1)[0]
    return [parties.evaluate(ciphertext)[0] for ciphertext in (first, first, other)]


def test_the_view_is_one(parties, views):
    """The arithmetic of this test is that of the engine: it finds the numbers that were encrypted."""
    parameters, decryption = parties.client.geometry.parameters, parties.decryption
    values = np.random.default_rng(5).normal(size=parameters.slots)
    plaintext = Plaintext.encode(parameters, values, 1)
    ciphertext = parties.client.secret_key.encrypt(plaintext)
    computed = parties.evaluator.add(ciphertext, ciphertext)
    found = decryption.centred(decryption.integers(*decryption.ciphertext(computed))).astype(float)
    exponents = np.array([pow(5, j, 2 * parameters.degree) for j in range(parameters.slots)])
    spectrum = np.fft.ifft(np.concatenate([found, np.zeros(parameters.degree)])) * 2 * parameters.degree
    slots = spectrum[exponents] / computed.scale
    assert np.abs(slots - 2 * values).max() < 1e-5
    for view in views:
        assert len(view.seen) == len(view.true) >= 7
        # The intermediate values are small against Q, and not all alike.
        sizes = [max(abs(int(value)) for value in true) for true in view.true]
        assert max(sizes) < decryption.modulus >> 28
        assert min(np.std(true.astype(float)) for true in view.true) > 1e6
        # What is seen is not them, but them under masks.
        assert all(
            (seen != true % decryption.modulus).mean() > 0.999
            for seen, true in zip(view.seen, view.true, strict=True)
        )


# What makes integers modulo Q look like masked ones.


def fraction(integers: np.ndarray, modulus: int) -> np.ndarray:
    """Integers modulo Q as numbers in [0, 1)."""
    return (integers % modulus * (1 << 53) // modulus).astype(float) / 2**53


def features(integers: np.ndarray, modulus: int) -> dict[str, np.ndarray]:
    """Several views of integers modulo Q, each of which is uniform on BINS values if they are uniform.

    The lowest bits are not sent: 20 of the first component where a refresh divides by 2^16.
    """
    return {
        "high": (integers * BINS // modulus).astype(int),
        **{f"bits {bit}": (integers >> bit).astype(object) % BINS for bit in (20, 26, 36, 48, 64)},
    }


def chi_square(values: np.ndarray, bins: int = BINS) -> float:
    """How far counts are from uniform, in standard deviations of chi-square."""
    counts = np.bincount(values.astype(int), minlength=bins)
    mean = len(values) / bins
    return float((((counts - mean) ** 2 / mean).sum() - (bins - 1)) / np.sqrt(2 * (bins - 1)))


def not_uniform(ciphertexts: list[np.ndarray], modulus: int, blocks: int = 8) -> float:
    """The worst chi-square over blocks of coefficient positions, of all ciphertexts together and of each."""
    worst = 0.0
    for group in (
        [np.concatenate(parts) for parts in zip(*(np.split(c, blocks) for c in ciphertexts), strict=True)],
        ciphertexts,
    ):
        for values in group:
            worst = max(worst, *(chi_square(feature) for feature in features(values, modulus).values()))
    return worst


def correlated(seen: list[np.ndarray], true: list[np.ndarray], modulus: int) -> float:
    """The greatest correlation of what is seen with what it hides, in standard deviations."""
    worst = 0.0
    for a, b in zip(seen, true, strict=True):
        place = fraction(a, modulus)
        truth = b.astype(float)
        pairs = [
            (place, truth),
            (np.cos(2 * np.pi * place), truth),
            (np.sin(2 * np.pi * place), truth),
            (np.cos(2 * np.pi * place), np.abs(truth)),
            (np.abs(place - 0.5), np.abs(truth)),
            *(((a >> bit & 1).astype(float), (b >> bit & 1).astype(float)) for bit in (0, 1, 8, 20, 30)),
            # Under a mask of k bits, the bits above it are the message's.
            *(((a >> bit).astype(object) % 2, (b > 0)) for bit in (40, 60, 80)),
        ]
        for x, y in pairs:
            x, y = np.asarray(x, float), np.asarray(y, float)
            if x.std() and y.std():
                worst = max(worst, abs(np.corrcoef(x, y)[0, 1]) * np.sqrt(len(x)))
    return float(worst)


def different(first: list[np.ndarray], second: list[np.ndarray], modulus: int, blocks: int = 8) -> float:
    """Kolmogorov and Smirnov's distance of two distributions, times the root of n.

    The worst over blocks of positions, of all ciphertexts together, and over ciphertexts.
    """
    sides = [[fraction(c, modulus) for c in side] for side in (first, second)]
    groups = [
        [np.concatenate([np.split(c, blocks)[block] for c in side]) for side in sides]
        for block in range(blocks)
    ]
    worst = 0.0
    for a, b in (*groups, *zip(*sides, strict=True)):
        every = np.concatenate([a, b])
        distance = np.abs(
            np.searchsorted(np.sort(a), every, "right") / len(a)
            - np.searchsorted(np.sort(b), every, "right") / len(b)
        ).max()
        worst = max(worst, distance * np.sqrt(len(a) * len(b) / (len(a) + len(b))))
    return float(worst)


KS = 2.5  # exceeded once in 10^5 blocks by equal distributions


def weak(view: View, bits: int, modulus: int) -> list[np.ndarray]:
    """What the client would see under masks of some bits."""
    random = np.random.default_rng(bits)

    def mask(size: int) -> np.ndarray:
        words = [random.integers(0, 1 << 32, size).astype(object) << 32 * i for i in range(3)]
        return sum(words) % (1 << bits)

    return [(true + mask(len(true))) % modulus for true in view.true]


def test_what_is_seen_is_uniform(parties, views):
    modulus = parties.decryption.modulus
    for view in views:
        assert not_uniform(view.seen, modulus) < SIGMAS
    # Masks that lack a bit of Q's 86, or that hide by "statistics", or do not hide at all.
    for bits in (modulus.bit_length() - 2, 64, 40):
        assert not_uniform(weak(views[0], bits, modulus), modulus) > 10 * SIGMAS


def test_what_is_seen_does_not_go_with_what_is_hidden(parties, views):
    modulus = parties.decryption.modulus
    for view in views:
        assert correlated(view.seen, view.true, modulus) < SIGMAS
    for bits in (40, 36, 30):
        assert correlated(weak(views[0], bits, modulus), views[0].true, modulus) > 2 * SIGMAS
    # Without any mask.
    assert correlated([true % modulus for true in views[0].true], views[0].true, modulus) > 5 * SIGMAS


def test_texts_cannot_be_told_apart(parties, views):
    """Very different texts: the same distribution, to a test that tells them apart where masks are weak."""
    modulus = parties.decryption.modulus
    assert different(views[0].seen, views[2].seen, modulus) < KS
    assert different(views[0].seen, views[1].seen, modulus) < KS
    # Without masks; their numbers are small against Q, so that they are compared with a smaller modulus.
    size = max(abs(int(value)) for view in views for true in view.true for value in true)
    raw = [[true + size for true in views[i].true] for i in (0, 2)]
    assert different(*raw, 2 * size + 1) > 1.5 * KS


def test_refreshes_hardly_ever_wrap(parties, views):
    """The sum over coefficients of |m| / Q bounds the probability that a pass goes wrong."""
    modulus = parties.decryption.modulus
    for view in views:
        assert sum(view.sums) / modulus < 2**-28


def test_masks_are_never_used_again(parties, views):
    """Two evaluations of one ciphertext: equal numbers, and the difference of what is seen is uniform."""
    modulus = parties.decryption.modulus
    first, second = views[:2]
    differences = [(a - b) % modulus for a, b in zip(first.seen, second.seen, strict=True)]
    assert not_uniform(differences, modulus) < SIGMAS
    # One mask for both would leave the difference of the messages.
    reused = [(a - b) % modulus for a, b in zip(first.true, second.true, strict=True)]
    assert not_uniform(reused, modulus) > 10 * SIGMAS
    # And within one evaluation: no two ciphertexts have one mask.
    pairs = itertools.combinations(first.seen, 2)
    within = [(a - b) % modulus for a, b in pairs if len(a) == len(b)]
    assert len(within) >= 7
    assert not_uniform(within, modulus) < SIGMAS


def test_the_second_component_is_fresh(parties, views):
    """c1 of a computed ciphertext is a function of what the client sent; on the wire it is not.

    The same ciphertext was evaluated twice. Before the first refresh the server computes the same twice, so
    the client could know what c1 is; what it gets differs from that, and each time, by uniform polynomials.
    """
    first, second = views[:2]
    primes = parties.decryption.primes
    for limb, prime in enumerate(primes):
        assert (first.unmasked_second[0][limb] == second.unmasked_second[0][limb]).all()
        for a, b in (
            (first.second[0], first.unmasked_second[0]),
            (second.second[0], second.unmasked_second[0]),
            (first.second[0], second.second[0]),
        ):
            difference = (a[limb] - b[limb]) % prime
            coefficients = parties.decryption.rings[limb].intt(difference)
            for values in (difference, coefficients):
                assert chi_square((values * BINS // prime).astype(int)) < SIGMAS
                assert chi_square((values % BINS).astype(int)) < SIGMAS
                assert len(set(values.tolist())) > 0.99 * len(values)
    for view in views:
        for component in view.second:
            assert chi_square((component[0] * BINS // primes[0]).astype(int)) < SIGMAS


def test_a_weight_cannot_be_read_off_the_second_component(parties):
    """The attack that the fresh zero is against: divide what comes back by what was sent."""
    parameters, decryption = parties.client.geometry.parameters, parties.decryption
    weight = 12345
    ciphertext = parties.client.secret_key.encrypt(np.ones(parameters.slots), 1)
    sent = parties.evaluator.add(ciphertext, ciphertext)  # not seeded, to be read here
    product = parties.evaluator.multiply(sent, weight)

    def ratio(c1) -> np.ndarray:
        prime = decryption.primes[0]
        known = decryption.ciphertext(sent)[1][0]
        return c1[0] * np.array([pow(int(value), -1, prime) for value in known], object) % prime

    request, _ = parties.evaluator.mask([product], parties.client.public_key(), level=1)
    [(_, _, masked)] = decryption.request(request)
    result = parties.evaluator.rerandomize(product, parties.client.public_key(), flood=16)
    assert set(ratio(decryption.ciphertext(product)[1]).tolist()) == {weight}
    for c1 in (masked, decryption.ciphertext(result)[1]):
        ratios = ratio(c1)
        assert weight not in ratios
        assert len(set(ratios.tolist())) > 0.99 * len(ratios)


@pytest.mark.slow
def test_results_are_fresh_too(parties):
    """Twice the same evaluation, with the same refreshes: other ciphertexts, other noise, the same text."""
    ciphertext = parties.client.encrypt(hidden(1, 0.5), 1)[0]
    secret_key = parties.client.secret_key
    results = []
    for _ in range(2):
        _, [result] = parties.evaluate(ciphertext, InProcessRefresh(secret_key))
        results.append(result)
    decryption = parties.decryption
    (_, first), (_, second) = (decryption.ciphertext(parties.evaluator.drop_level(r, 1)) for r in results)
    for limb, prime in enumerate(decryption.primes):
        assert chi_square((((first[limb] - second[limb]) % prime) * BINS // prime).astype(int)) < SIGMAS
    rows = [parties.client.decrypt([result], 3, 1) for result in results]
    assert np.abs(rows[0] - rows[1]).max() < 1e-2 * np.abs(rows[0]).max()


def test_flooding_is_as_wide_as_it_says(parties):
    """The noise of a result is uniform in [-2^16, 2^16), with what the computation and the zero add."""
    parameters, decryption = parties.client.geometry.parameters, parties.decryption
    ciphertext = parties.client.secret_key.encrypt(np.zeros(parameters.slots), 1)
    plain = parties.evaluator.add(ciphertext, ciphertext)

    def noise(flood: int) -> np.ndarray:
        result = parties.evaluator.rerandomize(plain, parties.client.public_key(), flood=flood)
        before, after = (
            decryption.centred(decryption.integers(*decryption.ciphertext(c))) for c in (plain, result)
        )
        return (after - before).astype(float)

    flooded, bare = noise(16), noise(0)
    assert np.abs(bare).max() < 2**13
    assert 0.99 < np.abs(flooded).max() / 2**16 < 1.13
    assert 0.95 < flooded.std() / (2**17 / np.sqrt(12)) < 1.05
