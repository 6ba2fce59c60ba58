"""Messages survive the way through bytes; hostile bytes are refused, never a crash."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cipherlm.serving import protocol
from cipherlm.serving.protocol import CLIENT_MESSAGES, SERVER_MESSAGES, ProtocolError, pack, unpack

EVERYTHING = (*CLIENT_MESSAGES, *SERVER_MESSAGES)

integers = st.integers(0, protocol.MAX_INTEGER)
texts = st.text(max_size=40).filter(str.isprintable)
blobs = st.binary(max_size=100)
VALUES = {
    int: integers,
    int | None: st.none() | integers,
    str: texts,
    bool: st.booleans(),
    bytes: blobs,
    dict[str, str]: st.dictionaries(texts, texts, max_size=4),
    dict[str, int]: st.dictionaries(texts, integers, max_size=4),
}


def message_of(kind):
    parts = {
        field.name: st.lists(blobs, max_size=5) if field.name == "blobs" else VALUES[field.type]
        for field in protocol.fields(kind)
    }
    return st.builds(kind, **parts)


messages = st.one_of(*map(message_of, EVERYTHING))


def frame(header, *blobs, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(4, "little") + text + b"".join(blobs)


CANCEL = {"type": "cancel", "id": 1, "blobs": []}


@given(messages)
def test_messages_survive(message):
    assert unpack(pack(message), EVERYTHING) == message


@given(st.binary(max_size=300))
@example(b"")
@example(b"\x00\x00\x00\x00")
@example(frame(b"[" * 60000))
@example(frame(b'{"blobs":' + b"[" * 60000))
@example(frame(b'{"blobs":[],"type":"cancel","id":' + b"9" * 20000 + b"}"))
@example(frame(b"\xff\xfe"))
def test_garbage_is_refused(data):
    with pytest.raises(ProtocolError):
        unpack(data, EVERYTHING)


@settings(deadline=None)
@given(messages, st.data())
def test_cut_and_changed_messages_are_refused_or_well_formed(message, data):
    packed = pack(message)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ProtocolError):
        unpack(packed[:cut], EVERYTHING)
    with pytest.raises(ProtocolError):
        unpack(packed + b"\0", EVERYTHING)
    changed = bytearray(packed)
    changed[cut] = data.draw(st.integers(0, 255))
    _refused_or_well_formed(bytes(changed))


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(messages, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_fuzz(message, changes):
    data = bytearray(pack(message))
    for place, value in changes:
        data[place % len(data)] = value
    _refused_or_well_formed(bytes(data))


def _refused_or_well_formed(data):
    try:
        message = unpack(data, EVERYTHING)
    except ProtocolError:
        return
    assert unpack(pack(message), EVERYTHING) == message


@pytest.mark.parametrize(
    "data",
    [
        frame({**CANCEL, "id": True}),
        frame({**CANCEL, "id": -1}),
        frame({**CANCEL, "id": 1.0}),
        frame({**CANCEL, "id": "1"}),
        frame({**CANCEL, "id": None}),
        frame({**CANCEL, "id": 2**53}),
        frame({**CANCEL, "more": 1}),
        frame({"type": "cancel", "blobs": []}),
        frame({"type": "cancel", "id": 1}),
        frame({**CANCEL, "blobs": [1]}, b"x"),
        frame({**CANCEL, "blobs": [-1, 1]}),
        frame({**CANCEL, "blobs": [True]}, b"x"),
        frame({**CANCEL, "blobs": {}}),
        frame({**CANCEL, "blobs": [0] * (protocol.MAX_BLOBS + 1)}),
        frame({**CANCEL, "type": "opened"}),
        frame({**CANCEL, "type": ["cancel"]}),
        frame({**CANCEL, "type": None}),
        frame(CANCEL, length=2**32 - 1),
        frame(CANCEL, length=protocol.HEADER_BYTES + 1),
        frame(CANCEL, length=len(json.dumps(CANCEL)) - 1),
        frame(b'{"type":"cancel","id":NaN,"blobs":[]}'),
        frame(b"[]"),
        frame(b"null"),
        frame({"type": "refreshed", "id": 1, "round": 0, "blobs": []}),
        frame({"type": "refreshed", "id": 1, "round": 0, "blobs": [1, 1]}, b"xy"),
        frame({"type": "open", "protocol": 1, "model": "\ud800", "keys": {}, "blobs": []}),
        frame({"type": "open", "protocol": 1, "model": "m" * 2000, "keys": {}, "blobs": []}),
        frame({"type": "open", "protocol": 1, "model": "m", "keys": [], "blobs": []}),
        frame({"type": "open", "protocol": 1, "model": "m", "keys": {"a": 1}, "blobs": []}),
        frame(
            {"type": "open", "protocol": 1, "model": "m", "keys": dict.fromkeys("abc" * 99, "")}
            | {"blobs": 0}
        ),
    ],
)
def test_wrong_headers_are_refused(data):
    with pytest.raises(ProtocolError):
        unpack(data, CLIENT_MESSAGES)


def test_the_frame_itself():
    assert unpack(frame(CANCEL), CLIENT_MESSAGES) == protocol.Cancel(1)
    evaluate = {"type": "evaluate", "id": 1, "module": "m", "start": 0, "count": 2, "blobs": [1, 0, 2]}
    assert unpack(frame(evaluate, b"abc"), CLIENT_MESSAGES).blobs == [b"a", b"", b"bc"]


@pytest.mark.parametrize(
    "message",
    [
        protocol.Cancel(-1),
        protocol.Error("internal", "two\nlines", False),
        protocol.Result(1, [b""] * (protocol.MAX_BLOBS + 1)),
        protocol.Open(1, "m", {str(n): "" for n in range(protocol.MAX_ENTRIES + 1)}),
    ],
)
def test_what_would_be_refused_is_not_sent(message):
    with pytest.raises(ProtocolError):
        pack(message)


@given(st.text(max_size=3000))
def test_an_error_carries_any_text(text):
    message = protocol.error(protocol.INTERNAL, text)
    assert unpack(pack(message), SERVER_MESSAGES) == message
