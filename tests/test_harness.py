"""The tasks for lm-evaluation-harness and its command line, as far as they go without it."""

import json
import sys

import pytest

from cipherlm.evaluation.harness import TASKS
from cipherlm.evaluation.harness.__main__ import main, with_tasks
from cipherlm.evaluation.texts import calibration_sentences


def documents(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / name).read_text(encoding="utf-8").split("\n") if line]


def phrases(texts):
    words = [text.lower().split() for text in texts]
    return {tuple(w[i : i + 5]) for w in words for i in range(len(w) - 4)}


def test_one_ending_of_four_is_right():
    found = documents("choice.jsonl")
    assert len(found) >= 50
    for document in found:
        assert document["text"] == document["text"].strip()
        assert len(set(document["choices"])) == 4
        assert 0 <= document["answer"] < 4
    # Whoever always takes the same place gets few of them right.
    places = [document["answer"] for document in found]
    assert max(map(places.count, range(4))) < 0.4 * len(found)


def test_no_phrase_was_calibrated_on():
    texts = [document["text"] for name in ("choice.jsonl", "text.jsonl") for document in documents(name)]
    assert len(documents("text.jsonl")) >= 10
    assert not phrases(texts) & phrases(calibration_sentences())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["--help"], ["--help"]),
        (["run", "-h"], ["run", "-h"]),
        (["--model", "cipherlm"], ["run", "--include_path", str(TASKS), "--model", "cipherlm"]),
        (["ls", "tasks"], ["ls", "--include_path", str(TASKS), "tasks"]),
        (["run", "--include_path=x"], ["run", "--include_path=x"]),
    ],
)
def test_the_tasks_are_found(given, expected):
    assert with_tasks(given) == expected


def test_without_the_harness(monkeypatch):
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"cipherlm\[eval\]"):
        main()
