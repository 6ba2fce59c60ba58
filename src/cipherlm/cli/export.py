"""Write a model as two bundles: what a server computes with, and what its clients get.

Nothing of the weights that the server keeps is in the client's bundle. Value ranges are found on text first,
unless the model was saved encrypted and has them.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cipherlm.cli import CommandError, UsageError
from cipherlm.cli.circuits import compile_circuits
from cipherlm.cli.common import (
    add_calibration_option,
    add_encryption_options,
    add_json_option,
    calibration_ids,
    configured,
    existing_file,
    human_bytes,
    is_saved,
    load_encrypted,
    positive_integer,
    print_pairs,
    quiet_libraries,
    settle_scheme,
    write_json,
)
from cipherlm.cli.whole import is_chat, whole_chat_model
from cipherlm.progress import TerminalProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cipherlm.models.config import EncryptionConfig
    from cipherlm.models.encrypted import EncryptedModel

EXAMPLES = """\
examples:
  cipherlm export tiny tiny-bundle
  cipherlm export smollm2 smollm2-bundle
  cipherlm export smollm2 --target-modules linear smollm2-linear-bundle
  cipherlm export gpt2 --scheme tfhe --heads 0 --n-bits 4 --tokens 8 head-bundle

then:
  cipherlm serve tiny-bundle/server
  cipherlm generate --server http://127.0.0.1:8470 --bundle tiny-bundle/client "The old man"
"""

DEFAULT_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help='"tiny" (embedded), "smollm2", a directory, a GGUF file, or an id on the Hugging Face hub',
    )
    parser.add_argument("directory", metavar="OUT", help="new directory for the bundles, server and client")
    add_encryption_options(parser)
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help=f"TFHE: length to compile circuits for (default: {DEFAULT_TOKENS})",
    )
    linear = parser.add_argument_group("linear layers, and whole chat models")
    public = linear.add_mutually_exclusive_group()
    public.add_argument(
        "--prefix",
        metavar="TEXT",
        help="linear layers: public text before every prompt, which then costs clients nothing",
    )
    public.add_argument(
        "--system",
        metavar="TEXT",
        help="public system prompt of chats (default: what the model's chat template begins with)",
    )
    linear.add_argument(
        "--training",
        action="store_true",
        help="linear layers: let clients have gradients too, which takes twice the matrices",
    )
    parser.add_argument(
        "--draft",
        metavar="DRAFT",
        help="put a draft into the clients' bundle, for several tokens a pass (their --draft): a directory "
        "with a small model of the same tokenizer, or with a draft head",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the model for clients (default: MODEL)")
    add_calibration_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> None:
    """Export, and say what there is."""
    existing_file(options.calibration)
    with quiet_libraries():
        result = _export(options)
    if options.json:
        write_json(result)
        return
    modules = result["modules"]
    print_pairs(
        [
            ("model", f"{result['name']}, {result['scheme'].upper()}"),
            ("at the server", ", ".join(modules) if len(modules) <= 12 else f"{len(modules)} products"),
            ("server's bundle", f"{result['server']}, {human_bytes(result['server_bytes'])}"),
            ("clients' bundle", f"{result['client']}, {human_bytes(result['client_bytes'])}"),
            ("fingerprint", result["fingerprint"]),
        ]
    )


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from cipherlm.models.loading import load_tokenizer
    from cipherlm.serving.bundle import export

    root = Path(options.directory)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):  # before what takes minutes
        raise CommandError(f"{root} is there already and not empty: export to a new directory")
    settle_scheme(options, "tokens")
    progress = TerminalProgress()
    tokenizer = load_tokenizer(options.model)
    name = options.name or Path(options.model).name
    draft = _draft(options)
    linear = _linear_layers(options)
    if linear is not None:
        from cipherlm.serving.linear_bundle import export_linear

        description = export_linear(
            *linear,
            root,
            tokenizer,
            name=name,
            prefix=options.prefix,
            system=options.system,
            training=options.training,
            progress=progress,
        )
        return _told(root, description)
    model = _whole_chat_model(options, tokenizer, progress) or load_encrypted(options, progress)
    _READY[model.encryption_config.scheme](model, options, tokenizer, progress)
    with progress("writing bundles"):
        description = export(model, root, tokenizer, name=name, draft=draft)
    return _told(root, description)


def _draft(options: argparse.Namespace) -> Any:
    """Return the draft for the bundle, or None. What cannot be is refused before the model is loaded."""
    from cipherlm.models.drafts import load_draft
    from cipherlm.models.loading import load_config

    if options.draft is None:
        return None
    if configured(options).is_linear or options.scheme == "tfhe":
        raise UsageError("--draft is for blocks on ciphertexts (CKKS): leave it out")
    return load_draft(options.draft, load_config(options.model))


def _ready_ckks(model: Any, options: argparse.Namespace, tokenizer: Any, progress: TerminalProgress) -> None:
    if not model.is_calibrated:
        with progress("calibrating"):
            model.calibrate(calibration_ids(options, tokenizer, None))


def _ready_tfhe(model: Any, options: argparse.Namespace, tokenizer: Any, progress: TerminalProgress) -> None:
    tokens = options.tokens or DEFAULT_TOKENS
    if not model.is_calibrated:
        with progress("calibrating"):
            model.calibrate(calibration_ids(options, tokenizer, tokens))
    compile_circuits(model, tokens)


_READY = {"ckks": _ready_ckks, "tfhe": _ready_tfhe}
"""What is to be done before a model of a scheme can be written."""


def _whole_chat_model(
    options: argparse.Namespace, tokenizer: Any, progress: TerminalProgress
) -> "EncryptedModel | None":
    """Return the whole model, calibrated, if it is one for chats and nothing else of it was asked for."""
    from cipherlm.models.loading import load_model

    config = configured(options)
    if not config.is_whole or is_saved(options) or not is_chat(tokenizer):
        if options.system:
            raise UsageError("--system is for models with a chat template")
        return None
    return whole_chat_model(
        load_model(options.model),
        tokenizer,
        progress,
        system=options.system,
        context=getattr(options, "context", None),
        chats=options.calibration,
        post_quantum=config.post_quantum,
    )


def _linear_layers(options: argparse.Namespace) -> "tuple[PreTrainedModel, EncryptionConfig] | None":
    """Return the clear model whose linear layers are wanted, and which of them, unless others are."""
    from cipherlm.models.architecture import MODULES
    from cipherlm.models.config import LINEAR, LINEAR_SCHEMES, EncryptionConfig
    from cipherlm.models.loading import load_model
    from cipherlm.models.targets import means_linear

    config = configured(options)
    if config.scheme in LINEAR_SCHEMES:
        model = load_model(options.model)
        unsaid = options.target_modules is None and options.block is None
        if unsaid and not is_saved(options) and model.config.model_type not in MODULES:
            config = EncryptionConfig(LINEAR)
        if means_linear(model, config):
            for name in ("context", "post_quantum", "tokens", "calibration"):
                if getattr(options, name, None) is not None:
                    raise UsageError(
                        f"--{name.replace('_', '-')} means nothing to linear layers: leave it out"
                    )
            return model, config
    for name in ("prefix", "training"):
        if getattr(options, name):
            raise UsageError(f"--{name} is for linear layers: add --target-modules linear")
    return None


def _told(root: Path, description: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": description["name"],
        "scheme": description["scheme"],
        "modules": description["modules"],
        "fingerprint": description["fingerprint"],
        "server": str(root / "server"),
        "client": str(root / "client"),
        "server_bytes": _size(root / "server"),
        "client_bytes": _size(root / "client"),
    }


def _size(directory: Any) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
