"""What several verbs share: options, the models they name, and how figures are written."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cipherlm.cli import CommandError, UsageError

if TYPE_CHECKING:
    import torch

    from cipherlm.models.config import EncryptionConfig
    from cipherlm.models.encrypted import EncryptedModel
    from cipherlm.models.linear import EncryptedLinearModel
    from cipherlm.progress import Progress

A = TypeVar("A")


@dataclass(frozen=True)
class SchemeOptions:
    """How the options of verbs make a configuration of one scheme."""

    names: tuple[str, ...]
    """The options that mean something to this scheme only."""
    modules: Callable[[int | None], str | list[str]]
    """Returns what is encrypted where no modules are named, but perhaps a block."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What verbs encrypt where nothing is said, if that is not what the configuration has by default."""


def _attention(block: int | None) -> list[str]:
    return [f"transformer.h.{block or 0}.attn"]


def _blocks(block: int | None) -> str | list[str]:
    return "all" if block is None else [f"transformer.h.{block}"]


SCHEME_OPTIONS = {
    "tfhe": SchemeOptions(("n_bits", "heads", "p_error"), _attention, {"heads": [0]}),
    "ckks": SchemeOptions(("context", "post_quantum"), _blocks),
}
_CONFIG_OPTIONS = ("scheme", *(name for scheme in SCHEME_OPTIONS.values() for name in scheme.names))


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model",
        default="tiny",
        metavar="NAME",
        help='"tiny" (embedded, the default), "smollm2", a directory, a GGUF file, or an id on the Hugging '
        'Face hub such as "gpt2"',
    )


def add_encryption_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``EncryptionConfig`` holds.

    Without defaults, so that what was given can be told from what was not: see ``encryption_config``.
    """
    add_scheme_option(parser)
    add_module_options(parser, "encrypt")
    parser.add_argument(
        "--heads",
        type=heads_argument,
        default=argparse.SUPPRESS,
        metavar="HEADS",
        help='with TFHE, heads to encrypt, "0" or "0,2", or "all" with the output projection (default: 0)',
    )
    parser.add_argument(
        "--n-bits",
        type=int,
        default=argparse.SUPPRESS,
        metavar="B",
        help="with TFHE, bits of weights and activations, 2 to 8 (default: 4)",
    )
    add_noise_option(parser)


def add_scheme_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--scheme``, ``--context`` and ``--post-quantum``."""
    parser.add_argument(
        "--scheme",
        choices=tuple(SCHEME_OPTIONS),
        default=argparse.SUPPRESS,
        help="ckks: the whole model, blocks or modules of it (default); tfhe: heads of attention, quantised "
        "(default where an option of its own is given)",
    )
    parser.add_argument(
        "--context",
        type=positive_integer,
        default=argparse.SUPPRESS,
        metavar="N",
        help="with CKKS, tokens of a text at most (default: 64)",
    )
    parser.add_argument(
        "--post-quantum",
        action="store_true",
        default=argparse.SUPPRESS,
        help="128 bits of security against quantum computers too, with --scheme ckks: twice the errors",
    )


def add_module_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add ``--block`` and ``--target-modules``, which say what to ``verb``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--block",
        type=int,
        metavar="I",
        help=f"{verb} block I; with TFHE its attention (default: 0)",
    )
    group.add_argument(
        "--target-modules",
        type=modules_argument,
        metavar="NAMES",
        help="modules separated by commas, such as transformer.h.0.attn,transformer.h.1.attn; "
        'with CKKS also transformer.h.0.mlp, transformer.h.0, or "all" (the default); "linear", or names of '
        "linear layers, for any architecture",
    )


def add_noise_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--p-error``."""
    parser.add_argument(
        "--p-error",
        type=float,
        default=argparse.SUPPRESS,
        metavar="P",
        help="with TFHE, probability that noise moves one table lookup to the neighbouring cell",
    )


def add_calibration_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--calibration``."""
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text to take value ranges from, one sentence a line (default: the text in this package)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="write one JSON object instead of a table")


def heads_argument(text: str) -> list[int] | None:
    """Return head numbers, or None for ``all``."""
    if text.strip().lower() == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r}: use head numbers such as "0" or "0,2", or "all"'
        ) from None


def heads_label(heads: Sequence[int] | None) -> str:
    """Return the words for a set of heads."""
    if heads is None:
        return "all heads"
    return f"head{'s' if len(heads) > 1 else ''} {','.join(map(str, heads))}"


def positive_integer(text: str) -> int:
    """Return an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def modules_argument(text: str) -> list[str]:
    """Return the module names in a list separated by commas."""
    return [name.strip() for name in text.split(",")]


def settle_scheme(options: argparse.Namespace, *others: str) -> None:
    """Choose the scheme where no option says it: TFHE for an option of its own, and CKKS otherwise.

    ``others`` are further options of this verb that mean something to TFHE only. A saved model knows its
    scheme itself.
    """
    if hasattr(options, "scheme") or is_saved(options):
        return
    given = any(hasattr(options, name) for name in SCHEME_OPTIONS["tfhe"].names)
    options.scheme = "tfhe" if given or any(getattr(options, name) for name in others) else "ckks"


def encryption_config(options: argparse.Namespace, **changes: Any) -> "EncryptionConfig":
    """Return the configuration that the options describe.

    Where they say nothing, all blocks with CKKS, and with TFHE head 0 of block 0. Raises ``UsageError`` for
    an option of the other scheme.
    """
    from cipherlm.models.config import EncryptionConfig

    given = {name: getattr(options, name) for name in _CONFIG_OPTIONS if hasattr(options, name)}
    chosen = given.pop("scheme", "ckks")
    for name, scheme in SCHEME_OPTIONS.items():
        # None is what verbs with options of their own have where nothing was given.
        others = {option: given.pop(option) for option in scheme.names if name != chosen and option in given}
        wrong = [option for option, value in others.items() if value is not None]
        if wrong:
            raise UsageError(f"--{wrong[0].replace('_', '-')} belongs to --scheme {name}")
    own = SCHEME_OPTIONS[chosen]
    modules = options.target_modules or own.modules(options.block)
    return EncryptionConfig(
        **{**own.defaults, **given, "scheme": chosen, "target_modules": modules, **changes}
    )


def scheme_named(options: argparse.Namespace) -> str:
    """Return the scheme of the options, settled, or that of the saved model that they name."""
    from cipherlm.models.config import CONFIG_NAME

    try:
        saved = json.loads(Path(options.model, CONFIG_NAME).read_text(encoding="utf-8"))
        return str(saved.get("scheme", "tfhe"))  # as the configuration reads it
    except (
        OSError,
        ValueError,
        AttributeError,
    ):
        # Not saved encrypted, or damaged, which loading it will say.
        return str(getattr(options, "scheme", "ckks"))


def of_scheme(options: argparse.Namespace, choices: Mapping[str, A]) -> A:
    """Return what a verb does with the scheme of the options."""
    # A scheme that is not known: loading the model says so.
    return choices.get(scheme_named(options), choices["ckks"])


def configured(options: argparse.Namespace) -> "EncryptionConfig":
    """Return the configuration of the options, or of the saved model that they name.

    Raises ``UsageError`` for options that the saved model settles.
    """
    from cipherlm.models.config import EncryptionConfig

    if not is_saved(options):
        return encryption_config(options)
    given = [name for name in _CONFIG_OPTIONS if hasattr(options, name)]
    given += [name for name in ("block", "target_modules") if getattr(options, name) is not None]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(
            f"{options.model} was saved encrypted and says itself what {names} would: leave it out"
        )
    return EncryptionConfig.from_pretrained(options.model)


def load_encrypted(options: argparse.Namespace, progress: "Progress") -> "EncryptedModel":
    """Return the model that the options name with its modules encrypted, calibrated if it was saved so.

    Raises ``CommandError`` if these are linear layers.
    """
    from cipherlm.models.encrypted import EncryptedModel

    model = load_any_encrypted(options, progress)
    if not isinstance(model, EncryptedModel):
        raise CommandError(
            "linear layers are for `cipherlm generate` and `cipherlm export`, not for this verb"
        )
    return model


def load_any_encrypted(
    options: argparse.Namespace, progress: "Progress"
) -> "EncryptedModel | EncryptedLinearModel":
    """Return the model that the options name with its modules or its linear layers encrypted."""
    config = configured(options)  # before the model, so that a wrong option is told at once

    from cipherlm.models.loading import load_model

    return encrypted(options, load_model(options.model), config, progress)


def encrypted(
    options: argparse.Namespace, model: Any, config: "EncryptionConfig", progress: "Progress"
) -> "EncryptedModel | EncryptedLinearModel":
    """Return a clear model that was loaded for the options encrypted, in place or as it was saved."""
    from cipherlm.models.encrypted import EncryptedModel
    from cipherlm.models.integration import get_encrypted_model
    from cipherlm.models.targets import means_linear

    if is_saved(options) and not means_linear(model, config):
        return EncryptedModel.from_pretrained(options.model, progress=progress)
    return get_encrypted_model(model, config, progress=progress)


def is_saved(options: argparse.Namespace) -> bool:
    """Say whether the model that the options name was saved encrypted."""
    from cipherlm.models.config import CONFIG_NAME

    return Path(options.model, CONFIG_NAME).is_file()


def calibration_ids(
    options: argparse.Namespace, tokenizer: Any, max_tokens: int | None
) -> list["torch.Tensor"]:
    """Return the calibration sentences as token ids, cut to ``max_tokens``."""
    from cipherlm.evaluation.texts import calibration_sentences, encode, read_sentences

    path = options.calibration
    return encode(tokenizer, read_sentences(path) if path else calibration_sentences(), max_tokens=max_tokens)


def prompt_ids(tokenizer: Any, prompt: str) -> "torch.Tensor":
    """Return a prompt as token ids (1, tokens)."""
    import torch

    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise CommandError("the prompt is empty")
    return torch.tensor([ids])


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the warnings of libraries, which are not about what the user did, out of a command's output."""
    # Read when transformers is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_json(value: Any) -> None:
    """Write one JSON object on stdout."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    print()


def human_bytes(count: float) -> str:
    """Return a size in decimal units."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def human_seconds(seconds: float) -> str:
    """Return a duration with as many digits as matter."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def print_pairs(pairs: Sequence[tuple[str, str]], *, indent: str = "") -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print(f"{indent}{name.ljust(width)}  {value}", flush=True)


def existing_file(path: str | None) -> Path | None:
    """Return a file that is there, so that a long run does not fail at its end."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise CommandError(f"{path}: no such file")
    return Path(path)
