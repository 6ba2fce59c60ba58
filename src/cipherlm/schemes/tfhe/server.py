"""The server's part of a compiled circuit: weights and evaluation keys, and no secret key."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cipherlm.errors import Refused
from cipherlm.schemes.tfhe.description import CircuitDescription
from cipherlm.schemes.tfhe.files import read_json, sha256_of
from cipherlm.schemes.tfhe.library import import_concrete, load_server
from cipherlm.schemes.tfhe.messages import HEADER_BYTES, Header, Kind, read_message, seal

FORMAT_VERSION = 1
_FORMAT_NAME = "cipherlm-tfhe-server"


@dataclass(frozen=True)
class ServerKeys:
    """One client's evaluation keys of one circuit, checked and unpacked: see ``ServerCircuit.load_keys``."""

    circuit: str
    fingerprint: bytes
    _keys: Any = field(repr=False)


class ServerCircuit:
    """A compiled circuit that runs on ciphertexts. It cannot hold a secret key: there is no place for one."""

    def __init__(self, description: CircuitDescription, server: Any) -> None:
        self.description = description
        self._server = server

    def load_keys(self, source: bytes | Path | BinaryIO) -> ServerKeys:
        """Read a client's evaluation keys: bytes, a file, or an open file, which is read up to their end.

        Raises ``ValueError`` for anything but keys of this circuit. Takes seconds, and as many bytes as
        ``description.memory`` once they have been used.
        """
        if isinstance(source, Path):
            with source.open("rb") as file:
                return self._load_all(file)
        if isinstance(source, bytes):
            return self._load_all(io.BytesIO(source))
        header = Header.unpack(source.read(HEADER_BYTES))
        header.check(Kind.EVALUATION_KEYS, self.description.fingerprint)
        body = read_message(source, header, self.description.keys)
        fingerprint = hashlib.sha256(body).digest()
        if header.keys != fingerprint:
            raise ValueError("the evaluation keys are labelled as other keys")
        return ServerKeys(self.description.fingerprint, fingerprint, _read(_deserialize_keys, body))

    def run(self, ciphertext: bytes, keys: ServerKeys | bytes | Path) -> bytes:
        """Run the circuit on an input that ``ClientCircuit.encrypt`` made; return the result's bytes.

        Raises ``Refused`` for anything but an input of this circuit under these keys. The first run with
        keys unpacks them and takes seconds longer.
        """
        if not isinstance(keys, ServerKeys):
            keys = self.load_keys(keys)
        description = self.description
        if keys.circuit != description.fingerprint:
            raise ValueError("the evaluation keys are another circuit's")
        try:
            value = self._input(ciphertext, keys)
        except ValueError as error:
            raise Refused(str(error)) from error
        result = self._server.run(value, evaluation_keys=keys._keys)
        return seal(Kind.RESULT, description.fingerprint, keys.fingerprint, result.serialize())

    def _input(self, ciphertext: bytes, keys: ServerKeys) -> Any:
        header = Header.unpack(ciphertext)
        header.check(Kind.INPUT, self.description.fingerprint)
        if header.keys != keys.fingerprint:
            raise ValueError("the input is encrypted under other keys than the session's")
        file = io.BytesIO(ciphertext)
        file.seek(HEADER_BYTES)
        value = _read(_deserialize_value, read_message(file, header, self.description.inputs))
        if file.read(1):
            raise ValueError("the message is followed by something else")
        return value

    def save(self, directory: Path, name: str, **facts: Any) -> list[Path]:
        """Write ``<name>.zip`` and ``<name>.json``, which says ``facts`` too; return their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        archive, text = directory / f"{name}.zip", directory / f"{name}.json"
        self._server.save(archive)
        values = {
            "format": _FORMAT_NAME,
            "version": FORMAT_VERSION,
            "archive_sha256": sha256_of(archive),
            "circuit": self.description.to_dict(),
            **facts,
        }
        text.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return [archive, text]

    @classmethod
    def load(cls, directory: Path, name: str) -> ServerCircuit:
        """Read what ``save`` wrote. The archive holds native code: load only what you trust.

        Raises ``ValueError``, naming the file, if one is missing, damaged or for another Concrete or machine.
        """
        archive, text = directory / f"{name}.zip", directory / f"{name}.json"
        values = read_json(text, _FORMAT_NAME, FORMAT_VERSION)
        try:
            description = CircuitDescription.from_dict(values.get("circuit"))
            description.check_version()
            description.check_machine()
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from error
        if not archive.is_file() or sha256_of(archive) != values.get("archive_sha256"):
            raise ValueError(f"{archive} is missing or damaged: export the circuit again")
        return cls(description, load_server(archive))

    def _load_all(self, file: BinaryIO) -> ServerKeys:
        keys = self.load_keys(file)
        if file.read(1):
            raise ValueError("the evaluation keys are followed by something else")
        return keys


def _deserialize_keys(body: bytes) -> Any:
    return import_concrete().EvaluationKeys.deserialize(body)


def _deserialize_value(body: bytes) -> Any:
    return import_concrete().Value.deserialize(body)


def _read(deserialize: Any, body: bytes) -> Any:
    try:
        return deserialize(body)
    except RuntimeError as error:  # its layout has been checked: not to be expected
        raise ValueError("Concrete cannot read the message") from error
