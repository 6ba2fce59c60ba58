"""What the verbs do with CKKS."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cipherlm.cli import CommandError
from cipherlm.cli.common import calibration_ids, human_bytes

if TYPE_CHECKING:
    import torch

    from cipherlm.models.ckks import CkksModel
    from cipherlm.models.summary import Summary


def calibrate(model: "CkksModel", options: argparse.Namespace, tokenizer: Any) -> None:
    """Calibrate a model unless it is: on sentences, and on texts of them as long as the context."""
    if model.is_calibrated:
        return
    length = model.placement.geometry.context - len(model.prefix)
    sentences = calibration_ids(options, tokenizer, length)
    with model.placement.progress("calibrating"):
        model.calibrate([*sentences, *joined(sentences, length)])


def joined(sentences: "list[torch.Tensor]", length: int) -> "list[torch.Tensor]":
    """Return the sentences (1, tokens) one after the other, cut into texts of ``length`` tokens."""
    import torch

    ids = torch.cat(sentences, dim=1)
    return [ids[:, start : start + length] for start in range(0, ids.shape[1], length)]


def check_length(model: "CkksModel", prompt_tokens: int, new_tokens: int, *, in_context: bool = True) -> None:
    """Raise unless the model, and its context too, have room for the prefix, a prompt and new tokens."""
    context, prefix = model.placement.geometry.context, len(model.prefix)
    needed = prefix + prompt_tokens + new_tokens - 1  # the last token is generated, but never read
    longest = int(model.config.max_position_embeddings)
    if needed >= longest:
        raise CommandError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones are too long for this model, "
            f"which takes {longest}"
        )
    if in_context and needed > context:
        raise CommandError(
            f"a public prefix of {prefix}, a prompt of {prompt_tokens} tokens and {new_tokens} new ones need "
            f"--context {needed} or more, not {context}"
        )


def summary(model: "CkksModel", tokenizer: Any) -> "Summary":
    """Return what is told of a model that is loaded."""
    from cipherlm.models.summary import Summary

    modules, prefix = list(model.encrypted_modules), model.prefix
    return Summary(modules, prefix, tokenizer.decode(prefix), model.placement.geometry)


def remote_figures(told: "Summary") -> dict[str, Any]:
    """Return what can be told of a placement before calibration and without evaluation keys, for JSON."""
    import numpy as np

    from cipherlm.engine import SecretKey
    from cipherlm.schemes.ckks.traffic import MeteredClient

    geometry, parameters = told.geometry, told.geometry.parameters
    client = MeteredClient(SecretKey.generate(parameters), geometry)
    sizes = []
    for position in (geometry.prefix, geometry.prefix + 1):  # a prompt, and one token behind it
        before = client.traffic.to_server
        client.encrypt(np.zeros((1, geometry.layout.width)), position)
        sizes.append(client.traffic.to_server - before)
    return {
        "modules": told.modules,
        "prefix": told.prefix,
        "prefix_text": told.prefix_text,
        "tokens": geometry.tokens,
        "context": geometry.context,
        "ring_degree": parameters.degree,
        "levels": parameters.max_level,
        "modulus_bits": round(parameters.log_qp, 1),
        "security_bits": 128,
        "post_quantum": parameters.post_quantum,
        "scale_bits": round(float(np.log2(parameters.scale))),
        "rotation_keys": len(geometry.rotations),
        "ciphertext_bytes_prompt": sizes[0],
        "ciphertext_bytes_token": sizes[1],
    }


def key_figures(told: "Summary") -> dict[str, Any]:
    """Make a client's keys, and return how long that took and how large what is sent is, for JSON."""
    import time

    from cipherlm.engine import SecretKey
    from cipherlm.schemes.ckks.traffic import MeteredClient

    start = time.perf_counter()
    client = MeteredClient(SecretKey.generate(told.geometry.parameters), told.geometry)
    client.evaluation_keys()
    client.public_key()
    return {
        "keygen_seconds": time.perf_counter() - start,
        "evaluation_key_bytes": client.traffic.keys,
    }


def range_figures(model: "CkksModel") -> dict[str, Any]:
    """Return the ranges that calibration found, by module and block, for JSON."""
    return {
        name: {key: list(ends) for key, ends in (module.ranges or {}).items()}
        for name, module in model.remote_modules.items()
    }


def traffic_figures(model: "CkksModel") -> dict[str, int]:
    """Return the bytes that have gone between the parties, and the number of refreshes."""
    return asdict(model.placement.traffic)


def described(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what ``remote_figures`` gave as names and words."""
    return [
        ("on the server", _remote_words(figures["modules"])),
        ("public prefix", f"{figures['prefix_text']!r}, not encrypted"),
        ("context", f"up to {figures['context']} tokens, {figures['tokens']} of a prompt packed together"),
        ("ring degree", f"{figures['ring_degree']}, {figures['levels']} levels"),
        (
            "security",
            f"{figures['security_bits']} bits{', against quantum computers too' * figures['post_quantum']}: "
            f"a modulus of {figures['modulus_bits']:g} bits, a scale of "
            f"{figures['scale_bits']}",
        ),
        ("rotation keys", str(figures["rotation_keys"])),
        (
            "ciphertexts in",
            f"{human_bytes(figures['ciphertext_bytes_prompt'])} for a prompt, "
            f"{human_bytes(figures['ciphertext_bytes_token'])} for each token behind it",
        ),
    ]


def who_learns_what(modules: list[str]) -> list[tuple[str, str]]:
    """Return what each party learns, in words."""
    client = (
        "the last hidden states, as from any API with logits, and no weights"
        if is_whole(modules)
        else "input and output of each remote module: a patient client can fit that module"
    )
    return [
        ("the server learns", "sizes, times, and how many tokens are evaluated, but no text"),
        ("the client learns", client),
    ]


def _remote_words(modules: list[str]) -> str:
    return "all blocks, as one" if is_whole(modules) else ", ".join(modules)


def is_whole(modules: list[str]) -> bool:
    """Say whether the names of remote modules are that of all blocks together."""
    from cipherlm.models.architecture import MODULES, architecture_of

    return modules in [[architecture_of(model_type).blocks] for model_type in MODULES]
