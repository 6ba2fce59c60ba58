"""Key sets on the client's disk: a secret key, the public material that goes with it, and what they are for.

A key set is a directory that its owner alone can read::

    NAME/secret       the secret key, encrypted if there is a passphrase
    NAME/evaluation   public material, one file a kind: what a server is given
    NAME/public
    NAME/use.json     the server and the model that they belong to, and how many texts they have served
    NAME/keys.json    the scheme and its parameters, sizes and SHA-256 of the public files, the date

It appears under its name whole or not at all. Keys are bytes here; the schemes know what is in them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

HOME_VARIABLE = "CIPHERLM_HOME"
DESCRIPTION_NAME = "keys.json"
SECRET_NAME = "secret"

_VERSION = 1
_MAGIC = b"CIPHERLM secret\n"
# Magic, version, protection; then log2 of n, r and p of scrypt, a salt and a nonce: all zero in the clear.
_HEADER = struct.Struct("<16sBBBBB16s12s")
_CHECKSUM_SIZE = 32
_CLEAR, _SCRYPT_CHACHA20POLY1305 = 0, 1
# OWASP's first choice for scrypt: 128 MiB, about half a second.
_SCRYPT_COST = (17, 8, 1)
# What a damaged or hostile file may ask of this machine: at most 1 GiB and some seconds.
_LOG2_N_RANGE = range(14, 21)
_MAX_SCRYPT_MEMORY = 1 << 30
_MAX_SCRYPT_WORK = 1 << 25
_MAX_SECRET_BYTES = 1 << 30
_MAX_DESCRIPTION_BYTES = 1 << 20
_STALE_SECONDS = 24 * 60 * 60
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PIECE = 1 << 20


class KeyStoreError(ValueError):
    """Something about stored keys; its text names files and what to do, and holds nothing of a key."""


class PassphraseError(KeyStoreError):
    """A passphrase is missing, or it is wrong."""


class DamagedKeysError(KeyStoreError):
    """Files that are not what was written."""


class PermissionsError(KeyStoreError):
    """Files that others could read or replace."""


def keys_directory(root: str | os.PathLike[str] | None = None) -> Path:
    """Return where key sets are: ``root``, or ``keys`` in ``CIPHERLM_HOME`` or the user's data directory."""
    if root is not None:
        return Path(root)
    home = os.environ.get(HOME_VARIABLE)
    return Path(home or platformdirs.user_data_dir("cipherlm")) / "keys"


def parameters_fingerprint(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a description's scheme and parameters: equal for all models that keys fit."""
    # Through JSON and back, so that a description and what a file says of it are equal.
    relevant = json.loads(json.dumps({name: description.get(name) for name in ("scheme", "parameters")}))
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class KeyMaterial:
    """Keys as a scheme makes them: the secret key, and by kind what writes public material to a file."""

    secret: bytes = field(repr=False)
    public: Mapping[str, Callable[[BinaryIO], object]]


class KeySet:
    """One client's keys for one choice of parameters. Made by :meth:`create` or :meth:`load`."""

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        self.directory = directory
        self._about = about

    @classmethod
    def create(
        cls,
        root: str | os.PathLike[str] | None,
        name: str,
        description: Mapping[str, Any],
        secret: bytes,
        public: Mapping[str, Callable[[BinaryIO], object]],
        passphrase: str | None = None,
    ) -> KeySet:
        """Write a key set; with a passphrase, the secret key is encrypted under it.

        ``description`` is JSON with at least "scheme" and "parameters". ``public`` has, by kind, what writes
        the material to a file. Raises :class:`KeyStoreError` if the name is taken or not a name.
        """
        root = keys_directory(root)
        target = check_free(root, name)
        for kind in public:
            if not _NAME.fullmatch(kind) or kind in (SECRET_NAME, DESCRIPTION_NAME):
                raise KeyStoreError(f"{kind!r} is not a kind of public material")
        if not {"scheme", "parameters"} <= set(description):
            raise KeyStoreError("the description of a key set needs its scheme and its parameters")
        sealed = _seal(secret, passphrase)  # before the long part: a useless passphrase is told at once
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(root)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=root))  # mode 0700
        try:
            files = {}
            for kind, write in public.items():
                _write(temporary / kind, write)
                files[kind] = {"size": (temporary / kind).stat().st_size, "sha256": sha256(temporary / kind)}
            about = {
                "version": _VERSION,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "fingerprint": parameters_fingerprint(description),
                "passphrase": passphrase is not None,
                "files": files,
                "description": dict(description),
            }
            text = json.dumps(about, indent=2, allow_nan=False)
            _write(temporary / DESCRIPTION_NAME, lambda file: file.write(text.encode()))
            # Last, so that an interrupted run leaves none behind.
            _write(temporary / SECRET_NAME, lambda file: file.write(sealed))
            try:
                temporary.rename(target)
            except OSError:
                check_free(root, name)  # someone else may have taken it meanwhile
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_directory(root)
        return cls(target, about)

    @classmethod
    def load(cls, root: str | os.PathLike[str] | None, name: str) -> KeySet:
        """Return a key set; the secret key is read only when it is asked for.

        Raises :class:`KeyStoreError` if there is none, others could read it, or files are damaged.
        """
        root = keys_directory(root)
        directory = root / _checked_name(name)
        if not directory.is_dir():
            there = ", ".join(names(root))
            raise KeyStoreError(
                f"no keys {name!r} in {root} ({f'there are: {there}' if there else 'it has none'})"
            )
        _check_private(directory, directory.stat())
        about = _read_description(directory / DESCRIPTION_NAME)
        for kind, entry in about["files"].items():
            path = directory / kind
            if not path.is_file() or path.stat().st_size != entry["size"]:
                raise DamagedKeysError(f"{path} is missing or of the wrong size: generate new keys")
        return cls(directory, about)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.name

    @property
    def description(self) -> dict[str, Any]:
        """What the keys are for, as given when they were made."""
        return dict(self._about["description"])

    @property
    def parameters_fingerprint(self) -> str:
        """As :func:`parameters_fingerprint` of the description."""
        return str(self._about["fingerprint"])

    @property
    def created(self) -> str:
        """The date and time in UTC, ISO 8601."""
        return str(self._about["created"])

    @property
    def has_passphrase(self) -> bool:
        """Whether the secret key is encrypted."""
        return bool(self._about["passphrase"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """The SHA-256 of each public file, by kind."""
        return {kind: entry["sha256"] for kind, entry in self._about["files"].items()}

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each public file, by kind."""
        return {kind: entry["size"] for kind, entry in self._about["files"].items()}

    def path(self, kind: str) -> Path:
        """Return the file of a kind of public material."""
        if kind not in self._about["files"]:
            raise KeyStoreError(f"{self.directory} has no {kind!r} keys")
        return self.directory / kind

    def fits(self, description: Mapping[str, Any]) -> bool:
        """Return whether the keys are of a model's scheme and parameters."""
        return parameters_fingerprint(description) == self.parameters_fingerprint

    def verify(self) -> None:
        """Read the public files; raise :class:`DamagedKeysError` if one is not what was written."""
        for kind, expected in self.fingerprints.items():
            if sha256(self.path(kind)) != expected:
                raise DamagedKeysError(f"{self.path(kind)} is damaged: generate new keys")

    def secret(self, passphrase: str | None = None) -> bytes:
        """Return the secret key.

        Raises :class:`PassphraseError` if a passphrase is missing or wrong, :class:`PermissionsError` if
        others can read the file, and :class:`DamagedKeysError` if it is not what was written.
        """
        path = self.directory / SECRET_NAME
        try:
            with path.open("rb") as file:
                _check_private(
                    path, os.fstat(file.fileno())
                )  # of what was opened, not of what is there later
                data = file.read(_MAX_SECRET_BYTES + 1)
        except FileNotFoundError:
            raise DamagedKeysError(f"{path} is missing: generate new keys") from None
        return _unseal(path, data, passphrase)

    def __repr__(self) -> str:
        return f"KeySet({str(self.directory)!r})"


def names(root: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names of all key sets, damaged ones too, sorted."""
    root = keys_directory(root)
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def check_free(root: str | os.PathLike[str] | None, name: str) -> Path:
    """Return where a new key set goes; raise :class:`KeyStoreError` if its name is taken or not a name."""
    target = keys_directory(root) / _checked_name(name)
    if target.exists():
        raise KeyStoreError(f"there are keys {name!r} in {target.parent} already: choose another name")
    return target


def delete(root: str | os.PathLike[str] | None, name: str) -> None:
    """Delete a key set, damaged or not. Nothing that was encrypted with it can be decrypted afterwards."""
    root = keys_directory(root)
    directory = root / _checked_name(name)
    if not directory.is_dir():
        raise KeyStoreError(f"no keys {name!r} in {root}")
    # Half a key set never stands under its name.
    gone = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    directory.rename(gone / name)
    (gone / name / SECRET_NAME).unlink(missing_ok=True)
    shutil.rmtree(gone)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _seal(secret: bytes, passphrase: str | None) -> bytes:
    if len(secret) > _MAX_SECRET_BYTES // 2:
        raise KeyStoreError(f"a secret key of {len(secret)} bytes is too large to store")
    if passphrase is None:
        header = _HEADER.pack(_MAGIC, _VERSION, _CLEAR, 0, 0, 0, bytes(16), bytes(12))
        body = header + secret
    else:
        salt, nonce = os.urandom(16), os.urandom(12)
        header = _HEADER.pack(_MAGIC, _VERSION, _SCRYPT_CHACHA20POLY1305, *_SCRYPT_COST, salt, nonce)
        key = _derive(passphrase, salt, *_SCRYPT_COST)
        body = header + ChaCha20Poly1305(key).encrypt(nonce, secret, header)
    # Not for secrecy: it tells damage from a wrong passphrase.
    return body + hashlib.sha256(body).digest()


def _unseal(path: Path, data: bytes, passphrase: str | None) -> bytes:
    body, checksum = data[:-_CHECKSUM_SIZE], data[-_CHECKSUM_SIZE:]
    if len(body) < _HEADER.size or not body.startswith(_MAGIC) or len(data) > _MAX_SECRET_BYTES:
        raise DamagedKeysError(f"{path} is damaged, or not a secret key: restore it, or generate new keys")
    header, content = body[: _HEADER.size], body[_HEADER.size :]
    _, version, protection, log2_n, r, p, salt, nonce = _HEADER.unpack(header)
    if version != _VERSION:
        raise KeyStoreError(f"{path} is of format {version}, this version of CipherLM reads {_VERSION}")
    if hashlib.sha256(body).digest() != checksum:
        raise DamagedKeysError(f"{path} is damaged: restore it, or generate new keys")
    if protection == _CLEAR:
        return content
    if protection != _SCRYPT_CHACHA20POLY1305:
        raise KeyStoreError(f"{path} is protected in a way that this version of CipherLM does not know")
    if (
        log2_n not in _LOG2_N_RANGE
        or not (r and p)
        or (128 * r << log2_n) > _MAX_SCRYPT_MEMORY
        or (r * p << log2_n) > _MAX_SCRYPT_WORK
    ):
        raise DamagedKeysError(f"{path} asks for too little or too much work: it is not one of CipherLM's")
    if passphrase is None:
        raise PassphraseError(
            f"{path} needs its passphrase: give --passphrase-file, --ask-passphrase or passphrase="
        )
    try:
        return ChaCha20Poly1305(_derive(passphrase, salt, log2_n, r, p)).decrypt(nonce, content, header)
    except InvalidTag:
        raise PassphraseError(f"wrong passphrase for {path}") from None


def _derive(passphrase: str, salt: bytes, log2_n: int, r: int, p: int) -> bytes:
    if not passphrase:
        raise PassphraseError("the passphrase is empty")
    # One passphrase, however a keyboard composes its accents.
    normal = unicodedata.normalize("NFC", passphrase).encode()
    return Scrypt(salt=salt, length=32, n=1 << log2_n, r=r, p=p).derive(normal)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(descriptor, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere directories cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(root: Path) -> None:
    """Remove what interrupted runs have left, but not what another one may be writing now."""
    for path in root.glob(".new-*"):
        try:
            stale = time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # the other run is done
            continue
        if stale:
            shutil.rmtree(path, ignore_errors=True)


def _check_private(path: Path, status: os.stat_result) -> None:
    if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = "700" if stat.S_ISDIR(status.st_mode) else "600"
        raise PermissionsError(
            f"{path} can be used by others (mode {stat.S_IMODE(status.st_mode):o}): chmod {mode} {path}, "
            "and generate new keys if somebody may have read it"
        )


def _read_description(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            about = json.loads(file.read(_MAX_DESCRIPTION_BYTES))
        version = about["version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise DamagedKeysError(f"{path} is missing or damaged: generate new keys") from None
    if version != _VERSION:
        raise KeyStoreError(f"{path} is of format {version!r}, this version of CipherLM reads {_VERSION}")
    if not _is_description(about):
        raise DamagedKeysError(f"{path} is damaged: generate new keys")
    return dict(about)


def _is_description(about: Any) -> bool:
    files, description = about.get("files"), about.get("description")
    return (
        isinstance(about.get("created"), str)
        and isinstance(about.get("passphrase"), bool)
        and isinstance(description, dict)
        and about.get("fingerprint") == parameters_fingerprint(description)
        and isinstance(files, dict)
        and all(_NAME.fullmatch(kind) and kind != SECRET_NAME for kind in files)
        and all(isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in files.values())
        and all(re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))) for entry in files.values())
    )


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise KeyStoreError(
            f"{name!r} is not a name for keys: use letters, digits, '.', '_' and '-', at most 64, "
            "the first a letter or digit"
        )
    return name
