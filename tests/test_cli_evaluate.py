"""`cipherlm evaluate` with CKKS: conversations and sentences, whole and linear, and errors by block."""

import json

import pytest
import torch

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.cli import main
from cipherlm.evaluation.behind import BehindPrefix, behind
from cipherlm.evaluation.blocks import block_parts, encrypted_within, logit_errors, only
from cipherlm.evaluation.prompts import Answered, answered, chat_prompts, compared
from cipherlm.evaluation.texts import calibration_sentences

CKKS = ("--scheme", "ckks", "--context", "24")
TEMPLATE = "<|endoftext|>{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture
def few(tmp_path) -> tuple[str, str]:
    """Options that calibrate on some of the sentences only."""
    path = tmp_path / "calibration.txt"
    path.write_text("\n".join(calibration_sentences()[:12]))
    return ("--calibration", str(path))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """The embedded model with a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    load_model("tiny").save_pretrained(directory)
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return str(directory)


def written(path, *questions: str) -> str:
    chats = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    path.write_text("\n".join(map(json.dumps, chats)))
    return str(path)


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments: str) -> str:
    assert main(list(arguments)) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_sentences(capsys, tmp_path, few):
    text = tmp_path / "text.txt"
    text.write_text("The old man looked at the sea, and then he went back to the house.")
    arguments = ("evaluate", *CKKS, *few, "--limit", "6", "--perplexity", str(text), "--window", "12")
    figures = run_json(capsys, *arguments)
    assert (figures["mode"], figures["sentences"], figures["modules"]) == ("simulate", 6, ["transformer.h"])
    assert figures["top1"] > 0.97
    assert figures["top1"] <= figures["top5"] <= figures["top10"] <= 1
    assert figures["perplexity"] == pytest.approx(figures["clear_perplexity"], rel=0.01)
    parts = figures["parts"]
    assert parts["prompts"]["positions"] + parts["answers"]["positions"] == figures["positions"]
    assert 0 < parts["all"]["kl"] < 1e-4
    assert parts["all"]["kl"] <= parts["all"]["worst_kl"]
    assert parts["all"]["perplexity"] == pytest.approx(parts["all"]["clear_perplexity"], rel=1e-3)
    assert figures["greedy"] == {
        "answers": 6, "equal_answers": 6, "mean_equal_tokens": 8, "mean_tokens": 8
    }  # fmt: skip
    assert main([*arguments]) == 0
    shown = capsys.readouterr().out
    assert "with the noise of ciphertexts" in shown
    assert "top-1 " in shown
    assert "6 of 6 are the same to the end" in shown


def test_no_position_of_the_prefix_counts(capsys, tmp_path, few):
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("The dog slept by the door.\n")
    arguments = ("--sentences", str(sentences), "--mode", "disable", "--max-new-tokens", "1")
    figures = run_json(capsys, "evaluate", *CKKS, *few, *arguments)
    tokens = len(load_tokenizer("tiny")("The dog slept by the door.")["input_ids"])
    assert figures["positions"] == tokens
    assert figures["parts"]["answers"]["positions"] == 1


@pytest.mark.parametrize("modules", [(), ("--target-modules", "linear")])
def test_chats(capsys, tmp_path, chat_model, modules):
    chats = written(tmp_path / "chats.jsonl", "Where is the old man?", "The sea " * 90)
    calibration = written(tmp_path / "calibration.jsonl", "Who has seen the king?", "What did the boy say?")
    options = () if modules else ("--calibration", calibration, "--context", "32")
    # The second conversation is longer than the context; linear layers have the model's.
    longest = ("--max-new-tokens", "5", "--chats", chats)
    figures = run_json(capsys, "evaluate", "--model", chat_model, *longest, *options, *modules)
    tokenizer = load_tokenizer(chat_model)
    prompts = [len(tokenizer(f"{q}\n")["input_ids"]) for q in ("Where is the old man?", "The sea " * 90)]
    counted = prompts if modules else prompts[:1]
    assert (figures["chats"], figures["left_out"]) == (len(counted), 2 - len(counted))
    assert figures["prefix_tokens"] == 1
    assert figures["placement"] == ("linear" if modules else "modules")
    assert figures["parts"]["prompts"]["positions"] == sum(counted) - len(counted)
    assert figures["parts"]["answers"]["positions"] == 5 * len(counted)
    assert figures["top1"] > 0.97
    assert 0 < figures["parts"]["all"]["kl"] < 1e-3


def test_a_model_that_was_saved_without_ranges(capsys, tmp_path, few):
    config = EncryptionConfig(["transformer.h.3"], context=24)
    get_encrypted_model(load_model("tiny"), config).save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    figures = run_json(capsys, "evaluate", "--model", str(tmp_path), *few, "--limit", "1")
    assert figures["modules"] == ["transformer.h.3"]
    assert figures["top1"] > 0.9


def test_the_packages_chats_are_the_default(capsys, chat_model):
    options = ("--limit", "2", "--mode", "disable", "--target-modules", "linear", "--max-new-tokens", "2")
    figures = run_json(capsys, "evaluate", "--model", chat_model, *options)
    assert (figures["chats"], figures["top1"]) == (2, 1.0)
    # A layer in the mode "disable" is the clear one, but for its own rounding.
    assert figures["parts"]["all"]["worst_kl"] < 1e-9


def test_the_context_is_as_long_as_the_chats_need(capsys, tmp_path, chat_model):
    calibration = written(tmp_path / "calibration.jsonl", "Who has seen the king?", "What did the boy say?")
    chats = written(tmp_path / "chats.jsonl", "The sea and the land " * 18)
    options = ("--chats", chats, "--calibration", calibration, "--mode", "disable", "--max-new-tokens", "3")
    figures = run_json(capsys, "evaluate", "--model", chat_model, *options)
    assert figures["left_out"] == 0
    assert figures["positions"] > 64  # the default context


@pytest.mark.parametrize("modules", ["all", "linear"])
def test_errors_by_block(capsys, tmp_path, few, modules):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "blocks.png"
    options = () if modules == "linear" else (*few, "--context", "24")
    arguments = ("--target-modules", modules, "--limit", "2", "--plot", str(plot), *options)
    figures = run_json(capsys, "evaluate", "--by-block", *arguments)
    assert list(figures["blocks"]) == [f"transformer.h.{i}" for i in range(4)]
    for block in figures["blocks"].values():
        assert set(block) == {"block", "attn", "mlp"}
        assert all(0 < part["rms"] < 0.01 and 0 < part["kl"] < 1e-4 for part in block.values())
        # Errors of different parts are independent, so their squares add; norms come on top. A part that is a
        # module by itself has flooding noise of its own, where a block has it once.
        share = 0.3 if modules == "linear" else 0.003
        assert block["block"]["rms"] ** 2 > share * (block["attn"]["rms"] ** 2 + block["mlp"]["rms"] ** 2)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_errors_by_block_as_a_table(capsys):
    assert main(["evaluate", "--by-block", "--target-modules", "linear", "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["attn", "mlp", "block", "share", "of", "variance"]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[4:8]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_parts_of_a_model():
    model = load_model("tiny")
    parts = block_parts(model)
    assert parts["transformer.h.1"] == ["transformer.h.1.attn", "transformer.h.1.mlp"]
    encrypted = get_encrypted_model(model, EncryptionConfig("linear"))
    assert encrypted_within(encrypted, "transformer.h.1.mlp") == [
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ]
    with pytest.raises(ValueError, match="no list of blocks"):
        block_parts(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("modules", ["linear", ["transformer.h.0", "transformer.h.1"]])
def test_one_block_alone(modules):
    """The other blocks are those of the clear model, and the mode is as it was before."""
    model = get_encrypted_model(load_model("tiny"), EncryptionConfig(modules, scheme="ckks"))
    if modules != "linear":
        model.calibrate(torch.arange(100, 250).reshape(10, 15))
    model.set_fhe_mode("simulate")
    called, texts = behind(model, [0]), [Answered(torch.arange(100, 110)[None], 8)]
    names = {part: encrypted_within(model, part) for part in ("transformer.h.0", "transformer.h.7")}
    found = dict(logit_errors(model, called, texts, names))
    assert found["transformer.h.0"].rms > 0
    # The model has no such block: nothing is encrypted.
    assert (found["transformer.h.7"].rms, found["transformer.h.7"].divergence) == (0, 0)
    with only(model, names["transformer.h.0"]):
        pass
    assert model.fhe_mode == "simulate"


def test_behind_a_prefix():
    clear = load_model("tiny")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        result = BehindPrefix(clear, [1, 2])(ids).logits
        whole = clear(torch.cat([torch.tensor([[1, 2]] * 2), ids], dim=1)).logits
        assert torch.equal(result, whole[:, 2:])
        # Linear layers start from the prefix's keys and values.
        encrypted = get_encrypted_model(load_model("tiny"), EncryptionConfig("linear"))
        cached = behind(encrypted, [1, 2])(ids).logits
    torch.testing.assert_close(cached, whole[:, 2:], atol=1e-4, rtol=1e-4)


def test_answers_are_what_the_clear_model_generates():
    model, prompt = load_model("tiny"), torch.tensor([[5, 6, 7]])
    text = answered(model, prompt, [0], 4)
    expected = model.generate(torch.tensor([[0, 5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(text.ids, expected[:, 1:])
    assert (text.prompt_tokens, text.answer_tokens) == (3, 4)


def test_a_model_that_answers_otherwise_is_noticed():
    model = get_encrypted_model(load_model("tiny"), EncryptionConfig("linear"))
    text = answered(model, torch.tensor([[5, 6, 7]]), [], 6)

    class Wrong:
        """Right in the clear; on ciphertexts its guess is another from the fourth position on."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, **options):
            output = model(**options)
            self.calls += 1
            if self.calls % 2 == 0:
                output.logits[:, 4:] = -output.logits[:, 4:]
            return output

    (comparison,) = compared(model, Wrong(), [text])
    assert len(comparison.ranks) == 8
    assert comparison.equal_tokens == 4
    assert comparison[text.prompt_tokens - 1 :].equal_tokens == 2


def test_chats_behind_the_prefix(chat_model):
    tokenizer = load_tokenizer(chat_model)
    chat = [{"role": "user", "content": "Hello"}]
    (ids,) = chat_prompts(tokenizer, [chat], [0])
    assert tokenizer.decode(ids[0]) == "Hello\n"
    with pytest.raises(ValueError, match="does not start with the public prefix"):
        chat_prompts(tokenizer, [chat], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chats", "nothing.jsonl"], "no such file"),
        (["--chats", __file__], "not JSON"),
        (["--max-new-tokens", "70", "--context", "24"], "leaves no room"),
        (["--by-block", "--block", "1"], "--block does not go with --by-block"),
        (["--by-block", "--target-modules", "transformer.h.1"], "measures the whole model"),
        (["--scheme", "tfhe", "--by-block"], "--by-block belongs to --scheme ckks"),
        (["--scheme", "tfhe", "--mode", "execute"], "--mode execute belongs to --scheme ckks"),
        (["--prompt", "x"], "--prompt belongs to --illustration"),
    ],
)
def test_wrong_use(capsys, chat_model, arguments, words):
    assert words in failure(capsys, "evaluate", "--model", chat_model, *arguments)


@pytest.mark.slow
def test_on_ciphertexts(capsys):
    options = ("--target-modules", "linear", "--mode", "execute", "--limit", "1", "--max-new-tokens", "3")
    figures = run_json(capsys, "evaluate", *options)
    assert figures["top1"] == 1
    assert 0 < figures["parts"]["all"]["kl"] < 1e-4
