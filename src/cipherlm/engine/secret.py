"""The secret key. Only the client's side imports this module."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from numpy.typing import ArrayLike, NDArray

from . import _native
from .bootstrapping import BootstrappingKeys
from .ciphertext import Ciphertext, Plaintext
from .parameters import Parameters
from .public import EvaluationKeys, PublicKey, as_plaintext
from .refresh import RefreshReply, RefreshRequest
from .serialization import Serializable


class SecretKey(Serializable):
    """The key that decrypts. It stays with the client.

    It cannot be pickled or copied; :meth:`write_to` writes it where it must be kept,
    in the clear: the file's protection is the caller's task.
    """

    __slots__ = ("parameters",)
    _frame_type: ClassVar[int] = 2

    def __init__(self, handle: int, parameters: Parameters) -> None:
        super().__init__(handle)
        self.parameters = parameters

    @classmethod
    def _adopt(cls, handle: int, parameters: Parameters) -> SecretKey:
        return cls(handle, parameters)

    @classmethod
    def generate(cls, parameters: Parameters) -> SecretKey:
        """Sample a key."""
        return cls(_native.create("cl_secret_key_new", parameters.handle), parameters)

    @property
    def fingerprint(self) -> str:
        """A random name for the key, not computed from it."""
        return _native.key_fingerprint(self.handle)

    def __repr__(self) -> str:
        return f"SecretKey({self.fingerprint})"

    def public_key(self) -> PublicKey:
        """Make a public key."""
        return PublicKey(_native.create("cl_public_key_new", self.handle), self.parameters)

    def evaluation_keys(
        self,
        rotations: Iterable[int] | Mapping[int, int] = (),
        *,
        conjugation: bool | int = False,
        relinearization: bool | int = True,
        level: int | None = None,
    ) -> EvaluationKeys:
        """Make keys for rotations (to the left), conjugation and products.

        ``level`` is the highest level that they serve, where a rotation (as a mapping
        to its level), ``conjugation`` or ``relinearization`` does not give its own. A
        key for fewer levels is much smaller: its size grows with the square of them.
        """
        top = self.parameters.max_level if level is None else level
        levels = dict(rotations) if isinstance(rotations, Mapping) else dict.fromkeys(rotations, top)
        elements = self._elements(list(levels))
        at = list(levels.values())
        if conjugation is not False:
            element = ctypes.c_uint64()
            _native.call("cl_conjugation_element", self.parameters.handle, ctypes.byref(element))
            elements.append(element.value)
            at.append(top if conjugation is True else conjugation)
        pairs = [(element, lvl) for element, lvl in zip(elements, at, strict=True) if element != 1]
        relin = -1 if relinearization is False else top if relinearization is True else relinearization
        handle = _native.create(
            "cl_evaluation_keys_new",
            self.handle,
            (ctypes.c_uint64 * len(pairs))(*(element for element, _ in pairs)),
            _native.int64s([lvl for _, lvl in pairs]),
            len(pairs),
            relin,
        )
        return EvaluationKeys(handle, self.parameters)

    def bootstrapping_keys(self) -> BootstrappingKeys:
        """Make the keys of the bootstrapping circuit."""
        handle = _native.create("cl_bootstrapping_keys_new", self.handle)
        return BootstrappingKeys(handle, self.parameters)

    def _elements(self, rotations: list[int]) -> list[int]:
        out = (ctypes.c_uint64 * len(rotations))()
        _native.call(
            "cl_rotation_elements", self.parameters.handle, _native.int64s(rotations), len(rotations), out
        )
        return list(out)

    def encrypt(
        self, values: ArrayLike | Plaintext, level: int | None = None, scale: float | None = None
    ) -> Ciphertext:
        """Encrypt a vector or a plaintext. The result is seeded: half the bytes on the wire."""
        plaintext = as_plaintext(self.parameters, values, level, scale)
        return Ciphertext(_native.create("cl_encrypt_secret", self.handle, plaintext.handle), self.parameters)

    def decrypt(self, ciphertext: Ciphertext, precision: float | None = None) -> NDArray[Any]:
        """Return the slots; ``precision`` as in :meth:`Plaintext.decode`."""
        return self.decrypt_plaintext(ciphertext).decode(precision)

    def decrypt_plaintext(self, ciphertext: Ciphertext) -> Plaintext:
        """Decrypt without decoding."""
        return Plaintext(_native.create("cl_decrypt", self.handle, ciphertext.handle), self.parameters)

    def refresh(self, request: RefreshRequest) -> RefreshReply:
        """Answer a server's request: decrypt the masked integers and encrypt them afresh.

        What is decrypted on the way is uniformly random; it tells nothing and is gone
        when this returns.
        """
        return RefreshReply(_native.create("cl_refresh_client", self.handle, request.handle), self.parameters)
