"""Sessions use what the engine has: results leave with a zero and flooding, texts are encrypted afresh."""

from __future__ import annotations

import numpy as np

from cipherlm.engine import SecretKey
from cipherlm.nn.module import Module
from cipherlm.schemes.ckks import session
from cipherlm.schemes.ckks.geometry import Geometry
from cipherlm.schemes.ckks.session import Hosted, Server

from .conftest import Client
from .distributions import assert_ternary, assert_uniform, assert_unrelated
from .rings import minus, small
from .zeros import telltale

GEOMETRY = Geometry(heads=2, head_dim=4, tokens=2, prefix=0, context=4)


class Nothing(Module):
    def __call__(self, x):
        return x


def test_results_leave_with_a_zero_and_flooding():
    """A server whose module does nothing: what comes back are the client's ciphertexts, rerandomised."""
    client = Client(SecretKey.generate(GEOMETRY.parameters))
    opener, flood = client.opener, session.FLOOD
    assert flood >= 16
    room = 1 << (flood + 2)
    server = Server({"nothing": Hosted(Nothing(), ())}, GEOMETRY)
    keys = client.secret_key.evaluation_keys((), relinearization=False)
    key = telltale(client, room * opener.p[0].prime)
    opened = server.open(keys, key, client.secret_key.refresh)
    party, sums = session.Client(client.secret_key, GEOMETRY), []
    for tokens in (2, 4, 2, 4):  # one chunk, and two side by side
        sent = party.encrypt(np.ones((tokens, 8)), 0)
        assert len(sent) == tokens // 2
        for before, after in zip(sent, opened.evaluate("nothing", 0, sent, tokens), strict=True):
            first, _ = opener.ciphertext(after.to_bytes())
            added = minus(first, opener.seeded(before.to_bytes())[1])
            rings = opener.q[: len(added)]
            sums.append(
                small(rings, [ring.intt(ring.reduce(v)) for ring, v in zip(rings, added, strict=True)])
            )
    opened.close()
    factors = (np.stack(sums) + room // 2) // room
    noise = np.stack(sums) - room * factors
    assert_ternary(factors)
    assert_uniform(noise + (1 << flood), 2 << flood)
    assert_unrelated(np.concatenate([noise, factors]))


def test_equal_texts_are_encrypted_afresh():
    client = Client(SecretKey.generate(GEOMETRY.parameters))
    party = session.Client(client.secret_key, GEOMETRY)
    sent = [c for _ in range(4) for c in party.encrypt(np.ones((2, 8)), 0)]
    opened = [client.opener.seeded(ciphertext.to_bytes()) for ciphertext in sent]
    assert len({seed for seed, _, _ in opened}) == len(sent)
    ring = client.opener.q[0]
    *phases, last = (client.opener.phase([ring], f[:1], s[:1])[0] for _, f, s in opened)
    differences = np.stack([ring.centred(ring.reduce(phase - last)) for phase in phases])
    # The difference of two errors, of deviation 3.2 and at most 19 each.
    assert np.abs(differences).max() < 40
    assert (differences.std(1) > 4).all()
