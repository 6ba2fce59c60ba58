import json

import pytest

from cipherlm import EncryptionConfig
from cipherlm.schemes.tfhe.circuit import DEFAULT_P_ERROR

NAME = "encryption_config.json"


def test_defaults():
    config = EncryptionConfig()
    assert (config.target_modules, config.scheme, config.tokens, config.context) == ("all", "ckks", 8, 64)
    assert EncryptionConfig("transformer.h.0.attn") == EncryptionConfig("transformer.h.0.attn", "ckks")
    config = EncryptionConfig("transformer.h.0.attn", scheme="tfhe")
    assert (config.scheme, config.n_bits, config.heads) == ("tfhe", 4, None)
    assert config.p_error == DEFAULT_P_ERROR


@pytest.mark.parametrize("given", [{"n_bits": 4}, {"heads": [0]}, {"p_error": DEFAULT_P_ERROR}])
def test_a_field_of_tfhe_is_about_tfhe(given):
    assert EncryptionConfig("attn", **given) == EncryptionConfig("attn", scheme="tfhe", **given)


@pytest.mark.parametrize(
    "config",
    [
        EncryptionConfig(),
        EncryptionConfig("transformer.h.0.attn", scheme="tfhe"),
        EncryptionConfig(["a.attn", "b.attn"], n_bits=8, heads=[2, 0], p_error=1e-3),
        EncryptionConfig(("attn",), heads=range(3)),
        EncryptionConfig("all", scheme="ckks"),
        EncryptionConfig(["h.0"], scheme="ckks", prefix=(5, 0), tokens=16, context=100),
    ],
)
def test_round_trip(config, tmp_path):
    assert EncryptionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path / "new" / "directory")
    assert EncryptionConfig.from_pretrained(tmp_path / "new" / "directory") == config


def test_it_stays_as_it_was_checked():
    heads, names = [0], ["attn"]
    config = EncryptionConfig(names, heads=heads)
    heads.append(-1)
    names.append("")
    assert (config.heads, config.target_modules) == ([0], ["attn"])
    with pytest.raises(AttributeError):
        config.n_bits = 99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["a", ""]}, "target_modules is empty"),
        ({"target_modules": [1]}, "module name or a list"),
        ({"target_modules": None}, "module name or a list"),
        ({"scheme": "rot13"}, "scheme must be one of 'tfhe'"),
        ({"n_bits": 1}, "n_bits must be .*from 2 to 8, not 1"),
        ({"n_bits": 9}, "n_bits must be .*from 2 to 8, not 9"),
        ({"n_bits": 4.0}, "n_bits must be an integer"),
        ({"n_bits": True}, "n_bits must be an integer"),
        ({"heads": []}, "heads is empty"),
        ({"heads": [0, 0]}, "twice"),
        ({"heads": [-1]}, "numbered from 0"),
        ({"heads": 0}, "list of head numbers"),
        ({"heads": ["0"]}, "list of head numbers"),
        ({"p_error": 0}, "p_error must be"),
        ({"p_error": 0.1}, "p_error must be"),
        ({"p_error": float("nan")}, "p_error must be"),
        ({"p_error": "small"}, "p_error must be"),
        ({"scheme": "tfhe", "prefix": [0]}, "prefix means nothing to scheme='tfhe'"),
        ({"n_bits": 4, "tokens": 16}, "tokens means nothing to scheme='tfhe'"),
        ({"scheme": "tfhe", "context": 9}, "context means nothing to scheme='tfhe'"),
        ({"heads": [0], "post_quantum": True}, "post_quantum means nothing to scheme='tfhe'"),
        ({"scheme": "ckks", "post_quantum": 1}, "post_quantum must be True or False"),
        ({"scheme": "ckks", "n_bits": 5}, "n_bits means nothing to scheme='ckks': .* or give scheme='tfhe'"),
        ({"scheme": "ckks", "heads": [0]}, "heads means nothing to scheme='ckks'"),
        ({"scheme": "ckks", "p_error": 1e-3}, "p_error means nothing to scheme='ckks'"),
        ({"scheme": "ckks", "prefix": []}, "prefix is empty"),
        ({"scheme": "ckks", "prefix": [-1]}, "prefix must be a list of token ids"),
        ({"scheme": "ckks", "prefix": 0}, "prefix must be a list of token ids"),
        ({"scheme": "ckks", "prefix": [True]}, "prefix must be a list of token ids"),
        ({"scheme": "ckks", "prefix": [0] * 64}, "a prefix of 64 tokens leaves no room in context=64"),
        ({"scheme": "ckks", "tokens": 1}, "tokens must be an integer of at least 2"),
        ({"scheme": "ckks", "context": 64.0}, "context must be an integer of at least 2"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        EncryptionConfig(**{"target_modules": "attn", **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "version None"),
        ({"version": 3, "target_modules": "attn"}, "version 3 .*newer"),
        ({"version": 1}, "needs target_modules"),
        ({"version": 1, "target_modules": "attn", "colour": "red"}, "unknown fields .*colour"),
        ({"version": 1, "target_modules": "attn", "n_bits": 40}, "from 2 to 8"),
    ],
)
def test_damaged_values(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        EncryptionConfig.from_dict(values)
    (tmp_path / NAME).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{NAME} is damaged: .*{message}"):
        EncryptionConfig.from_pretrained(tmp_path)


def test_a_file_of_the_first_version():
    values = {"version": 1, "target_modules": "attn", "scheme": "tfhe", "n_bits": 5, "heads": [1]}
    assert EncryptionConfig.from_dict(values) == EncryptionConfig("attn", n_bits=5, heads=[1])
    old = EncryptionConfig.from_dict({"version": 1, "target_modules": "attn"})
    assert old == EncryptionConfig("attn", scheme="tfhe")


def test_a_file_has_its_scheme_s_fields_only():
    assert "prefix" not in EncryptionConfig("attn", scheme="tfhe").to_dict()
    assert "n_bits" not in EncryptionConfig("attn", scheme="ckks").to_dict()
    assert "post_quantum" not in EncryptionConfig("attn", scheme="tfhe").to_dict()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_damaged_file(content, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{NAME} is damaged"):
        EncryptionConfig.from_pretrained(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {NAME}"):
        EncryptionConfig.from_pretrained(tmp_path)
