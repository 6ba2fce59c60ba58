"""The encrypted keys and values of the tokens before those that are computed: a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cipherlm.engine import Ciphertext, LinearTransformation
from cipherlm.nn.tensor import Prefix
from cipherlm.schemes.ckks.arithmetic import PLAIN_SHIFT, Arithmetic, Scaled
from cipherlm.schemes.ckks.ciphertext_tensor import added
from cipherlm.schemes.ckks.encrypted import EncryptedTensor
from cipherlm.schemes.ckks.evaluator import Evaluator
from cipherlm.schemes.ckks.layout import ATTENTION_LEVEL

CONTEXT_LEVEL = ATTENTION_LEVEL - 1
"""Where keys and values are kept: at 3 they meet a query, at 2 scores are put in their places."""


@dataclass(eq=False)
class Group:
    """Keys and values of as many tokens as lie side by side, real and imaginary part of one ciphertext.

    They are there in a prompt's packing (``together``), in that of one token (``apart``), or in both, each at
    :data:`CONTEXT_LEVEL` and the default scale. A group that tokens have just been added to is still to be
    refreshed (``unrefreshed``), in a prompt's packing. Those that a chunk of tokens has ``claimed``, to bring
    them there, are left to it by the chunks beside it.
    """

    together: Ciphertext | None = None
    apart: Ciphertext | None = None
    unrefreshed: Ciphertext | None = None
    claimed: bool = False

    @property
    def pair(self) -> Ciphertext:
        """The keys and values in a prompt's packing, refreshed or not."""
        pair = self.together if self.together is not None else self.unrefreshed
        assert pair is not None
        return pair


class Context:
    """Keys and values of all tokens of a text up to the last, behind a public prefix.

    The last chunk is pending until more comes, and is known to stay. The others are in groups, and a group is
    brought to a packing where it is first needed in it, by a transposition and a refresh, which also sets to
    zero what lies behind its last token. So a text can be taken back to any of its tokens (:meth:`keep`).

    Each chunk has a context of its own, which shares groups with those of the chunks before it.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self.groups: list[Group] = []
        self.tokens = 0
        """How many tokens are in the groups."""
        self.pending: Group | None = None
        self.prefix: Prefix | None = None
        self._pending_tokens = 0
        self._missing: list[tuple[int, Group]] = []

    @classmethod
    def of(cls, past: Any, position: int, arithmetic: Arithmetic) -> Context:
        """Return the context that earlier tokens left, with those before ``position`` in its groups.

        What they left stays as it is. Raises ``ValueError`` where there are not so many.
        """
        context, (key, value) = cls(arithmetic), past
        if isinstance(key, EncryptedTensor):
            if key.rotation is not None:  # which takes a level, that the first chunk's refresh brings
                arithmetic.wait(lambda: key.level >= CONTEXT_LEVEL)
            context._take(paired(key.rotated, value), key.tokens)
        else:
            context.groups, context.tokens = list(key.groups), key.tokens
            context.pending, context._pending_tokens = key.pending, key._pending_tokens
        context.keep(position - arithmetic.layout.prefix)
        return context

    def append(self, pair: Ciphertext, tokens: int) -> None:
        """Take a chunk's keys and values, in a prompt's packing, which are pending from now on.

        This chunk claims them, and all groups that are not in this packing and that none beside it has
        claimed: :meth:`ready_together` brings them there.
        """
        groups = enumerate(self.groups)
        self._missing = [(i, group) for i, group in groups if group.together is None and not group.claimed]
        self._take(pair, tokens)
        for group in self._all:
            group.claimed = True

    def _take(self, pair: Ciphertext, tokens: int) -> None:
        self.pending, self._pending_tokens = Group(unrefreshed=pair), tokens

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
            self.groups.append(pending if kept == side_by_side else self._group(pending.pair, kept))
            return
        room = side_by_side - taken
        self.groups[group] = Group(
            unrefreshed=self._joined(self.groups[group], taken, pending.pair, min(kept, room))
        )
        if kept > room:
            evaluator = self.arithmetic.evaluator
            moved = evaluator.rotate(evaluator.rotate(pending.pair, side_by_side), -taken)
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

    def ready_together(
        self, query: Ciphertext, levels: int, finish: Callable[[Ciphertext], Ciphertext]
    ) -> Ciphertext:
        """Have all groups and what is pending in a prompt's packing; return a query at a higher level.

        ``finish`` is what is still to be done to the pending pair, and takes so many levels. The query has as
        many more than :data:`ATTENTION_LEVEL`: what has to be refreshed goes to the client together.
        """
        pending = self.pending
        assert pending is not None

        def form(item: tuple[int, Group]) -> Ciphertext:
            index, group = item
            if group.unrefreshed is not None:
                count = self.tokens - index * self.arithmetic.layout.tokens
                return self._first(group.unrefreshed, count)
            assert group.apart is not None
            return self.arithmetic.evaluator.transform(
                group.apart, self._matrix_back(self.arithmetic.layout.tokens)
            )

        copies = self.arithmetic.layout.whole_copies[0]
        (query,), (pair, *pairs) = self.arithmetic.refresh_together(
            [Scaled(query, query.scale, copies)],
            [pending.pair, *map(form, self._missing)],
            ATTENTION_LEVEL + levels,
            PLAIN_SHIFT,
        )
        pairs = [finish(pair), *pairs]
        for group, pair in zip([pending, *(group for _, group in self._missing)], pairs, strict=True):
            group.together, group.unrefreshed = self._rescaled(pair), None
        self._missing = []
        self.arithmetic.changed()
        self.arithmetic.wait(lambda: all(group.together is not None for group in self.groups))
        return query

    def ready_apart(self) -> None:
        """Have all groups in the packing of one token."""
        side_by_side = self.arithmetic.layout.tokens

        def form(item: tuple[int, Group]) -> Ciphertext:
            index, group = item
            count = min(side_by_side, self.tokens - index * side_by_side)
            return self.arithmetic.evaluator.transform(group.pair, self._matrix(count))

        missing = [(index, group) for index, group in enumerate(self.groups) if group.apart is None]
        if not missing:
            return
        fresh = self.arithmetic.refresh_complex(list(map(form, missing)), ATTENTION_LEVEL)
        for (_, group), pair in zip(missing, fresh, strict=True):
            group.apart, group.unrefreshed = self._rescaled(pair), None

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
    def prefix_beside(self) -> Prefix | None:
        """The prefix, if its keys and values are in no ciphertext."""
        return self.prefix if self.arithmetic.layout.prefix else None

    @property
    def parts(self) -> list[Ciphertext]:
        """All ciphertexts that are kept."""
        held = [one for group in self._all for one in (group.together, group.apart, group.unrefreshed)]
        return [pair for pair in held if pair is not None]

    @property
    def apart(self) -> list[Ciphertext]:
        """The groups in the packing of one token."""
        return [group.apart for group in self.groups if group.apart is not None]

    @property
    def together(self) -> list[Ciphertext]:
        """The groups in a prompt's packing, and what is pending."""
        return [group.together for group in self._all if group.together is not None]

    @property
    def _all(self) -> list[Group]:
        """The groups, and what is pending."""
        return self.groups if self.pending is None else [*self.groups, self.pending]

    def _rescaled(self, pair: Ciphertext) -> Ciphertext:
        """Return keys and values at :data:`CONTEXT_LEVEL` and the default scale."""
        evaluator = self.arithmetic.evaluator
        return evaluator.adjust_scale(
            evaluator.drop_level(pair, CONTEXT_LEVEL + 1), self.arithmetic.parameters.scale
        )

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


def rotated_keys(evaluator: Evaluator, pair: Ciphertext, half_turns: Sequence[int]) -> list[Ciphertext]:
    """Return what times :func:`rotary_masks` are keys after their rotation, and values as they are.

    The real part alone is rotated: half the sum of pair and conjugate, without the other half.
    """
    conjugate = evaluator.conjugate(pair)
    return [pair, conjugate, *evaluator.rotate_hoisted(evaluator.add(pair, conjugate), half_turns)]


def rotary_masks(cosine: NDArray[np.float64], *sines: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return the masks of :func:`rotated_keys`, a sine for each half turn."""
    return [(cosine + 1) / 2, (cosine - 1) / 2, *(sine / 2 for sine in sines)]


def paired(keys: Ciphertext, value: EncryptedTensor) -> Ciphertext:
    """Return the keys and values of a chunk as one ciphertext."""
    evaluator = value.arithmetic.evaluator
    (values,) = value.parts
    # A level above is for scales that differ a little.
    values = evaluator.drop_level(values, min(values.level, keys.level + 1))
    return added(evaluator, keys, evaluator.multiply(values, 1j))
