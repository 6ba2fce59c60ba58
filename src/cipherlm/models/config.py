"""What to encrypt and how: the one object that a user writes down."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from cipherlm.schemes.tfhe.circuit import DEFAULT_P_ERROR
from cipherlm.schemes.tfhe.quantization import check_bits

Scheme = Literal["tfhe", "ckks"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

CONFIG_NAME = "encryption_config.json"
FORMAT_VERSION = 2
MAX_P_ERROR = 0.1
ALL = "all"
"""Every block of a model, as one remote module."""
LINEAR = "linear"
"""Every linear layer of a model but its output embedding, each on its own."""

LINEAR_SCHEMES: tuple[Scheme, ...] = ("ckks",)
"""The schemes that have linear layers of any model."""

DEFAULT_BITS = 4

OWN_FIELDS: dict[Scheme, tuple[str, ...]] = {
    "tfhe": ("n_bits", "heads", "p_error"),
    "ckks": ("prefix", "tokens", "context", "post_quantum"),
}
"""The fields that mean something to one scheme only."""

_TFHE_DEFAULTS: dict[str, Any] = {"n_bits": DEFAULT_BITS, "p_error": DEFAULT_P_ERROR}


@dataclass(frozen=True)
class EncryptionConfig:
    """Which modules of a model run on encrypted data, and with which parameters.

    ``target_modules`` names modules as PEFT does: a list of names or of their endings
    (``["transformer.h.0.attn"]``, ``["attn"]`` for every block), also with ``*``, ``?`` and ``[0-9]`` as in
    names of files, or one string, which may also be a regular expression for the whole name. TFHE encrypts
    attention modules of GPT-2. CKKS encrypts those of GPT-2, Llama and what is built like it, their MLPs
    (``"transformer.h.0.mlp"``), blocks (``"model.layers.0"``), and with ``"all"`` every block as one. Of any
    other model, and by their names of these too, it encrypts linear layers; ``"linear"`` stands for all of
    them but the output embedding. By default the whole model is encrypted.

    ``scheme`` is CKKS, unless a field of TFHE's is given.

    TFHE alone has these. ``heads`` chooses attention heads; the other heads and the output projection then
    stay in the clear. With None, all heads and the output projection are encrypted. ``n_bits`` is the
    precision of weights and activations, 2 to 8 (4 by default). ``p_error`` is the probability that the
    noise of encryption moves one table lookup to a neighbouring cell; lower is slower.

    CKKS alone has these. ``prefix`` are the ids of public tokens that every text starts with; None stands for
    the model's token for the beginning of a text. They are not encrypted, which keeps the massive activations
    of a first token (its attention sink) out of the ciphertexts, and there may be any number of them: a
    system prompt, say. ``tokens`` of a prompt lie side by side in a ciphertext: a power of two, 8 for the
    widths of GPT-2 and SmolLM2. A text has at most ``context`` tokens, those of the prefix among them.
    ``post_quantum`` keeps 128 bits of security against quantum computers too, with errors about twice as
    large. Linear layers, whose parameters are their own, have that anyway.

    Raises ``ValueError`` on anything that cannot work whatever the model is.
    """

    target_modules: str | list[str] = ALL
    # None tells what was given from what was not; nobody finds it there later.
    scheme: Scheme = None  # type: ignore[assignment]
    n_bits: int = None  # type: ignore[assignment]
    heads: list[int] | None = None
    p_error: float = None  # type: ignore[assignment]
    prefix: list[int] | None = None
    tokens: int = 8
    context: int = 64
    post_quantum: bool = False

    def __post_init__(self) -> None:
        # Lists are copied, so that this object stays as it was checked.
        object.__setattr__(self, "target_modules", _checked_names(self.target_modules))
        self._settle()
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(map(repr, SCHEMES))}, not {self.scheme!r}")
        self._check_scheme()
        check_bits(self.n_bits)
        if self.heads is not None:
            object.__setattr__(self, "heads", _checked_heads(self.heads))
        if (
            isinstance(self.p_error, bool)
            or not isinstance(self.p_error, (int, float))
            or not 0 < self.p_error < MAX_P_ERROR
        ):
            raise ValueError(f"p_error must be a number between 0 and {MAX_P_ERROR}, not {self.p_error!r}")
        for name in ("tokens", "context"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 2:
                raise ValueError(f"{name} must be an integer of at least 2, not {value!r}")
        if not isinstance(self.post_quantum, bool):
            raise ValueError(f"post_quantum must be True or False, not {self.post_quantum!r}")
        if self.prefix is not None:
            object.__setattr__(self, "prefix", _checked_prefix(self.prefix, self.context))

    def _settle(self) -> None:
        """Fill in what was not given."""
        tfhe = any(getattr(self, name) is not None for name in OWN_FIELDS["tfhe"]) and not self.is_linear
        for name, value in {"scheme": "tfhe" if tfhe else "ckks", **_TFHE_DEFAULTS}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def is_linear(self) -> bool:
        """Whether ``target_modules`` stands for every linear layer."""
        return self.target_modules in (LINEAR, [LINEAR])

    @property
    def is_whole(self) -> bool:
        """Whether ``target_modules`` stands for every block of a model."""
        return self.target_modules in (ALL, [ALL])

    def _check_scheme(self) -> None:
        """Refuse what the scheme, or a placement, would ignore."""
        if self.is_linear and self.scheme not in LINEAR_SCHEMES:
            known = " or ".join(f"scheme={name!r}" for name in LINEAR_SCHEMES)
            raise ValueError(f"target_modules={LINEAR!r} is for {known}, not {self.scheme!r}")
        ignored = [name for name in ("prefix", "tokens", "context") if getattr(self, name) != _default(name)]
        if self.is_linear and ignored:
            raise ValueError(
                f"{ignored[0]} means nothing to target_modules={LINEAR!r}, where the client has a key-value "
                "cache of its own: leave it out"
            )
        for scheme, names in OWN_FIELDS.items():
            defaults = {**{field.name: field.default for field in fields(self)}, **_TFHE_DEFAULTS}
            given = [name for name in names if getattr(self, name) != defaults[name]]
            if scheme != self.scheme and given:
                raise ValueError(
                    f"{given[0]} means nothing to scheme={self.scheme!r}: leave it out, or give "
                    f"scheme={scheme!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the scheme's fields and the format's version, ready for JSON."""
        values = asdict(self)
        for scheme, names in OWN_FIELDS.items():
            if scheme != self.scheme:
                for name in names:
                    del values[name]
        return {"version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EncryptionConfig":
        """Return the configuration that ``to_dict`` gave. Raises ``ValueError`` on anything else."""
        values = dict(values)
        version = values.pop("version", None)
        # Version 1 knew TFHE only, with the same fields.
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"version {version!r} of an encryption config is not known, only up to {FORMAT_VERSION}: "
                "was it written by a newer CipherLM?"
            )
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields in an encryption config: {', '.join(unknown)}")
        if "target_modules" not in values:
            raise ValueError("an encryption config needs target_modules")
        # What was written while TFHE was the default.
        values.setdefault("scheme", "tfhe")
        return cls(**values)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``encryption_config.json`` into ``directory``, which is made if need be."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "EncryptionConfig":
        """Read ``encryption_config.json`` from ``directory``.

        Raises ``FileNotFoundError`` if there is none and ``ValueError`` if it is damaged; both name the file.
        """
        path = Path(directory) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no encrypted model in {os.fspath(directory)!r}: no {CONFIG_NAME}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _default(name: str) -> Any:
    return next(field.default for field in fields(EncryptionConfig) if field.name == name)


def _checked_names(names: Any) -> str | list[str]:
    wanted = [names] if isinstance(names, str) else names
    if not isinstance(wanted, (list, tuple)) or not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"target_modules must be a module name or a list of them, not {names!r}")
    if not wanted or not all(wanted):
        raise ValueError('target_modules is empty: name a module, for example "transformer.h.0.attn"')
    return names if isinstance(names, str) else list(wanted)


def _checked_heads(given: Any) -> list[int]:
    if not isinstance(given, (list, tuple, range)) or not all(_is_integer(head) for head in given):
        raise ValueError(f"heads must be a list of head numbers or None, not {given!r}")
    heads = list(given)
    if not heads:
        raise ValueError("heads is empty: name at least one head, or leave it out for all heads")
    if min(heads) < 0:
        raise ValueError(f"heads are numbered from 0; {min(heads)} is not a head")
    if len(set(heads)) < len(heads):
        raise ValueError(f"heads names a head twice: {heads}")
    return heads


def _checked_prefix(given: Any, context: int) -> list[int]:
    if not isinstance(given, (list, tuple, range)) or not all(_is_integer(i) and i >= 0 for i in given):
        raise ValueError(f"prefix must be a list of token ids or None, not {given!r}")
    if not given:
        raise ValueError("prefix is empty: the first token of a text has to be public")
    if len(given) >= context:
        raise ValueError(
            f"a prefix of {len(given)} tokens leaves no room in context={context}: give a longer context"
        )
    return list(given)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
