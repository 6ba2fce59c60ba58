"""A whole model whose linear layers are at a server: the clear model's text, over a loopback connection."""

import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import StoppingCriteria

from cipherlm.serving.bundle import BundleError
from cipherlm.serving.errors import RemoteError, WrongModel
from cipherlm.serving.remote_linear import RemoteLinearModel
from linear.architectures import tiny
from linear.bundles import exported
from linear.test_serving import serving

GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
LAYERS = 2
PRODUCTS = 4 * LAYERS
"""Of one call of a Llama: queries with keys and values, output, gate with up, down."""


@pytest.fixture(scope="module")
def model():
    with serving() as (url, _), RemoteLinearModel.connect(url, bundle=exported() / "client") as made:
        yield made


def test_the_clear_models_text(model):
    ids = torch.tensor([[5, 17, 33, 40]])
    expected = tiny("llama").generate(ids, **GREEDY)
    assert model.generate(ids, **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_other_architectures(architecture):
    root = exported(architecture)
    ids = torch.tensor([[5, 17, 33]])
    with serving(root) as (url, _), RemoteLinearModel.connect(url, bundle=root / "client") as made:
        expected = tiny(architecture).generate(ids, **GREEDY)
        assert made.generate(ids, **GREEDY).tolist() == expected.tolist()


def test_a_model_that_generates_nothing():
    root = exported("bert")
    ids = torch.tensor([[5, 17, 33]])
    with serving(root) as (url, _), RemoteLinearModel.connect(url, bundle=root / "client") as made:
        found, expected = made(input_ids=ids), tiny("bert")(input_ids=ids)
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=0.01)


def test_batches_with_padding_and_beams(model):
    ids = torch.tensor([[0, 0, 9, 17], [12, 8, 33, 40]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {**GREEDY, "attention_mask": mask, "num_beams": 2}
    assert model.generate(ids, **options).tolist() == tiny("llama").generate(ids, **options).tolist()


def exchanges(model, ids, **options):
    before = model.products.traffic.exchanges
    text = model.generate(ids, **{**GREEDY, **options})
    return model.products.traffic.exchanges - before, text


class AtOnce(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.ones(len(input_ids), dtype=torch.bool)


def test_the_server_does_not_learn_when_a_text_ends(model):
    ids = torch.tensor([[5, 17, 33, 40]])
    whole, _ = exchanges(model, ids)
    ended, text = exchanges(model, ids, stopping_criteria=[AtOnce()])
    shown, _ = exchanges(model, ids, stopping_criteria=[AtOnce()], reveal_length=True)
    assert text.shape[1] == 5
    assert whole == ended == 6 * PRODUCTS
    assert shown == PRODUCTS
    with pytest.raises(ValueError, match="reveal_length=True"):
        exchanges(model, ids, prompt_lookup_num_tokens=2)


def test_a_fault_of_the_clients_own_does_not_end_it_earlier(model):
    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            raise ArithmeticError("broken")

    before = model.products.traffic.exchanges
    with pytest.raises(ArithmeticError):
        model.generate(torch.tensor([[5, 17]]), stopping_criteria=[Broken()], **GREEDY)
    assert model.products.traffic.exchanges - before == 6 * PRODUCTS


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -1e300])
def test_numbers_of_no_model_do_not_end_it_earlier(model, monkeypatch, bad):
    """A server chooses what is decrypted: the client asks for the next product, whatever that is."""
    decrypt = model.products._client.decrypt
    monkeypatch.setattr(
        model.products._client, "decrypt", lambda *args, **options: 0 * decrypt(*args, **options) + bad
    )
    count, _ = exchanges(model, torch.tensor([[5, 17, 33, 40]]))
    assert count == 6 * PRODUCTS


@pytest.mark.parametrize(("begin", "kept"), [([9, 8, 7], 3), ([9, 8, 20], 2), ([20], 0)])
def test_a_public_prefix_is_not_sent(begin, kept):
    root = exported(prefix="w9 w8 w7")
    ids = torch.tensor([begin + [30] * 20])
    with serving(root) as (url, _), RemoteLinearModel.connect(url, bundle=root / "client") as made:
        sent = []
        product = made.products.product
        made.products.product = lambda group, x, **o: sent.append(len(x)) or product(group, x, **o)
        found = made.generate(ids, **GREEDY)
        assert made.prompt_ids("w30 w31")[0].tolist() == [[9, 8, 7, 30, 31]]
    assert sent[0] == ids.shape[1] - kept
    assert found.tolist() == tiny("llama").generate(ids, **GREEDY).tolist()


def test_a_chat_has_the_system_message_that_was_exported():
    root = exported(system="w9 w8")
    with serving(root) as (url, _), RemoteLinearModel.connect(url, bundle=root / "client") as made:
        ids, frame = made.prompt_ids("w30")
        assert made.tokenizer.decode(ids[0]) == "<s> system w9 w8 </s> <s> user w30 </s> <s> assistant"
        assert frame == ids.shape[1]
        assert ids[0, : len(made.prefix)].tolist() == made.prefix


def test_keys_serve_so_many_texts():
    ids = torch.tensor([[5, 17, 33]])
    options = {"bundle": exported() / "client", "key_budget": 2}
    with serving() as (url, _), RemoteLinearModel.connect(url, **options) as made:
        texts = [made.generate(ids, **GREEDY).tolist() for _ in range(5)]
        assert made.products.traffic.connections == 3
    assert texts == [texts[0]] * 5


def test_a_server_of_another_model():
    with serving(exported(seed=1)) as (url, _), pytest.raises(WrongModel, match="client bundle"):
        RemoteLinearModel.connect(url, bundle=exported() / "client")


def test_a_bundle_for_the_server_is_none_for_clients(model):
    with pytest.raises(BundleError, match="for the server"):
        RemoteLinearModel.connect(model.products.url, bundle=exported() / "server")


def test_a_server_that_restarts_amid_a_generation(model):
    ids = torch.tensor([[5, 17, 33, 40]])
    calls, found = [], []
    amid, goes_on = threading.Event(), threading.Event()

    def product(group, x, **options):
        calls.append(group)
        if len(calls) == 3 * PRODUCTS:
            amid.set()
            assert goes_on.wait(60)
        return original(group, x, **options)

    with serving() as (url, _):
        made = RemoteLinearModel.connect(url, bundle=exported() / "client")
        original, made.products.product = made.products.product, product
        generation = threading.Thread(target=lambda: found.append(made.generate(ids, **GREEDY).tolist()))
        generation.start()
        assert amid.wait(60)
    with serving(port=int(url.rpartition(":")[2])), made:
        goes_on.set()
        generation.join(60)
        assert made.products.traffic.connections == 2
    assert found == [model.generate(ids, **GREEDY).tolist()]


class Shown:
    """Progress that keeps what it shows."""

    def __init__(self):
        self.lines, self.open = [], 0

    @contextmanager
    def __call__(self, step):
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def detail(self, text):
        self.lines.append(text)


def test_how_far_a_token_is():
    shown = Shown()
    options = {"bundle": exported() / "client", "progress": shown}
    with serving() as (url, _), RemoteLinearModel.connect(url, **options) as made:
        made(input_ids=torch.tensor([[5]]))
        assert shown.lines == [f"product {number} of {PRODUCTS}" for number in range(1, PRODUCTS + 1)]
        made.close()
        with pytest.raises(RemoteError, match="is closed"):
            made(input_ids=torch.tensor([[5]]))
    assert shown.open == 0


def test_gradients_at_the_client():
    root = exported(training=True)
    ids = torch.tensor([[5, 17, 33, 40]])
    with serving(root) as (url, _), RemoteLinearModel.connect(url, bundle=root / "client") as made:
        gradients = []
        for model in (made.model, tiny("llama")):
            model(input_ids=ids, labels=ids).loss.backward()
            gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(*gradients, atol=0.01 * float(gradients[1].abs().max()))
    assert gradients[1].abs().max() > 0
