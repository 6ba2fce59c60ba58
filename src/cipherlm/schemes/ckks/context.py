"""The encrypted keys and values of the tokens before those that are computed: a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, LinearTransformation
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.arithmetic import Arithmetic
from cipherlm.schemes.ckks.encrypted import EncryptedTensor
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL

CONTEXT_LEVEL = ATTENTION_LEVEL - 1
"""Where keys and values are kept: at 3 they meet a query, at 2 scores are put in their places."""

MOST_TOGETHER = 16
"""How many ciphertexts are refreshed in one round trip at most: a message has to hold them."""


@dataclass(eq=False)
class Group:
    """Keys and values of as many tokens as lie side by side, real and imaginary part of one ciphertext.

    They are there in a prompt's packing (``together``), in that of one token (``apart``), or in both, each at
    :data:`CONTEXT_LEVEL` and the default scale. A group that tokens have just been added to is still to be
    refreshed (``unrefreshed``), in a prompt's packing.
    """

    together: Ciphertext | None = None
    apart: Ciphertext | None = None
    unrefreshed: Ciphertext | None = None


class Context:
    """Keys and values of all tokens of a text up to the last, behind a public prefix.

    The last chunk is pending until more comes, and is known to stay. The others are in groups, and a group is
    brought to a packing where it is first needed in it, by a transposition and a refresh, which also sets to
    zero what lies behind its last token. So a text can be taken back to any of its tokens (:meth:`keep`).
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self.groups: list[Group] = []
        self.tokens = 0
        """How many tokens are in the groups."""
        self.pending: Ciphertext | None = None
        self.prefix: Prefix | None = None
        self._pending_tokens = 0

    @classmethod
    def of(cls, past: Any, position: int) -> Context:
        """Return the context that earlier tokens left, with those before ``position`` in its groups.

        Raises ``ValueError`` where there are not so many.
        """
        key, value = past
        if isinstance(key, EncryptedTensor):
            context = cls(key.arithmetic)
            context.append(paired(key, value), key.tokens)
        else:
            context = key
        context.keep(position - context.arithmetic.layout.prefix)
        return context

    def append(self, pair: Ciphertext, tokens: int) -> None:
        """Take a chunk's keys and values as those that are pending, in a prompt's packing."""
        self.pending, self._pending_tokens = pair, tokens

    def keep(self, tokens: int) -> None:
        """Keep so many tokens, all of them in groups. Raises ``ValueError`` where there are fewer."""
        last = self.tokens + self._pending_tokens
        if not 0 < tokens <= last:
            raise ValueError(f"{tokens} tokens are to stay, of {last}")
        pending, kept = self.pending, tokens - self.tokens
        self.pending, self._pending_tokens = None, 0
        side_by_side = self.arithmetic.layout.tokens
        if kept < 0:
            del self.groups[-(-tokens // side_by_side) :]
            self.groups[-1] = self._cut(self.groups[-1], tokens - (len(self.groups) - 1) * side_by_side)
            self.tokens = tokens
        if pending is None or kept <= 0:
            return
        group, taken = divmod(self.tokens, side_by_side)
        self.tokens = tokens
        if not taken:
            self.groups.append(self._group(pending, kept))
            return
        room = side_by_side - taken
        self.groups[group] = Group(
            unrefreshed=self._joined(self.groups[group], taken, pending, min(kept, room))
        )
        if kept > room:
            evaluator = self.arithmetic.evaluator
            moved = evaluator.rotate(evaluator.rotate(pending, side_by_side), -taken)
            self.groups.append(self._group(moved, kept - room))

    def _cut(self, group: Group, count: int) -> Group:
        """Return a group of which so many tokens stay."""
        if group.together is not None:
            return self._group(group.together, count)
        assert group.apart is not None
        return Group(unrefreshed=self.arithmetic.evaluator.transform(group.apart, self._matrix_back(count)))

    def _group(self, pair: Ciphertext, count: int) -> Group:
        """Return a group of so many tokens, with whatever lies behind them in a prompt's packing."""
        # What a first chunk leaves has not been refreshed.
        fresh = pair.level >= CONTEXT_LEVEL and pair.scale == pair.parameters.scale
        whole = count == self.arithmetic.layout.tokens
        return Group(together=pair) if fresh and whole else Group(unrefreshed=pair)

    def _joined(self, group: Group, taken: int, pending: Ciphertext, count: int) -> Ciphertext:
        """Return the first tokens of a group, with the first of what is pending behind them."""
        evaluator = self.arithmetic.evaluator
        if group.together is not None:
            first = evaluator.multiply(group.together, self._first_tokens(taken))
        else:
            assert group.apart is not None  # what was unrefreshed was refreshed for the tokens before these
            first = evaluator.transform(group.apart, self._matrix_back(self.arithmetic.layout.tokens))
        more = evaluator.multiply(pending, self._first_tokens(count))
        return evaluator.add(first, evaluator.rotate(more, -taken))

    def _first(self, pair: Ciphertext, count: int) -> Ciphertext:
        """Return the first tokens of a group, with zero behind them.

        Scores against what no query sees have to be zero: whatever else lies there could be of any size.
        """
        if count >= self.arithmetic.layout.tokens:
            return pair
        return self.arithmetic.evaluator.multiply(pair, self._first_tokens(count, pair.level))

    def _first_tokens(self, count: int, level: int = CONTEXT_LEVEL) -> Any:
        encodings = self.arithmetic.encodings
        slots = encodings.layout.chunk.first_tokens
        return encodings.keep(("first tokens", count, level), lambda: encodings.mask(slots(count), level))

    def ready_together(self, *others: Ciphertext) -> list[Ciphertext]:
        """Have all groups in a prompt's packing, and return others at :data:`ATTENTION_LEVEL`.

        What has to be refreshed goes to the client together, up to :data:`MOST_TOGETHER` ciphertexts.
        """

        def form(item: tuple[int, Group]) -> Ciphertext:
            index, group = item
            if group.unrefreshed is not None:
                count = self.tokens - index * self.arithmetic.layout.tokens
                return self._first(group.unrefreshed, count)
            assert group.apart is not None
            return self.arithmetic.evaluator.transform(
                group.apart, self._matrix_back(self.arithmetic.layout.tokens)
            )

        missing = [(index, group) for index, group in enumerate(self.groups) if group.together is None]
        fresh, others_fresh = self._refreshed(map(form, missing), others)
        for (_, group), ciphertext in zip(missing, fresh, strict=True):
            group.together, group.unrefreshed = ciphertext, None
        return others_fresh

    def ready_apart(self) -> None:
        """Have all groups in the packing of one token."""
        side_by_side = self.arithmetic.layout.tokens

        def form(item: tuple[int, Group]) -> Ciphertext:
            index, group = item
            pair = group.unrefreshed if group.unrefreshed is not None else group.together
            assert pair is not None
            count = min(side_by_side, self.tokens - index * side_by_side)
            return self.arithmetic.evaluator.transform(pair, self._matrix(count))

        missing = [(index, group) for index, group in enumerate(self.groups) if group.apart is None]
        fresh, _ = self._refreshed(map(form, missing))
        for (_, group), ciphertext in zip(missing, fresh, strict=True):
            group.apart, group.unrefreshed = ciphertext, None

    def add(self, token: Ciphertext) -> None:
        """Take one token's keys and values, masked to its place in the last group.

        They have the level and the scale of a group.
        """
        self.ready_apart()
        if self.tokens % self.arithmetic.layout.tokens:
            last = self.groups.pop().apart
            assert last is not None
            token = self.arithmetic.evaluator.add(last, token)
        self.groups.append(Group(apart=token))
        self.tokens += 1

    @property
    def parts(self) -> list[Ciphertext]:
        """All ciphertexts that are kept."""
        held = [one for group in self.groups for one in (group.together, group.apart, group.unrefreshed)]
        return [pair for pair in (*held, self.pending) if pair is not None]

    @property
    def apart(self) -> list[Ciphertext]:
        """The groups in the packing of one token."""
        return [group.apart for group in self.groups if group.apart is not None]

    @property
    def together(self) -> list[Ciphertext]:
        """The groups in a prompt's packing, and what is pending."""
        pairs = [*(group.together for group in self.groups), self.pending]
        return [pair for pair in pairs if pair is not None]

    def _refreshed(
        self, pairs: Iterable[Ciphertext], others: Sequence[Ciphertext] = ()
    ) -> tuple[list[Ciphertext], list[Ciphertext]]:
        """Return pairs at :data:`CONTEXT_LEVEL` and the default scale, and others one level above."""
        sent, fresh = [*others, *pairs], list[Ciphertext]()
        for first in range(0, len(sent), MOST_TOGETHER):
            fresh += self.arithmetic.refresh_complex(sent[first : first + MOST_TOGETHER], CONTEXT_LEVEL + 1)
        return [self.rescaled(pair) for pair in fresh[len(others) :]], fresh[: len(others)]

    def rescaled(self, pair: Ciphertext) -> Ciphertext:
        """Return keys and values a level below, at the default scale."""
        return self.arithmetic.evaluator.adjust_scale(pair, self.arithmetic.parameters.scale)

    def _matrix(self, count: int) -> LinearTransformation:
        """Return what brings the first tokens of a group to the packing of one token."""
        layout = self.arithmetic.layout.decoding
        return self._transposition(("there", count), CONTEXT_LEVEL - 1, lambda: layout.transposition(count))

    def _matrix_back(self, count: int) -> LinearTransformation:
        """Return what brings the first tokens of a group back to a prompt's packing."""
        layout = self.arithmetic.layout
        first = layout.chunk.first_tokens(count)
        return self._transposition(
            ("back", count),
            CONTEXT_LEVEL,
            lambda: ((turn, mask * first) for turn, mask in layout.decoding.transposition_back()),
        )

    def _transposition(
        self,
        kind: tuple[str, int],
        level: int,
        diagonals: Callable[[], Iterable[tuple[int, NDArray[np.float64]]]],
    ) -> LinearTransformation:
        encodings = self.arithmetic.encodings
        return encodings.keep(
            ("transposition", *kind),
            lambda: encodings.transformation(
                diagonals(),
                level=level,
                giant_step=encodings.layout.slots,
                storage="int32",
            ),
        )


def paired(key: EncryptedTensor, value: EncryptedTensor) -> Ciphertext:
    """Return the keys, after their rotation, and values of a chunk as one ciphertext."""
    evaluator = key.arithmetic.evaluator
    keys = key.rotated
    (values,) = (evaluator.drop_level(part, keys.level) for part in value.parts)
    return evaluator.add(keys, evaluator.multiply(values, 1j))
