"""What a client that cheats reads of weights: limits that docs/security.md states, with their figures."""

from __future__ import annotations

import numpy as np
import pytest

from cipherlm.engine import Plaintext, RefreshRequest, Subring
from tests.ckks.test_secrecy import Decryption, hidden, parties  # noqa: F401
from tests.encryption.frames import Payload, dropped, frame, packed_rounded
from tests.encryption.subrings import known, sent, size_of


def offset(decryption: Decryption, request: RefreshRequest, slots: np.ndarray) -> RefreshRequest:
    """Return a request with numbers added under the mask of its first ciphertext: so is the reply then."""
    parameters, data = request.parameters, request.to_bytes()
    scale = parameters.scale * 2.0**request.shift
    added = decryption.opener.plaintext(Plaintext.encode(parameters, slots, 1, scale).to_bytes())
    zero = [np.zeros_like(residues) for residues in added]
    payload = Payload(data, 7)
    lost = dropped(decryption.size, 1, request.shift)[0]
    head = payload.bytes(9)
    codes = payload.bytes(head[8])
    subring = sent([Subring(1 << (code & 0x7F), bool(code & 0x80)) for code in codes])
    first = payload.rounded(decryption.rings, lost, size_of(subring, decryption.size))
    first = (first + known(subring, decryption.integers(added, zero))) % decryption.modulus
    changed = head + codes + packed_rounded(first, decryption.rings, lost) + payload.rest()
    return RefreshRequest.from_bytes(frame(data[:64], changed), parameters)


@pytest.mark.slow
def test_offsets_in_a_refresh_read_rows_of_a_layer(parties):  # noqa: F811
    """Added to inputs of the last GELU, an offset changes the output by a row of the layer behind it."""
    client, session = parties.client, parties._session()
    layout = client.geometry.layout
    features = {1: 5, 2: 17, 3: 30}  # token: input of GELU
    added = np.zeros((layout.period, layout.tokens))
    for token, feature in features.items():
        added[feature, token] = 0.02

    def run(tampered: int | None = None) -> tuple[np.ndarray, int]:
        rounds = 0

        def exchange(request: RefreshRequest):
            nonlocal rounds
            rounds += 1
            if rounds == tampered:
                request = offset(parties.decryption, request, layout.repeated(added).astype(complex))
            return client.secret_key.refresh(request)

        session.arithmetic._refresher._exchange = exchange
        [result] = session.evaluate(parties.module, 1, client.encrypt(hidden(1, 0.5), 1), 3)
        return client.decrypt([result], 3, 1), rounds

    honest, rounds = run()
    difference = run(rounds)[0] - honest
    session.close()
    weight = parties.server.modules[parties.module].module.blocks[0].mlp.c_proj.weight
    for token, feature in features.items():
        change, row = difference[token - 1], weight[feature]
        cosine = change @ row / np.linalg.norm(change) / np.linalg.norm(row)
        assert abs(cosine) > 0.999  # GELU falls below -0.75
