"""Generate text with the embedded model while all its blocks run on real ciphertexts (CKKS).

Keys are generated, and every token is encrypted, goes through all blocks as a ciphertext, and is decrypted.
The clear model's text stands beside it, and then what it took. With --scheme tfhe, one attention head runs
on ciphertexts, quantised.
"""

import argparse
import time
from typing import TYPE_CHECKING, Any

from cipherlm.cli import UsageError
from cipherlm.cli.circuits import circuit_figures, compile_circuits, compiled_length, keys_cached, make_keys
from cipherlm.cli.common import (
    add_json_option,
    calibration_ids,
    encryption_config,
    heads_argument,
    heads_label,
    human_bytes,
    human_seconds,
    positive_integer,
    print_pairs,
    prompt_ids,
    quiet_libraries,
    write_json,
)
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from cipherlm.models.config import EncryptionConfig

EXAMPLES = """\
examples:
  cipherlm demo
  cipherlm demo --prompt "She opened the" --max-new-tokens 8
  cipherlm demo --scheme tfhe --block 1 --heads 2 --max-new-tokens 3
"""

PROMPT = "The old man"

WHO_SEES_WHAT = (
    "Both parties ran in this process. The server's part saw ciphertexts, sizes and times, never the text; "
    "the client sees input and output of the encrypted head, so a patient client can fit that head."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT", help=f'text to continue (default: "{PROMPT}")'
    )
    parser.add_argument(
        "--scheme",
        choices=("ckks", "tfhe"),
        default="ckks",
        help="ckks: the whole model (default); tfhe: one attention head",
    )
    parser.add_argument("--block", type=int, metavar="I", help="with TFHE, block of the head (default: 0)")
    parser.add_argument(
        "--heads",
        type=heads_argument,
        default=argparse.SUPPRESS,
        metavar="HEADS",
        help='with TFHE, heads to encrypt, "0" or "0,2", or "all" with the projection, which takes longer '
        "(default: 0)",
    )
    parser.add_argument(
        "--n-bits",
        type=int,
        default=argparse.SUPPRESS,
        metavar="B",
        help="with TFHE, bits of weights and activations, 2 to 8 (default: 4)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_integer, default=4, metavar="N", help="tokens to add (default: 4)"
    )
    add_json_option(parser)


def run(options: argparse.Namespace) -> None:
    """Generate, and tell what was encrypted."""
    options.target_modules, options.calibration = None, None
    demo, show = {"ckks": (_demo_remote, _print_remote), "tfhe": (_demo, _print_figures)}[options.scheme]
    with quiet_libraries():
        figures = demo(options, encryption_config(options))
    if options.json:
        write_json(figures)
    else:
        show(figures)


def _demo_remote(options: argparse.Namespace, config: "EncryptionConfig") -> dict[str, Any]:
    from cipherlm.cli.ckks import calibrate, check_length, remote_figures, summary, traffic_figures
    from cipherlm.cli.streaming import GeneratedToken, TokenStream, generate
    from cipherlm.models.ckks import CkksModel
    from cipherlm.models.loading import load_model, load_tokenizer

    def say(text: str = "") -> None:
        if not options.json:
            print(text, flush=True)

    if options.block is not None:
        raise UsageError("--block belongs to --scheme tfhe")
    tokenizer = load_tokenizer("tiny")
    model = CkksModel.encrypt(load_model("tiny"), config, progress=TerminalProgress())
    ids = prompt_ids(tokenizer, options.prompt)
    check_length(model, ids.shape[1], options.max_new_tokens)
    ids = model.with_prefix(ids)
    about = remote_figures(summary(model, tokenizer))
    say(f"The embedded model, whole, on encrypted text: {model.config.n_layer} blocks, CKKS")
    say(f"  The client keeps the text and the secret key (ring degree {about['ring_degree']}, 128 bits).")
    say("  The server has the weights. It gets evaluation keys, ciphertexts, and one public token,")
    say(f"  {about['prefix_text']}. When a ciphertext runs out of levels, the server masks it with random")
    say("  numbers, and the client encrypts it again.")
    with model.in_clear():
        clear = generate(model, ids, options.max_new_tokens, stream=TokenStream(tokenizer))
    calibrate(model, options, tokenizer)
    start = time.perf_counter()
    keygen_seconds = model.make_keys()
    model.set_fhe_mode("execute")

    def show(token: GeneratedToken) -> None:
        say(f"  {token.text!r:12}  {human_seconds(token.seconds):>7}")

    say(f"\n{options.prompt!r}, token by token on ciphertexts:")
    stream = TokenStream(tokenizer, show)
    generated = generate(model, ids, options.max_new_tokens, stream=stream)
    skipped = len(model.prefix)
    return {
        "scheme": "ckks",
        "prompt": options.prompt,
        "encrypted_text": tokenizer.decode(generated[0][skipped:], skip_special_tokens=True),
        "clear_text": tokenizer.decode(clear[0][skipped:], skip_special_tokens=True),
        "tokens": [token.text for token in stream.tokens],
        "keygen_seconds": keygen_seconds,
        "token_seconds": [token.seconds for token in stream.tokens],
        "encrypted_seconds": time.perf_counter() - start,
        "traffic": traffic_figures(model),
        **about,
    }


def _print_remote(figures: dict[str, Any]) -> None:
    from cipherlm.cli.ckks import who_learns_what

    traffic, seconds = figures["traffic"], figures["token_seconds"]
    print()
    print_pairs([("encrypted", figures["encrypted_text"]), ("clear", figures["clear_text"])])
    print()
    count = len(seconds)
    sent, back = (human_bytes(traffic[way] / count) for way in ("to_server", "to_client"))
    pairs = [
        ("keys", f"{human_seconds(figures['keygen_seconds'])}, {human_bytes(traffic['keys'])} sent once"),
        ("the prompt", human_seconds(seconds[0])),
    ]
    if count > 1:
        pairs.append(("each token more", human_seconds(sum(seconds[1:]) / (count - 1))))
    pairs += [
        ("in all", human_seconds(figures["encrypted_seconds"])),
        ("sent, a token", f"{sent} to the server, {back} back, {traffic['refreshes'] // count} refreshes"),
        *who_learns_what(figures["modules"]),
    ]
    print_pairs(pairs)
    print("\nBoth parties ran in this process.")


def _demo(options: argparse.Namespace, config: "EncryptionConfig") -> dict[str, Any]:
    from cipherlm.cli.streaming import GeneratedToken, TokenStream, generate
    from cipherlm.models.encrypted import EncryptedModel
    from cipherlm.models.loading import load_model, load_tokenizer

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    tokenizer = load_tokenizer("tiny")
    model = EncryptedModel.encrypt(load_model("tiny"), config, progress=TerminalProgress())
    ids = prompt_ids(tokenizer, options.prompt)
    length = compiled_length(model, ids.shape[1], options.max_new_tokens, step=1)

    block = options.block or 0
    say(f"Embedded model, block {block}: {heads_label(config.heads)} encrypted, {config.n_bits} bits")
    with model.in_clear():
        clear = generate(model, ids, options.max_new_tokens, stream=TokenStream(tokenizer))

    start = time.perf_counter()
    model.calibrate(calibration_ids(options, tokenizer, length))
    calibrated = time.perf_counter()
    circuits = compile_circuits(model, length)
    compiled = time.perf_counter()
    (circuit,) = circuits.values()
    keys_from_cache = keys_cached(circuit)
    keygen_seconds = make_keys(circuits)
    model.set_fhe_mode("execute")

    def show(token: GeneratedToken) -> None:
        say(f"  {token.text!r:12}  {human_seconds(token.seconds):>7}")

    say(f"\n{options.prompt!r}, token by token on ciphertexts:")
    stream = TokenStream(tokenizer, show)
    generated = generate(model, ids, options.max_new_tokens, stream=stream)
    return {
        "prompt": options.prompt,
        "encrypted_text": tokenizer.decode(generated[0], skip_special_tokens=True),
        "clear_text": tokenizer.decode(clear[0], skip_special_tokens=True),
        "scheme": "tfhe",
        "block": block,
        "heads": config.heads,
        "n_bits": config.n_bits,
        "tokens": [token.text for token in stream.tokens],
        "calibration_seconds": calibrated - start,
        "compile_seconds": compiled - calibrated,
        "keygen_seconds": keygen_seconds,
        "keys_from_cache": keys_from_cache,
        "token_seconds": [token.seconds for token in stream.tokens],
        "encrypted_seconds": time.perf_counter() - calibrated,
        "circuit": circuit_figures(circuit),
    }


def _print_figures(figures: dict[str, Any]) -> None:
    circuit, seconds = figures["circuit"], figures["token_seconds"]
    print()
    print_pairs(
        [
            ("encrypted", figures["encrypted_text"]),
            ("clear", figures["clear_text"]),
        ]
    )
    print()
    cached = {True: ", from the cache", False: ""}
    print_pairs(
        [
            ("compiling", human_seconds(figures["compile_seconds"]) + cached[circuit["from_cache"]]),
            ("keys", human_seconds(figures["keygen_seconds"]) + cached[figures["keys_from_cache"]]),
            ("each token", human_seconds(sum(seconds) / len(seconds))),
            ("in all", human_seconds(figures["encrypted_seconds"])),
            (
                "table lookups",
                f"{circuit['pbs']} (PBS) a token, for up to {circuit['tokens']} positions, "
                f"at most {circuit['max_bit_width']} bits",
            ),
            ("evaluation keys", f"{human_bytes(circuit['evaluation_key_bytes'])}, sent once"),
            (
                "ciphertexts",
                f"{human_bytes(circuit['ciphertext_bytes_in'])} to the server and "
                f"{human_bytes(circuit['ciphertext_bytes_out'])} back, for each token",
            ),
        ]
    )
    print(f"\n{WHO_SEES_WHAT}")
