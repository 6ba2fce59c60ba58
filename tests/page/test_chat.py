"""A chat model in the page: a Llama with random weights, its template, and a long public prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cipherlm import EncryptionConfig, get_encrypted_model, load_tokenizer
from cipherlm.models.chat import public_head, template_ids
from cipherlm.serving import bundle as bundles
from tests.page.browsing import Tab
from tests.serving import small

TEMPLATE = (
    "{{ bos_token }}system\nBe brief.{% for message in messages %}{{ eos_token }}{{ message['role'] }}\n"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ eos_token }}assistant\n{% endif %}"
)
QUESTIONS, NEW, CONTEXT = ("the sea?", "so"), 2, 48


def tokenizer() -> Any:
    made = load_tokenizer("tiny")
    made.chat_template = TEMPLATE
    return made


def clear_model() -> LlamaForCausalLM:
    """The same weights in every call; large enough that tokens differ clearly in their logits."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=30, intermediate_size=50, num_hidden_layers=1, num_attention_heads=3,
            num_key_value_heads=1, head_dim=10, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(1.0, 0.2)
            else:
                weight.normal_(std=1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, built_page: Path) -> Iterator[small.Process]:
    directory = tmp_path_factory.mktemp("chat")
    prefix = public_head(tokenizer())
    assert len(prefix) > 8  # more than a ciphertext has room for
    encryption = EncryptionConfig(scheme="ckks", tokens=8, context=CONTEXT, prefix=prefix)
    model = get_encrypted_model(clear_model(), encryption)
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(2, 4096, (CONTEXT - len(prefix),), generator=generator) for _ in range(20)]
    model.compile([torch.cat([torch.tensor(prefix), text])[:CONTEXT] for text in texts])
    bundles.export(model, directory / "bundle", tokenizer(), name="a small chat model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "exported", lambda placement: directory / "bundle")
        with small.process("all", directory, "--page") as process:
            yield process


def reply(messages: list[dict[str, str]], count: int) -> str:
    """The clear model's greedy answer."""
    ids = template_ids(tokenizer(), messages)
    with torch.inference_mode():
        new = clear_model().generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[
            0, len(ids) :
        ]
    return str(tokenizer().decode(new, skip_special_tokens=True))


def test_a_conversation(server: small.Process, open_tab: Callable[..., Tab]) -> None:
    """What the model answers depends on what was said before, the system prompt among it."""
    tab = open_tab(server.url)
    tab.connect()
    tab.make_keys()
    tab.ready()
    assert tab.said("#text-label") == "Your question"
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        tab.ask(question, NEW)
        tab.finished()
        answer = reply(messages, NEW)
        assert tab.answer() == answer
        messages.append({"role": "assistant", "content": answer})
    tab.press("#clear")
    assert tab.page.locator("#log .said").count() == 0
