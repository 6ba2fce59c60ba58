"""The verbs on real circuits and ciphertexts, at small sizes."""

import json

import numpy as np
import pytest

from cipherlm.cli import main
from cipherlm.cli.bench_attention import GEOMETRIES, float_attention
from cipherlm.schemes.tfhe.attention import AttentionWeights

fhe = pytest.importorskip("concrete.fhe")


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_float_attention_is_that_of_transformers():
    import torch

    from cipherlm.models.loading import load_model

    module = load_model("tiny").transformer.h[1].attn
    arrays = [
        p.detach().double().numpy()
        for p in (module.c_attn.weight, module.c_attn.bias, module.c_proj.weight, module.c_proj.bias)
    ]
    weights = AttentionWeights(*arrays, n_heads=4)
    x = np.random.default_rng(0).standard_normal((5, 128))
    with torch.no_grad():
        expected = module(torch.tensor(x[None], dtype=torch.float32), attention_mask=None)[0][0].numpy()
    causal = float_attention(weights, x, None)
    # Without a mask transformers' eager kernel may look ahead; the last position sees the same in any case.
    np.testing.assert_allclose(causal[-1], expected[-1], atol=1e-4)
    first = x[0] @ weights.qkv_weight[:, 256:] + weights.qkv_bias[256:]
    np.testing.assert_allclose(float_attention(weights, x, [0, 1, 2, 3])[0], first, atol=1e-9)
    np.testing.assert_allclose(float_attention(weights, x, [2])[0], first[64:96], atol=1e-9)


@pytest.mark.slow
def test_bench_measures_a_real_run(capsys):
    figures = run_json(capsys, "bench", "attention", "--geometry", "tiny", "--tokens", "2", "--n-bits", "3")
    assert (figures["scheme"], figures["geometry"], figures["tokens"], figures["heads"]) == (
        "tfhe",
        "tiny",
        2,
        1,
    )
    for name in ("compile", "keygen", "encrypt", "execute", "decrypt", "pbs_8bit"):
        assert figures[f"{name}_seconds"] > 0
    assert 0 < figures["pbs"] == sum(figures["pbs_per_bit_width"].values())
    assert figures["max_bit_width"] == max(map(int, figures["pbs_per_bit_width"]))
    assert figures["evaluation_key_bytes"] > 10**6
    assert figures["ciphertext_bytes"] == figures["ciphertext_bytes_in"] + figures["ciphertext_bytes_out"] > 0
    assert figures["peak_memory_bytes"] > 10**8
    assert 0 < figures["mean_abs_error"] <= figures["max_abs_error"] < 2 * figures["max_abs_output"]
    assert figures["mean_abs_difference"] <= 2 * figures["mean_abs_error"]


@pytest.mark.slow
def test_bench_reads_weights(tmp_path, capsys, monkeypatch):
    # The yardstick has its own keys, which take longer than all else here.
    monkeypatch.setattr("cipherlm.cli.bench_attention.measure_pbs", lambda: 0.01)
    from safetensors.numpy import save_file

    width = GEOMETRIES["tiny"].width
    rng = np.random.default_rng(0)
    tensors = {
        "h.2.attn.c_attn.weight": rng.standard_normal((width, 3 * width)) * 0.1,
        "h.2.attn.c_attn.bias": np.zeros(3 * width),
        "h.2.attn.c_proj.weight": rng.standard_normal((width, width)),
        "h.2.attn.c_proj.bias": np.zeros(width),
        "h.2.ln_1.weight": np.ones(width),
        "h.2.ln_1.bias": np.zeros(width),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    bench = (
        "bench",
        "attention",
        "--geometry",
        "tiny",
        "--tokens",
        "2",
        "--n-bits",
        "2",
        "--weights",
        str(file),
    )
    assert run_json(capsys, *bench, "--block", "2")["weights"] == "model.safetensors"
    assert main([*bench, "--block", "1"]) == 1
    assert "lacks" in capsys.readouterr().err
    assert main(["bench", "attention", "--geometry", "gpt2", "--weights", str(file), "--block", "2"]) == 1
    assert "(768, 2304)" in capsys.readouterr().err
    file.write_bytes(b"nothing")
    assert main([*bench, "--block", "2"]) == 1
    assert "damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_inspect_then_generate_share_a_circuit(capsys):
    chosen = ("--block", "1", "--heads", "3", "--n-bits", "2", "--tokens", "2")
    first = run_json(capsys, "inspect", *chosen)
    (figures,) = first["modules"].values()
    assert figures["tokens"] == 2
    assert figures["evaluation_key_bytes"] is None
    assert set(figures["table_ranges"]) >= {"score", "value"}

    assert main(["inspect", *chosen]) == 0
    shown = capsys.readouterr().out
    assert "now from the cache" in shown
    assert f"{figures['pbs']}: " in shown

    generated = run_json(capsys, "generate", "The", "--max-new-tokens", "2", *chosen)
    assert len(generated["tokens"]) == 2
    (run,) = generated["circuits"].values()
    assert run["from_cache"]
    assert run["pbs"] == figures["pbs"]
    assert run["execute_seconds"] > 0

    listed = run_json(capsys, "inspect", "--cache")
    entry = next(e for e in listed["circuits"] if e["pbs"] == figures["pbs"])
    assert entry["tokens"] == 2
    assert entry["key_bytes"] > 10**6
    assert main(["inspect", "--cache"]) == 0
    assert entry["name"] in capsys.readouterr().out

    assert main(["inspect", "--clear-cache"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert run_json(capsys, "inspect", "--cache")["circuits"] == []


def test_simulation(capsys):
    arguments = (
        "evaluate",
        "--mode",
        "simulate",
        "--heads",
        "0",
        "--n-bits",
        "4",
        "--limit",
        "2",
        "--tokens",
        "3",
    )
    figures = run_json(capsys, *arguments)
    assert figures["positions"] == 6
    assert figures["results"][0]["top10"] == 1.0


@pytest.mark.slow
def test_demo(capsys):
    assert main(["demo", "--scheme", "tfhe"]) == 0
    shown = capsys.readouterr().out
    assert "clear      The old man" in shown
    assert "evaluation keys" in shown


@pytest.mark.slow
def test_demo_as_json(capsys):
    figures = run_json(
        capsys, "demo", "--scheme", "tfhe", "--prompt", "She", "--max-new-tokens", "2", "--n-bits", "3"
    )
    assert figures["encrypted_text"].startswith("She")
    assert len(figures["token_seconds"]) == 2
    assert figures["circuit"]["evaluation_key_bytes"] > 10**6
