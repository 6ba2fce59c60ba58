import json
import subprocess
import sys

import pytest

from cipherlm.evaluation.chats import calibration_chats, evaluation_chats, read_chats


def phrases(chats):
    words = [message["content"].lower().split() for chat in chats for message in chat]
    return {tuple(w[i : i + 5]) for w in words for i in range(len(w) - 4)}


def test_chats_are_there_and_share_no_phrase():
    calibrated, evaluated = calibration_chats(), evaluation_chats()
    assert len(calibrated) >= 60
    assert len(evaluated) >= 45
    questions = [chat[-1]["content"] for chat in calibrated + evaluated]
    assert len(set(questions)) == len(questions)
    assert not phrases(calibrated) & phrases(evaluated)


@pytest.mark.parametrize("chats", [calibration_chats(), evaluation_chats()])
def test_turns_alternate_and_wait_for_an_answer(chats):
    for chat in chats:
        assert [message["role"] for message in chat[::2]] == ["user"] * ((len(chat) + 1) // 2)
        assert all(message["role"] == "assistant" for message in chat[1::2])
        assert len(chat) % 2 == 1
        assert all(message["content"] == message["content"].strip() for message in chat)
    assert sum(len(chat) > 1 for chat in chats) >= 4
    lengths = [len(chat[-1]["content"].split()) for chat in chats]
    assert min(lengths) <= 5
    assert 60 <= max(lengths) <= 120


def test_chats_need_no_torch():
    code = (
        "import sys, cipherlm.evaluation.chats as c; c.evaluation_chats(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_read_chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Line\u2028separated"}]
    path.write_text(json.dumps({"messages": chat}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_chats(path) == [chat]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no conversation"),
        ("{", "line 1 is not JSON"),
        ("[]", 'no "messages"'),
        ('{"messages": []}', 'no "messages"'),
        ('{"messages": ["a"]}', "role"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "role"),
        ('{"messages": [{"role": "user", "content": " "}]}', "without text"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "end with",
        ),
    ],
)
def test_read_chats_refuses(tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_chats(path)


def test_read_chats_refuses_other_encodings(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_chats(path)
