import math
from types import SimpleNamespace

import pytest
import torch

from cipherlm.evaluation.agreement import next_tokens, top_k_agreement
from cipherlm.evaluation.forward import batched_logits
from cipherlm.evaluation.perplexity import perplexity
from cipherlm.evaluation.report import format_table, plot_agreement
from cipherlm.evaluation.texts import calibration_sentences, encode, evaluation_sentences, read_sentences
from cipherlm.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def sequences(tokenizer):
    return encode(tokenizer, evaluation_sentences()[:20])


class TableModel:
    """Predicts from the present token alone, by a table of logits."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def test_texts_are_there_and_disjoint():
    evaluated, calibrated = evaluation_sentences(), calibration_sentences()
    assert len(evaluated) == 80
    assert len(calibrated) >= 60
    assert len(set(evaluated) | set(calibrated)) == len(evaluated) + len(calibrated)


def test_texts_share_no_phrases():
    def phrases(sentences):
        words = [sentence.lower().split() for sentence in sentences]
        return {tuple(w[i : i + 5]) for w in words for i in range(len(w) - 4)}

    assert not phrases(evaluation_sentences()) & phrases(calibration_sentences())


def test_read_sentences_drops_blank_lines(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One.\n\n  Two.  \n")
    assert read_sentences(file) == ["One.", "Two."]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="no text"):
        read_sentences(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_sentences(file)


def test_encode_cuts(tokenizer):
    rows = encode(tokenizer, ["The old man looked at the sea."], max_tokens=3)
    assert rows[0].shape == (1, 3)
    with pytest.raises(ValueError, match="token"):
        encode(tokenizer, [""])


def test_batches_equal_single_sequences(model, sequences):
    seen = set()
    for index, logits in batched_logits(model, sequences, batch_size=7):
        seen.add(index)
        with torch.no_grad():
            alone = model(sequences[index], use_cache=False).logits[0]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
    assert seen == set(range(len(sequences)))


def test_a_model_agrees_with_itself(model, sequences):
    agreement = top_k_agreement(model, sequences, next_tokens(model, sequences))
    assert agreement.top == {1: 1.0, 5: 1.0, 10: 1.0}
    assert agreement.positions == sum(ids.shape[1] for ids in sequences)


def test_agreement_counts_ranks():
    table = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4, 1)  # always guesses 3, 2, 1, 0 in this order
    model = TableModel(table)
    ids = [torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1]])]
    wanted = [torch.tensor([3, 2, 1, 0]), torch.tensor([3])]
    agreement = top_k_agreement(model, ids, wanted, ranks=(1, 2, 3))
    assert agreement.positions == 5
    assert agreement.top == {1: 2 / 5, 2: 3 / 5, 3: 4 / 5}


def test_nan_is_no_agreement():
    model = TableModel(torch.full((16, 16), math.nan))
    agreement = top_k_agreement(model, [torch.tensor([[0, 1]])], [torch.tensor([1, 2])])
    assert agreement.top == {1: 0.0, 5: 0.0, 10: 0.0}


def test_agreement_needs_sequences(model):
    with pytest.raises(ValueError, match="no sequence"):
        top_k_agreement(model, [], [])


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    measured = perplexity(TableModel(torch.zeros(8, 8)), torch.arange(8)[None], window=3)
    assert measured.value == pytest.approx(8.0)
    assert measured.tokens == 5  # 2 + 2 + 1: the first token of each window is not predicted
    assert measured.window == 3


def test_perplexity_equals_the_models_own_loss(model, tokenizer):
    ids = encode(tokenizer, ["The old man looked at the sea, and the boy went back to the house."])[0]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert perplexity(model, ids, window=64).value == pytest.approx(math.exp(loss), rel=1e-4)


def test_perplexity_refuses_what_predicts_nothing(model):
    with pytest.raises(ValueError, match="window"):
        perplexity(model, torch.tensor([[1, 2, 3]]), window=1)
    with pytest.raises(ValueError, match="too short"):
        perplexity(model, torch.tensor([[1]]), window=4)


def test_perplexity_overflows_to_infinity():
    table = torch.zeros(2, 2)
    table[:, 1] = 2000.0
    assert perplexity(TableModel(table), torch.tensor([[0, 0]]), window=2).value == math.inf


def test_table_is_aligned():
    table = format_table(["heads", "top-1"], [["head 0", "98.0%"], ["all heads", "9.0%"]])
    assert table.splitlines() == [
        "heads      top-1",
        "---------  -----",
        "head 0     98.0%",
        "all heads   9.0%",
    ]


def test_plot_is_an_image(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"heads_label": label, "n_bits": bits, "top1": 0.9, "top5": 0.95, "top10": 1.0}
        for label in ("head 0", "all heads")
        for bits in (2, 4)
    ]
    file = tmp_path / "plot.png"
    plot_agreement(rows, file, title="tiny")
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="cannot write"):
        plot_agreement(rows, tmp_path / "plot.xyz", title="tiny")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"cipherlm\[plot\]"):
        plot_agreement([], tmp_path / "plot.png", title="")
