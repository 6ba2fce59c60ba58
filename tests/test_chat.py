"""Conversations: the same answers as without a cache, turn after turn."""

import contextlib
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cipherlm
from cipherlm.cli import main
from cipherlm.linear.prefix import public_prefix_cache
from cipherlm.models.chat import Chat, public_head, template_ids

WORDS = ["<s>", "</s>", "<u>", "<a>", *(f"w{i}" for i in range(42)), "a", "b"]
TEMPLATE = (
    "<s> {% for m in messages %}{{ {'system': '', 'user': '<u> ', 'assistant': '<a> '}[m.role] }}"
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def answer_without_cache(model, tokenizer, messages, tokens):
    ids = torch.tensor([template_ids(tokenizer, messages)])
    generated = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("with_prefix", [False, True])
def test_turns_equal_those_without_a_cache(tokenizer, with_prefix):
    model = llama()
    prefix = None
    if with_prefix:
        prefix = public_prefix_cache(model, torch.tensor(public_head(tokenizer, "w5 w6")))
    chat = Chat(model, tokenizer, system="w5 w6", prefix=prefix)
    messages = list(chat.messages)
    for number, question in enumerate(["w7 w8", "w9", "w10 w11 w12"]):
        pieces = []
        turn = chat.reply(question, max_new_tokens=5, on_text=pieces.append)
        messages.append({"role": "user", "content": question})
        assert turn.text == answer_without_cache(model, tokenizer, messages, 5)
        assert "".join(pieces).strip() == turn.text
        messages.append({"role": "assistant", "content": turn.text})
        assert chat.messages == messages
        if number or with_prefix:
            assert turn.cached_tokens > 0
        assert turn.cached_tokens + turn.prompt_tokens == len(template_ids(tokenizer, messages[:-1]))


def test_encrypted_turns(tokenizer):
    clear = Chat(llama(), tokenizer)
    model = cipherlm.get_encrypted_model(llama(), cipherlm.EncryptionConfig("linear", scheme="ckks"))
    model.set_fhe_mode("execute")
    encrypted = Chat(model, tokenizer)
    for question in ("w7 w8", "w9"):
        assert (
            encrypted.reply(question, max_new_tokens=3).text == clear.reply(question, max_new_tokens=3).text
        )


def test_the_public_head_is_what_conversations_share(tokenizer):
    head = public_head(tokenizer, "w5")
    assert tokenizer.decode(head) == "<s> w5 <u>"


def test_what_cannot_be(tokenizer):
    chat = Chat(llama(), tokenizer)
    with pytest.raises(ValueError, match="beyond the model's context of 64"):
        chat.reply("w7", max_new_tokens=62)
    assert chat.messages == []
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        Chat(llama(), plain)
    plain.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="chat template fails: no such role"):
        Chat(llama(), plain)


def whole(tokenizer, system=None):
    head = public_head(tokenizer, system)
    model = cipherlm.get_encrypted_model(llama(), cipherlm.EncryptionConfig(prefix=head, context=64))
    texts = torch.randint(2, len(WORDS), (12, 60), generator=torch.Generator().manual_seed(4))
    model.calibrate([text for text in texts])
    return model


def test_turns_of_a_whole_model(tokenizer):
    """All blocks are remote: the cache of transformers has the text, and only new tokens are evaluated."""
    clear = Chat(llama(), tokenizer, system="w5 w6")
    model = whole(tokenizer, "w5 w6")
    model.set_fhe_mode("simulate")
    encrypted = Chat(model, tokenizer, system="w5 w6")
    for question in ("w7 w8", "w9", "w10 w11 w12"):
        turn, expected = (chat.reply(question, max_new_tokens=4) for chat in (encrypted, clear))
        assert turn.text == expected.text
        assert turn.prompt_tokens == expected.prompt_tokens
    with pytest.raises(ValueError, match="beyond the model's context of 64"):
        encrypted.reply("w7", max_new_tokens=60)


@pytest.mark.parametrize(
    "arguments",
    [["--mode", "simulate"], ["--mode", "simulate", "--prompt-lookup", "3"], ["--placement", "linear"]],
)
def test_the_verb(tokenizer, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    clear = Chat(llama(), tokenizer).reply("w7 w8", max_new_tokens=3)
    if arguments[0] == "--mode":
        arguments = [*arguments, "--context", "64"]
    common = ["chat", "--model", str(tmp_path / "model"), "--max-new-tokens", "3", "w7 w8", "--json"]
    for _ in range(2):  # the second time with the ranges that the first one found
        assert main([*common, *arguments]) == 0
        (turn,) = json.loads(capsys.readouterr().out)["turns"]
        assert turn["answer"] == clear.text
    kept = list((tmp_path / "cache").rglob("calibration.json"))
    assert len(kept) == (arguments[0] == "--mode")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "20", "--system", "w1 " * 30], "leaves no room"),
        (["--context", "65"], "more than the 64 tokens of the model"),
        (["--context", "64", "--max-new-tokens", "62"], "beyond the model's context of 64"),
        (["--placement", "linear", "--context", "64"], "--context is for the placement whole"),
    ],
)
def test_wrong_use_of_the_verb(tokenizer, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["chat", "--model", str(tmp_path / "model"), "--mode", "simulate", "w7", *arguments]
    with contextlib.suppress(SystemExit):  # wrong usage, which argparse ends with
        assert main(options) in (1, 2)
    assert message in capsys.readouterr().err
