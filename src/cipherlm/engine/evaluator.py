"""Arithmetic on ciphertexts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from . import _native
from .ciphertext import Ciphertext, Plaintext
from .linear import LinearTransformation
from .parameters import Parameters
from .polynomial import Chebyshev
from .public import EvaluationKeys, PublicKey
from .refresh import Held, RefreshMask, RefreshReply, RefreshRequest, Subring

Operand = Ciphertext | Plaintext | complex | ArrayLike


class Evaluator:
    """Computes on ciphertexts. It holds evaluation keys, or none, and no other key.

    Operands may be at different levels: the result is at the lower one. Their scales
    must be equal where they are added, up to 2^-40; :meth:`set_scale` and
    :meth:`adjust_scale` change them. An array or a number is encoded at the level and
    to the scale that makes the result's scale that of the ciphertext.

    ``out`` takes the result where it is given: it may be the first operand, which then
    changes in place. Methods may be called from several threads; the GIL is released.
    """

    __slots__ = ("_native", "evaluation_keys", "parameters")

    def __init__(self, parameters: Parameters, keys: EvaluationKeys | None = None) -> None:
        handle = _native.create("cl_evaluator_new", parameters.handle, keys.handle if keys else 0)
        self._native = _native.Handle(handle)
        self.parameters = parameters
        self.evaluation_keys = keys

    def _run(self, name: str, a: Ciphertext, *arguments: Any, out: Ciphertext | None) -> Ciphertext:
        target, result = (out.handle if out is not None else 0), ctypes.c_size_t()
        _native.call(name, self._native.handle, a.handle, *arguments, target, ctypes.byref(result))
        return out if out is not None else Ciphertext(result.value, self.parameters)

    def _collect(self, results: ctypes.Array[ctypes.c_size_t]) -> list[Ciphertext]:
        return [Ciphertext(handle, self.parameters) for handle in results]

    def _encode(self, values: ArrayLike, level: int, scale: float) -> Plaintext:
        return Plaintext.encode(self.parameters, values, level, scale)

    def add(self, a: Ciphertext, b: Operand, *, out: Ciphertext | None = None) -> Ciphertext:
        """Return a + b."""
        if isinstance(b, Ciphertext):
            return self._run("cl_add", a, b.handle, out=out)
        if is_number(b):
            constant = complex(b)
            return self._run("cl_add_constant", a, constant.real, constant.imag, out=out)
        plain = b if isinstance(b, Plaintext) else self._encode(b, a.level, a.scale)
        return self._run("cl_add_plain", a, plain.handle, out=out)

    def subtract(self, a: Ciphertext, b: Operand, *, out: Ciphertext | None = None) -> Ciphertext:
        """Return a - b."""
        if isinstance(b, Ciphertext):
            return self._run("cl_subtract", a, b.handle, out=out)
        if is_number(b):
            return self.add(a, -complex(b), out=out)
        plain = b if isinstance(b, Plaintext) else self._encode(b, a.level, a.scale)
        return self._run("cl_subtract_plain", a, plain.handle, out=out)

    def negate(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """Return -a."""
        return self.multiply(a, -1, out=out)

    def multiply(
        self,
        a: Ciphertext,
        b: Operand,
        *,
        relinearize: bool = True,
        rescale: bool = True,
        out: Ciphertext | None = None,
    ) -> Ciphertext:
        """Return a * b, slot by slot.

        The product of two ciphertexts, or of a ciphertext and a plaintext, has the
        product of their scales and is divided by the last prime, which takes a level,
        unless ``rescale`` is false. The product with an array or a number keeps the
        scale; a Gaussian integer takes no level.
        """
        if is_number(b):
            constant = complex(b)
            result = self._run("cl_multiply_constant", a, constant.real, constant.imag, out=out)
            rescale = rescale and constant != complex(round(constant.real), round(constant.imag))
        elif isinstance(b, Ciphertext):
            result = self._run("cl_multiply", a, b.handle, int(relinearize), out=out)
        else:
            level = a.level
            plain = b if isinstance(b, Plaintext) else self._encode(b, level, float(self.parameters.q[level]))
            result = self._run("cl_multiply_plain", a, plain.handle, out=out)
        return self.rescale(result, out=result) if rescale else result

    def square(self, a: Ciphertext, *, rescale: bool = True, out: Ciphertext | None = None) -> Ciphertext:
        """Return a * a."""
        return self.multiply(a, a, rescale=rescale, out=out)

    def dot(
        self, a: Sequence[Ciphertext], b: Sequence[Ciphertext] | Sequence[Plaintext], *, rescale: bool = True
    ) -> Ciphertext:
        """Return the sum of a[i] * b[i], relinearised and rescaled once, in parallel."""
        if not a or len(a) != len(b):
            raise ValueError(f"a sum of products of {len(a)} and {len(b)} factors")
        name = "cl_dot_plain" if isinstance(b[0], Plaintext) else "cl_dot"
        handle = _native.create(name, self._native.handle, _native.handles(a), _native.handles(b), len(a))
        result = Ciphertext(handle, self.parameters)
        return self.rescale(result, out=result) if rescale else result

    def relinearize(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """Bring a product to degree 1."""
        return self._run("cl_relinearize", a, out=out)

    def rescale(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """Divide scale and modulus by the last prime: the values stay, a level goes."""
        return self._run("cl_rescale", a, out=out)

    def drop_level(self, a: Ciphertext, level: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """Lower the level; scale and values stay. Everything gets cheaper further down."""
        target, result = (out.handle if out is not None else 0), ctypes.c_size_t()
        _native.call("cl_drop_level", a.handle, level, target, ctypes.byref(result))
        return out if out is not None else Ciphertext(result.value, self.parameters)

    def set_scale(self, a: Ciphertext, scale: float, *, out: Ciphertext | None = None) -> Ciphertext:
        """Declare another scale, which multiplies the values by a.scale / scale.

        It is exact and free: the way to multiply by a real constant where the scale of
        the result does not matter.
        """
        target, result = (out.handle if out is not None else 0), ctypes.c_size_t()
        _native.call("cl_set_scale", a.handle, scale, target, ctypes.byref(result))
        return out if out is not None else Ciphertext(result.value, self.parameters)

    def adjust_scale(self, a: Ciphertext, scale: float, *, out: Ciphertext | None = None) -> Ciphertext:
        """Bring the scale to another value and keep the values, for one level."""
        return self._run("cl_adjust_scale", a, scale, out=out)

    def rotate(self, a: Ciphertext, by: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """Rotate the slots to the left, as ``np.roll(a, -by)``."""
        return self._run("cl_rotate", a, by, out=out)

    def rotate_hoisted(self, a: Ciphertext, by: Sequence[int]) -> list[Ciphertext]:
        """Rotate by several amounts, in parallel: cheaper than one by one."""
        results = (ctypes.c_size_t * len(by))()
        _native.call("cl_rotate_hoisted", self._native.handle, a.handle, _native.int64s(by), len(by), results)
        return self._collect(results)

    def conjugate(self, a: Ciphertext, *, out: Ciphertext | None = None) -> Ciphertext:
        """Conjugate every slot."""
        return self._run("cl_conjugate", a, out=out)

    def split(self, a: Ciphertext) -> tuple[Ciphertext, Ciphertext]:
        """Return twice the real part and twice the imaginary part, with one conjugation."""
        conjugate = self.conjugate(a)
        imaginary = self.subtract(a, conjugate)
        return self.add(conjugate, a, out=conjugate), self.multiply(imaginary, -1j, out=imaginary)

    def inner_sum(self, a: Ciphertext, step: int, count: int, *, out: Ciphertext | None = None) -> Ciphertext:
        """Return the sum of ``count`` copies, copy i rotated by ``i * step``.

        Needs keys for :func:`inner_sum_rotations`, and is faster with more of them.
        """
        return self._run("cl_inner_sum", a, step, count, out=out)

    def transform(self, a: Ciphertext, matrix: LinearTransformation) -> Ciphertext:
        """Apply a linear transformation; the result is one level below the matrix's."""
        return self.transform_many([a], [matrix])[0][0]

    def transform_many(
        self, inputs: Sequence[Ciphertext], matrices: Sequence[LinearTransformation]
    ) -> list[list[Ciphertext]]:
        """Apply matrices to inputs, in parallel; ``result[m][i]`` is of matrix m and input i.

        The baby steps of an input are shared by all matrices, and the work on a diagonal
        by all inputs. Inputs above the matrices' level are taken at that level.
        """
        results = (ctypes.c_size_t * (len(inputs) * len(matrices)))()
        _native.call(
            "cl_lintrans_apply",
            self._native.handle,
            _native.handles(inputs),
            len(inputs),
            _native.handles(matrices),
            len(matrices),
            results,
        )
        flat = self._collect(results)
        return [flat[m * len(inputs) : (m + 1) * len(inputs)] for m in range(len(matrices))]

    def polynomial(self, a: Ciphertext, polynomial: Chebyshev) -> Ciphertext:
        """Evaluate a polynomial on every slot; the result has the default scale.

        It takes ``polynomial.levels(parameters, a.scale)`` levels. Values must lie in
        the polynomial's interval.
        """
        handle = _native.create(
            "cl_polynomial",
            self._native.handle,
            a.handle,
            polynomial.coefficients.ctypes.data,
            polynomial.coefficients.size,
            *polynomial.interval,
            polynomial.drift,
        )
        return Ciphertext(handle, self.parameters)

    def mask(
        self,
        inputs: Sequence[Ciphertext],
        public_key: PublicKey,
        *,
        level: int = 1,
        to_level: int | None = None,
        shift: int = 0,
        held: Sequence[Held] | None = None,
    ) -> tuple[RefreshRequest, RefreshMask]:
        """Start a refresh: mask ciphertexts so that the client learns nothing from them.

        They are masked at ``level``, uniformly modulo the modulus there, and come back at
        ``to_level`` with their scale divided by ``2**shift`` (the values stay). More than
        one in a refresh saves round trips. :func:`wrap_probability` says how seldom a
        level is too low.

        ``held`` tells what is known of each ciphertext's slots, so that less of it is sent:
        the subring of its vector, or the real subrings of its real and imaginary parts,
        which come back as two ciphertexts. To unmask then needs the keys of an
        :meth:`inner_sum` of ``copies`` rotations by ``slots / copies``, and of conjugation
        for real slots, at ``to_level``.
        """
        known: Sequence[Held] = [(Subring(),)] * len(inputs) if held is None else held
        if len(known) != len(inputs):
            raise ValueError(f"{len(inputs)} ciphertexts, and what {len(known)} hold")
        to_level = self.parameters.max_level if to_level is None else to_level
        request, mask = ctypes.c_size_t(), ctypes.c_size_t()
        _native.call(
            "cl_refresh_mask",
            self._native.handle,
            _native.handles(inputs),
            _native.int64s(_numbers(known)),
            len(inputs),
            public_key.handle,
            level,
            to_level,
            shift,
            ctypes.byref(request),
            ctypes.byref(mask),
        )
        return RefreshRequest(request.value, self.parameters), RefreshMask(
            mask.value, [s for some in known for s in some], to_level
        )

    def unmask(self, reply: RefreshReply, mask: RefreshMask) -> list[Ciphertext]:
        """Finish a refresh: take the masks off the client's fresh ciphertexts."""
        results = (ctypes.c_size_t * mask.size)()
        _native.call("cl_refresh_unmask", self._native.handle, reply.handle, mask.handle, results, mask.size)
        return self._collect(results)

    def rerandomize(self, a: Ciphertext, public_key: PublicKey, *, flood: int = 0) -> Ciphertext:
        """Prepare a result that leaves the server: fresh randomness, and flooding noise.

        Noise uniform in [-2^flood, 2^flood) is added to every coefficient: it hides noise
        of size e up to a statistical distance of e / 2^(flood + 1) each, and costs about
        ``2**flood * sqrt(degree) / scale`` of precision.
        """
        handle = _native.create("cl_rerandomize", self._native.handle, a.handle, public_key.handle, flood)
        return Ciphertext(handle, self.parameters)


def _numbers(held: Iterable[Held]) -> list[int]:
    """Return what is held as the native side takes it: copies, whether real, copies of imaginary parts."""
    numbers = []
    for first, *second in held:
        if second and not (len(second) == 1 and first.real and second[0].real):
            raise ValueError("a ciphertext holds one vector, or two real ones")
        numbers += [first.copies, int(first.real), second[0].copies if second else 0]
    return numbers


def inner_sum_rotations(step: int, count: int, *, faster: bool = False) -> list[int]:
    """Return the rotations that :meth:`Evaluator.inner_sum` needs keys for.

    With ``faster`` also those that it uses where they are: one more for each factor 4 of
    ``count`` saves a quarter of the time.
    """
    rotations, number = (ctypes.c_int64 * 64)(), ctypes.c_int64()
    _native.call("cl_inner_sum_rotations", step, count, rotations, ctypes.byref(number))
    result = list(rotations[: number.value])
    while faster and count % 4 == 0:
        result.append(3 * step)
        step, count = 4 * step, count // 4
    return result


def is_number(value: object) -> TypeGuard[complex]:
    """Tell whether a value is one number, not an array."""
    return not isinstance(value, Ciphertext | Plaintext) and np.ndim(value) == 0  # type: ignore[arg-type]
