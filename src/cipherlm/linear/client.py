"""The client's half: encrypting the inputs of products, decrypting their outputs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, EvaluationKeys, SecretKey
from cipherlm.linear.plan import Plan

Float64 = NDArray[np.float64]
Row = list[Ciphertext]


class LinearClient:
    """Holds the secret key of one plan's parameters."""

    def __init__(self, plan: Plan, secret_key: SecretKey | None = None) -> None:
        self.plan = plan
        self.secret_key = secret_key or SecretKey.generate(plan.parameters)

    def evaluation_keys(self) -> EvaluationKeys:
        """Make the rotation keys that the server needs: a few megabytes."""
        return self.secret_key.evaluation_keys(rotations=self.plan.rotations, relinearization=False)

    def encrypt(self, group: str, x: Float64, *, transposed: bool = False) -> tuple[list[Row], Float64]:
        """Encrypt vectors (n, columns), each divided by its norm; return the ciphertexts and the norms (n,).

        The norms stay with the client. Raises ``ValueError`` for another shape and for values that are not
        finite.
        """
        plan = self.plan.of(group, transposed)
        if x.ndim != 2 or x.shape[1] != plan.packing.columns:
            raise ValueError(f"{group} takes vectors of {plan.packing.columns} values, not {x.shape}")
        greatest = np.abs(x).max(axis=1, initial=0.0)
        if not np.isfinite(greatest).all():
            raise ValueError(f"an input of {group} has values that are not finite")
        greatest[greatest == 0.0] = 1.0
        # In two steps, so that squares neither overflow nor vanish.
        scaled = x / greatest[:, None]
        norms = np.linalg.norm(scaled, axis=1)
        norms[norms == 0.0] = 1.0
        slots = plan.packing.spread(scaled / norms[:, None])
        rows = []
        for vector in slots:
            row = [self.secret_key.encrypt(part, 0, plan.input_scale) for part in vector]
            for ciphertext in row:
                ciphertext.round(plan.sent)
            rows.append(row)
        return rows, greatest * norms

    def decrypt(
        self, group: str, rows: Sequence[Row], norms: Float64, *, transposed: bool = False
    ) -> Float64:
        """Return the products (n, rows of the matrix). Raises ``ValueError`` for another number of
        ciphertexts."""
        plan = self.plan.of(group, transposed)
        if len(rows) != len(norms) or any(len(row) != plan.packing.outputs for row in rows):
            raise ValueError(f"the answer for {group} has another number of ciphertexts than the plan says")
        slots = np.empty((len(rows), plan.packing.outputs, plan.packing.slots))
        for vector, row in zip(slots, rows, strict=True):
            for output, ciphertext in enumerate(row):
                vector[output] = self.secret_key.decrypt(ciphertext)
        return np.asarray(plan.packing.gather(slots) * norms[:, None])
