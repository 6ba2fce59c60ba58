"""Which keys a client uses with a server: some that belong to it and are not spent, or new ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from cipherlm.progress import Progress
from cipherlm.serving import keystore
from cipherlm.serving.bundle import generate_keys
from cipherlm.serving.key_lock import making_keys
from cipherlm.serving.key_use import BUDGET, KeyUse, Use
from cipherlm.serving.keystore import KeySet, KeyStoreError

BUNDLE_HINT = (
    "the client's bundle, the directory `client` of its export: give --bundle DIR, or bundle= in Python"
)

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class KeyChoice:
    """Chooses among the key sets on this machine, and makes new ones.

    ``name`` is that of a key set, or None for any that fits; ``bundle`` describes the client's bundle, from
    which keys are made, and ``described`` the server's model. ``passphrase`` is asked for new keys, and
    ``tell`` hears why they are made where there were others.
    """

    name: str | None
    bundle: Mapping[str, Any] | None
    described: Mapping[str, Any]
    server: str
    passphrase: Callable[[], str | None]
    progress: Progress
    tell: Callable[[str], None]
    budget: int = BUDGET

    def take(self) -> KeySet:
        """Return keys, which belong to the server's model from now on.

        Where another process is making keys, those are waited for. Raises ``KeyStoreError`` if keys of the
        name are another model's or server's, and if there are none and no bundle to make them from.
        """
        found = self._existing()
        if found is None:
            with making_keys(self.progress):
                found = self._existing() or self._made()
        return found

    def _existing(self) -> KeySet | None:
        for keys in self._candidates():
            if self._use(keys).texts < self.budget and KeyUse(keys.directory).bind(self.server, self._model):
                return keys
        return None

    @property
    def _model(self) -> str:
        return str(self.described["fingerprint"])

    def _candidates(self) -> list[KeySet]:
        """Return keys that may serve, spent ones too."""
        there = keystore.names()
        if self.name is None:
            # The model's own first: they know its bundle.
            fitting = [keys for keys in self._fitting() if self._belongs(keys)]
            return sorted(fitting, key=lambda keys: not self._knows_bundle(keys))
        candidates: list[KeySet] = []
        for name in _following(self.name):
            if name not in there:
                return candidates
            keys = KeySet.load(None, name)
            if not keys.fits(self.described):
                raise KeyStoreError(
                    f"the keys {name!r} are for another model: give another name, and new ones are made"
                )
            if not self._belongs(keys):
                raise KeyStoreError(
                    f"the keys {name!r} belong to {self._use(keys).server} and the model there, for what one "
                    "server learns of a key must not serve another: give another name, and new ones are made"
                )
            candidates.append(keys)
        raise AssertionError("names do not end")

    def _made(self) -> KeySet:
        spent, fitting = self._candidates(), self._fitting()
        # Those before remember their bundle.
        known = (keys.description for keys in fitting if self._knows_bundle(keys))
        bundle = self.bundle or next(known, None)
        if bundle is None:
            raise KeyStoreError(f"there are no keys for this model yet, and they are made from {BUNDLE_HINT}")
        if spent:
            self.tell(
                f"making new keys: {spent[-1].name!r} have served {self._use(spent[-1]).texts} texts, and a "
                f"server that cheats could learn a bit of a key from each (at most {self.budget} for a key)"
            )
        elif self.name is None and fitting:
            self.tell(f"making keys for {self.server}: {fitting[0].name!r} belong to another server or model")
        name = self.name
        if name is None:
            base = _NOT_IN_NAMES.sub("-", str(bundle["name"])).lstrip("-.")[:40]
            name = f"{base}-{bundle['fingerprint'][:8]}"
        there = keystore.names()
        name = next(one for one in _following(name) if one not in there)
        with self.progress("making keys"):
            material = generate_keys(bundle, self.progress)
        with self.progress("storing keys"):
            made = KeySet.create(None, name, bundle, material.secret, material.public, self.passphrase())
        KeyUse(made.directory).bind(self.server, self._model)
        return made

    def _fitting(self) -> list[KeySet]:
        """Return the keys on this machine with the model's parameters, whomever they belong to."""
        loaded = (_loaded(name) for name in keystore.names())
        return [keys for keys in loaded if keys is not None and keys.fits(self.described)]

    def _knows_bundle(self, keys: KeySet) -> bool:
        return keys.description.get("fingerprint") == self._model

    def _belongs(self, keys: KeySet) -> bool:
        return self._use(keys).allows(self.server, self._model)

    @staticmethod
    def _use(keys: KeySet) -> Use:
        return KeyUse(keys.directory).read()


def _following(name: str) -> Iterator[str]:
    """Yield a name, and those of the keys that come after the keys of this name."""
    yield name
    for number in count(2):
        yield f"{name}-{number}"


def _loaded(name: str) -> KeySet | None:
    """Return keys, or None for damaged ones, which are no reason not to use others."""
    try:
        keys = KeySet.load(None, name)
        KeyUse(keys.directory).read()
    except KeyStoreError:
        return None
    return keys
