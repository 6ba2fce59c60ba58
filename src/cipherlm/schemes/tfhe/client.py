"""The client's part of a compiled circuit: keys, and scales to quantise with, but no weight of the layer."""

from __future__ import annotations

import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cipherlm.progress import Progress, silent
from cipherlm.schemes.tfhe.description import CircuitDescription, client_of
from cipherlm.schemes.tfhe.files import read_json, sha256_of
from cipherlm.schemes.tfhe.library import import_concrete
from cipherlm.schemes.tfhe.messages import HEADER_BYTES, Header, Kind, read_message, seal
from cipherlm.schemes.tfhe.quantization import InputQuantizer, OutputDequantizer, check_bits

FORMAT_VERSION = 1
_FORMAT_NAME = "cipherlm-tfhe-client"

Float64 = NDArray[np.float64]


class ClientCircuit:
    """Encrypts inputs for a circuit and decrypts its results.

    ``specs`` are Concrete's client specs, as JSON: the cryptographic parameters and the shapes. With the
    quantiser and the dequantiser they are all that the client has of the layer.
    """

    def __init__(
        self,
        description: CircuitDescription,
        specs: dict[str, Any],
        quantizer: InputQuantizer,
        dequantizer: OutputDequantizer,
        progress: Progress = silent,
    ) -> None:
        self.description = description
        self.quantizer = quantizer
        self.dequantizer = dequantizer
        self.progress = progress
        self._specs = specs
        self._client = client_of(specs)
        self._fingerprint: bytes | None = None

    @property
    def keys_ready(self) -> bool:
        """Whether there are keys to encrypt with."""
        return self._fingerprint is not None

    def keygen(self) -> float:
        """Generate new keys, in place of any there are; return the seconds it took."""
        start = time.perf_counter()
        with self.progress("generating keys"):
            self._client.keygen(force=True)
            self._fingerprint = _fingerprint(self._client)
        return time.perf_counter() - start

    def evaluation_keys(self) -> bytes:
        """Return what the server needs. It tells nothing of the secret key. ``RuntimeError`` without keys."""
        keys = self._ready()
        body = self._client.evaluation_keys.serialize()
        return seal(Kind.EVALUATION_KEYS, self.description.fingerprint, keys, body)

    def secret_keys(self) -> bytes:
        """Return the secret and the evaluation keys, for ``load_secret_keys``: for a private file alone."""
        keys = self._ready()
        return seal(Kind.SECRET_KEYS, self.description.fingerprint, keys, self._client.keys.serialize())

    def load_secret_keys(self, source: bytes | BinaryIO) -> None:
        """Take what ``secret_keys`` returned, from bytes or an open file, which is read up to their end.

        Raises ``ValueError`` for damaged keys and those of another circuit; the present ones then stay.
        """
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        header = Header.unpack(file.read(HEADER_BYTES))
        header.check(Kind.SECRET_KEYS, self.description.fingerprint)
        body = read_message(file, header, None)
        try:
            client = client_of(self._specs)
            client.keys.load_from_bytes(body)
        except RuntimeError as error:
            raise ValueError("Concrete cannot read the secret keys") from error
        if _fingerprint(client) != header.keys:
            raise ValueError("the message holds other keys than its label says")
        self._client, self._fingerprint = client, header.keys

    def encrypt(self, hidden: NDArray[np.floating[Any]]) -> bytes:
        """Quantise and encrypt hidden states (t, width), t at most ``description.tokens``.

        Raises ``ValueError`` for another width, ``TooManyTokensError``, and ``RuntimeError`` without keys.
        """
        keys, description = self._ready(), self.description
        if hidden.ndim != 2 or hidden.shape[1] != description.width or not len(hidden):
            raise ValueError(f"hidden states must be (tokens, {description.width}), not {hidden.shape}")
        encrypted = self._client.encrypt(self.quantizer.padded(hidden, description.tokens))
        return seal(Kind.INPUT, description.fingerprint, keys, encrypted.serialize())

    def decrypt(self, result: bytes) -> Float64:
        """Decrypt and dequantise a result: (tokens, outputs), of which those of the input's tokens count.

        Raises ``ValueError`` for anything but a result of this circuit under these keys, and
        ``RuntimeError`` without keys.
        """
        keys, description = self._ready(), self.description
        header = Header.unpack(result)
        header.check(Kind.RESULT, description.fingerprint)
        if header.keys != keys:
            raise ValueError("the result is encrypted under other keys")
        body = read_message(io.BytesIO(result[HEADER_BYTES:]), header, description.results)
        if len(result) != HEADER_BYTES + len(body):
            raise ValueError("the message is followed by something else")
        try:
            integers = self._client.decrypt(import_concrete().Value.deserialize(body))
        except RuntimeError as error:  # its layout has been checked: not to be expected
            raise ValueError("Concrete cannot read the result") from error
        return self.dequantizer(np.asarray(integers, dtype=np.int64))

    def save(self, directory: Path, name: str, **facts: Any) -> list[Path]:
        """Write ``<name>.safetensors`` and ``<name>.json``, which says ``facts`` too; return their paths.

        No key is written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        scales, text = directory / f"{name}.safetensors", directory / f"{name}.json"
        arrays = {
            "channel_scale": self.quantizer.channel_scale,
            "largest_norm": np.array(self.quantizer.largest_norm),
            "output_scale": self.dequantizer.scale,
        }
        if self.dequantizer.rotations is not None:
            arrays["rotations"] = self.dequantizer.rotations
        save_file({key: np.array(array, np.float64, order="C") for key, array in arrays.items()}, scales)
        values = {
            "format": _FORMAT_NAME,
            "version": FORMAT_VERSION,
            "n_bits": self.quantizer.n_bits,
            "scales_sha256": sha256_of(scales),
            "circuit": self.description.to_dict(),
            "specs": self._specs,
            **facts,
        }
        text.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return [scales, text]

    @classmethod
    def load(cls, directory: Path, name: str, progress: Progress = silent) -> ClientCircuit:
        """Read what ``save`` wrote. There are no keys yet.

        Raises ``ValueError``, naming the file, if one is missing, damaged or for another Concrete.
        """
        scales, text = directory / f"{name}.safetensors", directory / f"{name}.json"
        values = read_json(text, _FORMAT_NAME, FORMAT_VERSION)
        try:
            description = CircuitDescription.from_dict(values.get("circuit"))
            description.check_version()
            n_bits: int = values.get("n_bits", 0)
            check_bits(n_bits)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from error
        if not scales.is_file() or sha256_of(scales) != values.get("scales_sha256"):
            raise ValueError(f"{scales} is missing or damaged: get it from the server's owner again")
        try:
            arrays = load_file(scales)
            quantizer = InputQuantizer(n_bits, arrays["channel_scale"], float(arrays["largest_norm"]))
            dequantizer = OutputDequantizer(arrays["output_scale"], arrays.get("rotations"))
            _check_shapes(description, quantizer, dequantizer)
            return cls(description, values["specs"], quantizer, dequantizer, progress)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{scales} or {text} is damaged: {error}") from error

    def _ready(self) -> bytes:
        if self._fingerprint is None:
            raise RuntimeError("there are no keys yet: call keygen or load_secret_keys first")
        return self._fingerprint


def _fingerprint(client: Any) -> bytes:
    """Return the SHA-256 of a ``fhe.Client``'s evaluation keys, which names its keys."""
    return hashlib.sha256(client.evaluation_keys.serialize()).digest()


def _check_shapes(
    description: CircuitDescription, quantizer: InputQuantizer, dequantizer: OutputDequantizer
) -> None:
    """Raise ``ValueError`` unless the scales are those of the circuit's shape."""
    fit = quantizer.channel_scale.shape == (description.width,)
    fit &= dequantizer.scale.shape == (description.outputs,)
    if (rotations := dequantizer.rotations) is not None:
        heads = max(1, len(rotations))
        size = description.outputs // heads
        fit &= rotations.shape == (heads, size, size) and heads * size == description.outputs
    if not fit:
        raise ValueError("its scales are of another shape than the circuit")
