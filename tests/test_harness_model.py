"""The model for lm-evaluation-harness, and its tasks. `make test-newest` has the harness."""

import math
import socket

import pytest
import torch

pytest.importorskip("lm_eval", reason='needs lm-evaluation-harness: pip install "cipherlm[eval]"')

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cipherlm import load_model, load_tokenizer
from cipherlm.evaluation.harness import TASKS
from cipherlm.evaluation.harness.model import CipherLM

PAIRS = [
    ("The old man sat down by the", " fire"),
    ("The old man sat down by the", " river and slept"),
    ("She opened the window", " and looked at the sea"),
    ("", "The king"),
]
TEXTS = [("The old man looked at the sea, and then he went back to the house." * 8,), ("The king was fond.",)]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing of this needs one."""

    def refuse(*_):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def clear() -> HFLM:
    return HFLM(pretrained=load_model("tiny"), tokenizer=load_tokenizer("tiny"), batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_linear_layers_in_the_clear_are_the_harnesss_own_model(clear, batch_size):
    model = CipherLM("tiny", placement="linear", mode="clear", batch_size=batch_size)
    for kind, given in (("loglikelihood", PAIRS), ("loglikelihood_rolling", TEXTS)):
        found = getattr(model, kind)(requests(kind, given), disable_tqdm=True)
        expected = getattr(clear, kind)(requests(kind, given), disable_tqdm=True)
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-3)


def test_a_whole_model_reads_the_public_prefix_once(clear):
    """What the harness puts the first token before is as it is; other texts come behind it."""
    model = CipherLM("tiny", mode="clear", context=48)
    assert model.max_length == 47
    (empty,) = model.loglikelihood(requests("loglikelihood", PAIRS[3:]), disable_tqdm=True)
    (expected,) = clear.loglikelihood(requests("loglikelihood", PAIRS[3:]), disable_tqdm=True)
    assert empty == pytest.approx(expected, abs=1e-3)
    found = model.loglikelihood(requests("loglikelihood", PAIRS[:3]), disable_tqdm=True)
    tokenizer, reference = load_tokenizer("tiny"), load_model("tiny")
    for (context, continuation), (value, _) in zip(PAIRS[:3], found, strict=True):
        ids = torch.tensor([[0, *tokenizer(context + continuation)["input_ids"]]])
        start = 1 + len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            log = reference(ids).logits[0].log_softmax(-1)
        expected = sum(log[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
        assert value == pytest.approx(expected, abs=1e-3)


def test_simulated_ciphertexts_change_little():
    clear, simulated = (CipherLM("tiny", mode=mode, context=32) for mode in ("clear", "simulate"))
    found, expected = (
        model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        for model in (simulated, clear)
    )
    for (one, greedy), (other, greedy_in_clear) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=0.01)
        assert one != other
        assert greedy == greedy_in_clear


@pytest.mark.parametrize("placement", ["whole", "linear"])
def test_generation(clear, placement):
    model = CipherLM("tiny", placement=placement, mode="clear")
    given = [("The old man sat down by the", {"until": ["\n"], "max_gen_toks": 5})]
    (text,) = model.generate_until(requests("generate_until", given), disable_tqdm=True)
    if placement == "linear":
        assert [text] == clear.generate_until(requests("generate_until", given), disable_tqdm=True)
    else:
        tokenizer = load_tokenizer("tiny")
        ids = torch.tensor([[0, *tokenizer(given[0][0])["input_ids"]]])
        generated = load_model("tiny").generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert text == tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    stop = text.strip()[:3]
    given = [(given[0][0], {"until": [stop], "max_gen_toks": 5})]
    (shorter,) = model.generate_until(requests("generate_until", given), disable_tqdm=True)
    assert stop not in shorter


@pytest.mark.parametrize("placement", ["whole", "linear"])
def test_the_packages_tasks(placement):
    results = simple_evaluate(
        model="cipherlm",
        model_args={"pretrained": "tiny", "placement": placement, "mode": "simulate"},
        tasks=["cipherlm_choice", "cipherlm_text"],
        task_manager=TaskManager(include_path=str(TASKS)),
        limit=12,
        bootstrap_iters=0,
    )
    assert results["n-samples"]["cipherlm_choice"] == {"original": 50, "effective": 12}
    assert results["results"]["cipherlm_choice"]["acc,none"] > 0.5  # one of four
    assert 2 < results["results"]["cipherlm_text"]["byte_perplexity,none"] < 5
    assert math.isfinite(results["results"]["cipherlm_text"]["word_perplexity,none"])
    assert (results["config"]["placement"], results["config"]["mode"]) == (placement, "simulate")


@pytest.mark.slow
def test_ciphertexts_score_as_the_clear_model(clear):
    model = CipherLM("tiny", placement="linear", mode="execute")
    found = model.loglikelihood(requests("loglikelihood", PAIRS[:2]), disable_tqdm=True)
    expected = clear.loglikelihood(requests("loglikelihood", PAIRS[:2]), disable_tqdm=True)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"placement": "heads"}, "placement must be one of whole, linear"),
        ({"mode": "fast"}, "mode must be one of clear"),
        ({"batch_size": 4}, "one text at a time"),
        ({"placement": "linear", "context": 32}, "context and chat are for placement=whole"),
        ({"chat": True}, "no chat template"),
        ({"pretrained": "./nothing"}, "no model"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CipherLM(**arguments)
