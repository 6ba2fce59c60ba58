"""What the form of refresh requests tells a client: the circuit, and of ranges no more than degrees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.engine import RefreshRequest
from cipherlm.schemes.ckks.session import Client, Hosted, Server

WIDTH = 32


class Requests:
    """Evaluates blocks that differ in their weights, for one client, and notes the form of each request."""

    def __init__(self) -> None:
        self.client: Client | None = None

    def of(self, factor: float) -> tuple[list[tuple[int, int, int, int]], tuple[float, float]]:
        """Return the requests of a block whose MLP has larger inputs by a factor, and GELU's range there."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = GPT2Config(
                vocab_size=64, n_positions=16, n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=0
            )
            config.initializer_range = 0.3
            model = GPT2LMHeadModel(config).eval()
            texts = [torch.randint(0, 64, (8,)) for _ in range(20)]
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight *= factor
        encrypted = get_encrypted_model(model, EncryptionConfig("all", scheme="ckks", tokens=4, context=8))
        encrypted.compile(texts)
        geometry = encrypted.placement.geometry
        [(name, remote)] = encrypted.remote_modules.items()
        module = Hosted(remote.exact.module.fitted(remote.ranges, geometry.context), remote.exact.prefixes)
        if self.client is None:
            self.client = Client.generate(geometry)
            self.keys = self.client.evaluation_keys(), self.client.public_key()
        client, seen = self.client, []

        def exchange(request: RefreshRequest):
            seen.append((request.level, request.to_level, request.shift, request.size))
            return client.refresh(request)

        hidden = np.random.default_rng(0).normal(size=(3, WIDTH))
        hidden -= hidden.mean(1, keepdims=True)
        session = Server({name: module}, geometry).open(*self.keys, exchange)
        session.evaluate(name, 1, client.encrypt(0.5 * hidden, 1), 3)
        session.close()
        return seen, remote.ranges["blocks.0.mlp.act.inputs"]


@pytest.fixture(scope="module")
def requests() -> Requests:
    return Requests()


def test_requests_tell_nothing_of_ranges(requests):
    """Beyond which of two degrees an activation has, which shows in what is refreshed behind it.

    Of scores, which are the same here, the degrees of softmax show, and the number of its squarings.
    """
    (narrow, few), (wider, more) = requests.of(1), requests.of(1.5)
    assert more[1] > 1.4 * few[1]
    assert narrow == wider
    assert len(narrow) >= 7
    widest, most = requests.of(4)
    assert most[1] > 3 * few[1]
    assert {shift for _, _, shift, _ in widest} == {shift for _, _, shift, _ in narrow} == {8, 16}


@pytest.mark.slow
def test_a_range_that_no_scale_fits_is_refused(requests):
    with pytest.raises(ValueError, match="range of a function is too wide"):
        requests.of(30000)
