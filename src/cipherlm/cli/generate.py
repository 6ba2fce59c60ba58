"""Continue a prompt. Chosen modules run on encrypted data, the rest of the model in the clear."""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from cipherlm.cli import UsageError
from cipherlm.cli.circuits import circuit_figures, compile_circuits, compiled_length, make_keys
from cipherlm.cli.common import (
    add_calibration_option,
    add_encryption_options,
    add_json_option,
    add_model_option,
    calibration_ids,
    existing_file,
    human_bytes,
    human_seconds,
    load_any_encrypted,
    load_encrypted,
    of_scheme,
    positive_integer,
    prompt_ids,
    quiet_libraries,
    settle_scheme,
    write_json,
)
from cipherlm.cli.server_options import (
    add_draft_options,
    add_reveal_length_option,
    add_server_options,
    check_drafts,
    connect,
    drafts_of,
    server_options_given,
)
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from cipherlm.models.ckks import CkksModel
    from cipherlm.serving.remote_linear import RemoteLinearModel

EXAMPLES = """\
examples:
  cipherlm generate "The old man looked" --max-new-tokens 4
  cipherlm generate "The old man looked" --block 0
  cipherlm generate "The capital of France is" --model smollm2 --target-modules linear
  cipherlm generate "Cryptography is a" --model gpt2 --scheme tfhe --heads all --n-bits 7 --mode disable
  cipherlm generate "Once upon a time" --mode clear --max-new-tokens 40 --sample --seed 7
  cipherlm generate --server http://127.0.0.1:8470 --bundle tiny-bundle/client "The old man"

modes:
  execute   on ciphertexts, with real keys (default)
  simulate  the same arithmetic on clear numbers, with the noise that ciphertexts may have
  disable   the same arithmetic on clear numbers, without noise
  clear     the model as it was
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    add_model_option(parser)
    add_encryption_options(parser)
    parser.add_argument(
        "--mode",
        choices=("execute", "simulate", "disable", "clear"),
        default="execute",
        help="how the encrypted modules run (default: execute)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_integer, default=4, metavar="N", help="tokens to add (default: 4)"
    )
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help="length to compile for, with TFHE (default: what prompt and new tokens need, in steps of 4)",
    )
    parser.add_argument("--sample", action="store_true", help="draw the next token instead of the likeliest")
    parser.add_argument("--temperature", type=float, metavar="T", help="of drawing (default: 1.0)")
    parser.add_argument(
        "--top-k", type=positive_integer, metavar="K", help="draw among the K likeliest (default: 50)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of drawing (default: 0)")
    add_calibration_option(parser)
    add_server_options(parser, required=False)
    add_reveal_length_option(parser)
    add_draft_options(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> None:
    """Print the prompt with its continuation."""
    if not options.sample:
        for name in ("temperature", "top_k", "seed"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is about drawing: add --sample")
    existing_file(options.calibration)
    _check_server_options(options)
    check_drafts(options)
    with quiet_libraries():
        result = _generate_at_server(options) if options.server else _generate(options)
    if options.json:
        write_json(result)
    else:
        print(result["text"])


def _check_server_options(options: argparse.Namespace) -> None:
    """Refuse what a client's bundle settles, and what needs a server where there is none."""
    if not options.server:
        for name in server_options_given(options):
            raise UsageError(f"{name} goes with --server")
        return
    settled = (
        "scheme",
        "heads",
        "n_bits",
        "p_error",
        "context",
        "post_quantum",
        "block",
        "target_modules",
        "calibration",
    )
    for name in (*settled, "tokens"):
        if getattr(options, name, None) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} was settled when the model was exported: leave it out"
            )
    if options.mode != "execute":
        raise UsageError(f"--mode {options.mode}: a server computes on ciphertexts only")


def _generate_at_server(options: argparse.Namespace) -> dict[str, Any]:
    progress = TerminalProgress()
    with connect(options, progress) as model:
        options.model = model.name
        if not hasattr(model, "products"):
            ids = prompt_ids(model.tokenizer, options.prompt)
            return {**_continued(options, model, model.tokenizer, ids), "server": options.server}
        linear = cast("RemoteLinearModel", model)
        ids, hidden = linear.prompt_ids(options.prompt)
        result = _continued(options, model, model.tokenizer, ids, hidden)
        traffic = asdict(linear.products.traffic)
        if sys.stderr.isatty():
            print(
                f"{human_bytes(traffic['to_server'])} to the server and {human_bytes(traffic['to_client'])} "
                f"back, {human_bytes(traffic['keys'])} of keys",
                file=sys.stderr,
            )
        return {**result, "server": options.server, "traffic": traffic}


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    settle_scheme(options, "tokens")
    return of_scheme(options, {"ckks": _generate_remotely, "tfhe": _generate_with_circuits})(options)


def _generate_with_circuits(options: argparse.Namespace) -> dict[str, Any]:
    from cipherlm.models.loading import load_model, load_tokenizer

    if options.prompt_lookup:
        raise UsageError("--prompt-lookup needs a key-value cache, and TFHE keeps none")
    progress = TerminalProgress()
    clear = options.mode == "clear"
    tokenizer = load_tokenizer(options.model)
    model: Any = load_model(options.model) if clear else load_encrypted(options, progress)
    ids = prompt_ids(tokenizer, options.prompt)
    length = compiled_length(model, ids.shape[1], options.max_new_tokens, options.tokens)

    circuits = {}
    if not clear:
        if not model.is_calibrated:
            model.calibrate(calibration_ids(options, tokenizer, length))
        if options.mode != "disable":
            circuits = compile_circuits(model, length)
        if options.mode == "execute":
            make_keys(circuits)
        model.set_fhe_mode(options.mode)
    result = _continued(options, model, tokenizer, ids)
    return {**result, "circuits": {name: circuit_figures(circuit) for name, circuit in circuits.items()}}


def _generate_remotely(options: argparse.Namespace) -> dict[str, Any]:
    from cipherlm.cli.ckks import calibrate, check_length, traffic_figures
    from cipherlm.models.linear import EncryptedLinearModel
    from cipherlm.models.loading import load_tokenizer

    if options.tokens is not None:
        raise UsageError("--tokens is the length of a circuit: with --scheme ckks, give --context")
    tokenizer = load_tokenizer(options.model)
    encrypted = load_any_encrypted(options, TerminalProgress())
    ids = prompt_ids(tokenizer, options.prompt)
    clear = options.mode == "clear"
    if isinstance(encrypted, EncryptedLinearModel):
        if options.calibration is not None:
            raise UsageError("--calibration: linear layers need none")
        encrypted.set_fhe_mode("disable" if clear else options.mode)
        result = _continued(options, encrypted, tokenizer, ids)
        return {**result, "layers": len(encrypted.remote_modules), "products": len(encrypted.groups)}
    model = cast("CkksModel", encrypted)
    check_length(model, ids.shape[1], options.max_new_tokens, in_context=not clear)
    keygen_seconds = None
    if not clear:
        calibrate(model, options, tokenizer)
        model.set_fhe_mode(options.mode)
        if options.mode == "execute":
            keygen_seconds = model.make_keys()
    with model.in_clear() if clear else nullcontext():
        result = _continued(options, model, tokenizer, model.with_prefix(ids), len(model.prefix))
    return {
        **result,
        "prefix": model.prefix,
        "keygen_seconds": keygen_seconds,
        "traffic": traffic_figures(model),
    }


def _continued(
    options: argparse.Namespace, model: Any, tokenizer: Any, ids: Any, prefix: int = 0
) -> dict[str, Any]:
    """Continue token ids, the first ``prefix`` of which are not shown, and return what came of it."""
    from cipherlm.cli.streaming import GeneratedToken, Sampling, TokenStream, generate

    def show(token: GeneratedToken) -> None:
        # On a terminal only: an encrypted token takes seconds, and whoever waits wants to see it.
        if options.mode == "execute" and sys.stderr.isatty():
            print(f"{token.text!r} {human_seconds(token.seconds)}", file=sys.stderr)

    sampling = Sampling(
        options.sample,
        1.0 if options.temperature is None else options.temperature,
        options.top_k or 50,
        options.seed or 0,
    )
    stream, drafts = TokenStream(tokenizer, show), drafts_of(options, model)
    generated = generate(
        model,
        ids,
        options.max_new_tokens,
        stream=stream,
        sampling=sampling,
        reveal_length=options.reveal_length,
        drafts=drafts,
    )
    if drafts and sys.stderr.isatty():
        print(f"{len(stream.tokens)} tokens in {stream.passes} passes", file=sys.stderr)
    return {
        "model": options.model,
        "mode": options.mode,
        "prompt": options.prompt,
        "text": tokenizer.decode(generated[0][prefix:], skip_special_tokens=True),
        "tokens": [token.text for token in stream.tokens],
        "token_seconds": [token.seconds for token in stream.tokens],
        "passes": stream.passes,
        "tokens_per_pass": len(stream.tokens) / max(1, stream.passes),
    }
