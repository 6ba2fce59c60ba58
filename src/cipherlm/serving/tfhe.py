"""TFHE between two parties: circuits at the server, keys and scales at the client."""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cipherlm.errors import Refused
from cipherlm.progress import Progress, silent
from cipherlm.schemes.tfhe.client import ClientCircuit
from cipherlm.schemes.tfhe.errors import NotCompiledError
from cipherlm.schemes.tfhe.files import private_file, sha256_of
from cipherlm.schemes.tfhe.server import ServerCircuit, ServerKeys
from cipherlm.serving.computation import Evaluator, Exchange, Report
from cipherlm.serving.errors import SessionLost
from cipherlm.serving.keystore import KeyMaterial

if TYPE_CHECKING:
    from cipherlm.models.encrypted import EncryptedModel

FOLDER = "circuits"
"""Where the files of circuits lie in a server's and in a client's directory."""

KEY_KIND = "evaluation"

Float64 = NDArray[np.float64]


class TfheHostedModel:
    """A server's circuits by module name. All sessions share them; each brings its own evaluation keys."""

    def __init__(self, circuits: Mapping[str, ServerCircuit], name: str = "tfhe") -> None:
        if not circuits:
            raise ValueError("there is no circuit to serve")
        self.circuits = dict(circuits)
        self.name = name

    @classmethod
    def load(cls, directory: Path, name: str | None = None) -> TfheHostedModel:
        """Load a directory that ``export_tfhe`` wrote for a server; ``name`` is the directory's by default.

        The circuits are native code: load only what you trust. Raises ``ValueError``, naming the file, if one
        is missing or damaged.
        """
        names = _module_names(directory)
        circuits = {module: ServerCircuit.load(directory / FOLDER, module) for module in names}
        return cls(circuits, directory.resolve().name if name is None else name)

    @property
    def description(self) -> dict[str, Any]:
        """What clients may know, as JSON: see ``HostedModel.description``."""
        circuits = {module: circuit.description for module, circuit in self.circuits.items()}
        return {
            "scheme": "tfhe",
            "name": self.name,
            "modules": list(circuits),
            "parameters": {
                module: {
                    "fingerprint": circuit.fingerprint,
                    "tokens": circuit.tokens,
                    "width": circuit.width,
                    "outputs": circuit.outputs,
                    "concrete": circuit.concrete_version,
                    "key_memory": circuit.memory,
                }
                for module, circuit in circuits.items()
            },
            "fingerprint": bundle_fingerprint(self.circuits),
            "keys": {KEY_KIND: sum(circuit.key_bytes for circuit in circuits.values())},
            "max_tokens": min(circuit.tokens for circuit in circuits.values()),
            "message_bytes": max(circuit.message_bytes for circuit in circuits.values()),
        }

    def open(self, keys: Mapping[str, Path]) -> TfheComputation:
        """Start a session with a client's evaluation keys, those of all circuits in the order of their names.

        Raises ``Refused`` for keys that are damaged or another model's. Takes seconds.
        """
        if set(keys) != {KEY_KIND}:
            raise Refused(f"a TFHE session needs keys of the kind {KEY_KIND!r} and no others")
        loaded: dict[str, ServerKeys] = {}
        with keys[KEY_KIND].open("rb") as file:
            for module in sorted(self.circuits):
                try:
                    loaded[module] = self.circuits[module].load_keys(file)
                except ValueError as error:
                    raise Refused(f"the keys for {module} are refused: {error}") from error
            if file.read(1):
                raise Refused("the keys are followed by something else")
        return TfheComputation(self.circuits, loaded)


class TfheComputation:
    """One session: the circuits and a client's keys. It remembers nothing: a circuit sees all positions."""

    def __init__(self, circuits: Mapping[str, ServerCircuit], keys: Mapping[str, ServerKeys]) -> None:
        self._circuits = circuits
        self._keys = dict(keys)

    def evaluate(
        self, module: str, start: int, count: int, inputs: Sequence[bytes], exchange: Exchange, report: Report
    ) -> list[bytes]:
        """Run a module's circuit on one ciphertext: see ``Computation.evaluate``.

        ``start`` must be 0. Nothing is refreshed, so ``exchange`` is not called. A circuit that runs cannot
        be interrupted: ``report`` is called before and after.
        """
        circuit, keys = self._circuits.get(module), self._keys.get(module)
        if circuit is None or keys is None:
            raise Refused(f"no module {module!r}: this model's are {', '.join(self._circuits)}")
        check_span(module, start, count, circuit.description.tokens)
        if len(inputs) != 1:
            raise Refused(f"{module} takes one ciphertext for all tokens, not {len(inputs)}")
        report(0, 1)
        result = circuit.run(inputs[0], keys)
        report(1, 1)
        return [result]

    def release_keys(self) -> None:
        """Keep the keys: they are far smaller than those of CKKS."""

    def close(self) -> None:
        """Let go of the keys."""
        self._keys.clear()


class TfheBackend:
    """The client's side: keys and scales by module, and a connection to where the circuits are."""

    def __init__(self, circuits: Mapping[str, ClientCircuit], connection: Evaluator | None = None) -> None:
        self.circuits = dict(circuits)
        self.connection = connection

    @classmethod
    def load(
        cls, directory: Path, connection: Evaluator | None = None, progress: Progress = silent
    ) -> TfheBackend:
        """Load a directory that ``export_tfhe`` wrote for clients. There are no keys yet.

        Raises ``ValueError``, naming the file, if one is missing or damaged.
        """
        names = _module_names(directory)
        circuits = {module: ClientCircuit.load(directory / FOLDER, module, progress) for module in names}
        return cls(circuits, connection)

    @property
    def fingerprint(self) -> str:
        """The ``fingerprint`` in the description of the server's model that this is the client's part of."""
        return bundle_fingerprint(self.circuits)

    @property
    def keys_ready(self) -> bool:
        """Whether there are keys for all modules."""
        return all(circuit.keys_ready for circuit in self.circuits.values())

    def keygen(self) -> float:
        """Generate new keys for all modules; return the seconds it took."""
        start = time.perf_counter()
        for circuit in self.circuits.values():
            circuit.keygen()
        return time.perf_counter() - start

    def save_keys(self, path: Path) -> None:
        """Write the secret and evaluation keys to a file that only its owner can read."""
        with private_file(path) as file:
            for module in sorted(self.circuits):
                file.write(self.circuits[module].secret_keys())

    def load_keys(self, path: Path) -> None:
        """Read what ``save_keys`` wrote. Raises ``ValueError``, naming the file, for anything else."""
        with path.open("rb") as file:
            try:
                self._load(file)
            except ValueError as error:
                raise ValueError(f"{path} does not hold the keys of this model: {error}") from error

    def _load(self, file: BinaryIO) -> None:
        for module in sorted(self.circuits):
            self.circuits[module].load_secret_keys(file)
        if file.read(1):
            raise ValueError("the keys are followed by something else")

    def key_material(self) -> KeyMaterial:
        """Return the keys for a key set; the evaluation keys are the only public ones."""
        secret = b"".join(self.circuits[module].secret_keys() for module in sorted(self.circuits))
        return KeyMaterial(secret, {KEY_KIND: self._write_evaluation_keys})

    def load_secret(self, secret: bytes) -> None:
        """Take the secret of :meth:`key_material`. Raises ``ValueError`` for that of other circuits."""
        self._load(io.BytesIO(secret))

    def write_evaluation_keys(self, path: Path) -> None:
        """Write the keys to send to the server, as the kind ``"evaluation"``. No secret key is among them."""
        with private_file(path) as file:
            self._write_evaluation_keys(file)

    def _write_evaluation_keys(self, file: BinaryIO) -> None:
        for module in sorted(self.circuits):
            file.write(self.circuits[module].evaluation_keys())

    def evaluate(
        self, module: str, hidden: NDArray[np.floating[Any]], start: int = 0, report: Report | None = None
    ) -> Float64:
        """Have the server evaluate ``module`` on hidden states (tokens, width); return (tokens, outputs).

        They are quantised and encrypted here, the result is decrypted here. ``start`` must be 0: a circuit
        sees all positions at once, and the server remembers none.

        Raises ``ValueError`` for another shape or an unknown module, ``TooManyTokensError``, ``RuntimeError``
        without keys or a connection, and what the connection raises.
        """
        circuit = self.circuits.get(module)
        if circuit is None:
            raise ValueError(f"no module {module!r}: this model's are {', '.join(self.circuits)}")
        if self.connection is None:
            raise RuntimeError("there is no connection to a server yet")
        ciphertext = circuit.encrypt(hidden)
        check_span(module, start, len(hidden), circuit.description.tokens)
        arguments = (module, start, len(hidden), [ciphertext], _refuse_refresh, report)
        try:
            results = self.connection.evaluate(*arguments)
        except SessionLost:  # it had nothing to remember
            self.connection.reopen()
            results = self.connection.evaluate(*arguments)
        if len(results) != 1:
            raise ValueError(f"the server returned {len(results)} results for {module}, not one")
        return circuit.decrypt(results[0])[: len(hidden)]


def export_tfhe(model: EncryptedModel, directory: Path) -> dict[str, Any]:
    """Write a compiled model's circuits: ``server/circuits`` for the server, ``client/circuits`` for clients.

    The server's part of a module is ``<module>.zip`` and ``<module>.json``; the client's, which has none of
    the module's weights, ``<module>.safetensors`` and ``<module>.json``. Returns what a bundle says of them:
    ``{"scheme", "fingerprint", "modules", "server": {path: sha256}, "client": {path: sha256}}`` with paths
    relative to ``server`` and ``client``.

    Raises ``NotCompiledError`` if a module has no circuit. Generates two pairs of keys a module and drops
    them (see ``AttentionCircuit.split``): seconds to minutes.
    """
    from cipherlm.models.attention import EncryptedAttention

    modules = {name: m for name, m in model.named_modules() if isinstance(m, EncryptedAttention)}
    for name, module in modules.items():
        if module.circuit is None:
            raise NotCompiledError(f"{name} has no circuit: call compile() before exporting")
    circuits: dict[str, ServerCircuit] = {}
    files: dict[str, dict[str, str]] = {"server": {}, "client": {}}
    for name, module in modules.items():
        assert module.circuit is not None
        server, client = module.circuit.split()
        circuits[name] = server
        for party, part in (("server", server), ("client", client)):
            root = directory / party
            for path in part.save(root / FOLDER, name):
                files[party][path.relative_to(root).as_posix()] = sha256_of(path)
    return {
        "scheme": "tfhe",
        "fingerprint": bundle_fingerprint(circuits),
        "modules": list(circuits),
        **files,
    }


def bundle_fingerprint(circuits: Mapping[str, ServerCircuit] | Mapping[str, ClientCircuit]) -> str:
    """Return the SHA-256 that names circuits by module, the same for the server's part and the client's."""
    lines = [f"{module} {circuits[module].description.fingerprint}\n" for module in sorted(circuits)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_span(module: str, start: int, count: int, limit: int) -> None:
    """Raise ``Refused`` unless ``count`` tokens from ``start`` on can run in a circuit of ``limit``."""
    if start != 0:
        raise Refused(f"{module} sees all tokens at once: start must be 0, not {start}")
    if not 1 <= count <= limit:
        raise Refused(f"{module} takes 1 to {limit} tokens, not {count}")


def _module_names(directory: Path) -> list[str]:
    """Return the modules whose files lie in ``directory``, blocks in their order."""
    names = [path.stem for path in (directory / FOLDER).glob("*.json")]
    if not names:
        raise ValueError(f"{directory} holds no TFHE circuits: no {FOLDER}/*.json")
    return sorted(names, key=lambda name: [part.zfill(6) for part in re.split(r"(\d+)", name)])


def _refuse_refresh(_request: bytes) -> bytes:
    raise ValueError("the server asks to refresh a ciphertext, which TFHE never needs")
