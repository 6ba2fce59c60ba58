"""What both parties know of a compiled circuit: its sizes, its Concrete, and the layout of its messages."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import numpy as np

from cipherlm.schemes.tfhe.library import concrete_version, import_concrete, machine
from cipherlm.schemes.tfhe.messages import HEADER_BYTES, Layout

_LAYOUTS = ("keys", "inputs", "results")


@dataclass(frozen=True)
class CircuitDescription:
    """A circuit's public facts.

    ``fingerprint`` names the circuit: its parameters, its length and its cryptographic parameters.
    ``tokens``, ``width`` and ``outputs`` are its shape, (tokens, width) to (tokens, outputs).
    ``memory`` is how many bytes its evaluation keys take once unpacked.
    ``keys``, ``inputs`` and ``results`` are the layouts of its messages.
    """

    fingerprint: str
    tokens: int
    width: int
    outputs: int
    concrete_version: str
    machine: str
    memory: int
    keys: Layout
    inputs: Layout
    results: Layout

    @property
    def key_bytes(self) -> int:
        """Bytes of the evaluation keys that a client sends, label and all."""
        return HEADER_BYTES + self.keys.size

    @property
    def message_bytes(self) -> int:
        """Bytes of the longer of an input and a result, label and all."""
        return HEADER_BYTES + max(self.inputs.size, self.results.size)

    def check_version(self) -> None:
        """Raise ``ValueError`` unless the installed Concrete writes and reads this circuit's messages."""
        if self.concrete_version != (installed := concrete_version()):
            raise ValueError(
                f"the circuit was compiled with Concrete {self.concrete_version}, not {installed}: "
                f"pip install concrete-python=={self.concrete_version}, or export it again"
            )

    def check_machine(self) -> None:
        """Raise ``ValueError`` unless the circuit's native code runs on this kind of machine."""
        if self.machine != (here := machine()):
            raise ValueError(
                f"the circuit was compiled for {self.machine} and this is {here}: export it here again"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return asdict(self) | {name: getattr(self, name).to_dict() for name in _LAYOUTS}

    @classmethod
    def from_dict(cls, values: Any) -> CircuitDescription:
        """Read what ``to_dict`` wrote; ``ValueError`` for anything else."""
        wrong = ValueError("a circuit's description is not as it was written")
        types = get_type_hints(cls)
        if not isinstance(values, dict) or set(values) != set(types):
            raise wrong
        read: dict[str, Any] = {
            name: Layout.from_dict(values[name]) if name in _LAYOUTS else values[name] for name in types
        }
        if any(type(read[name]) is not expected for name, expected in types.items()):
            raise wrong
        description = cls(**read)
        if min(description.tokens, description.width, description.outputs, description.memory) < 1:
            raise wrong
        if not re.fullmatch("[0-9a-f]{64}", description.fingerprint):
            raise wrong
        return description


def client_of(specs: dict[str, Any]) -> Any:
    """Return a ``fhe.Client`` without keys for client specs as JSON; ``ValueError`` if they are none."""
    fhe = import_concrete()
    try:
        return fhe.Client(fhe.ClientSpecs.deserialize(json.dumps(specs).encode()))
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the client specs are damaged: {error}") from error


def find_layouts(specs: dict[str, Any]) -> tuple[Layout, Layout, Layout]:
    """Return the layouts of evaluation keys, inputs and results, from samples with keys made for it.

    A result is sampled without running the circuit: encrypted by a client for which results are inputs.
    """
    results_as_inputs = copy.deepcopy(specs)
    for circuit in results_as_inputs["circuits"]:
        circuit["inputs"] = circuit["outputs"]
    samples: list[tuple[bytes, bytes, bytes]] = []
    for _ in range(2):
        client, reader = client_of(specs), client_of(results_as_inputs)
        client.keygen(force=True)
        reader.keys = client.keys
        samples.append((client.evaluation_keys.serialize(), _encrypted(client), _encrypted(reader)))
    keys, inputs, results = (Layout.between(one, other) for one, other in zip(*samples, strict=True))
    return keys, inputs, results


def _encrypted(client: Any) -> bytes:
    """Return zeros of the shape that ``client`` encrypts, encrypted and serialised."""
    circuits = json.loads(client.specs.serialize())["circuits"]
    shape = circuits[0]["inputs"][0]["typeInfo"]["lweCiphertext"]["abstractShape"]["dimensions"]
    serialized: bytes = client.encrypt(np.zeros(shape, dtype=np.int64)).serialize()
    return serialized
