//go:build cgo

package core

/*
#cgo CFLAGS: -O2
#include "simd.h"
*/
import "C"

import (
	"math/bits"
	"sync"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// simd tells whether the vector code may be used. Tests switch it off.
var simd = C.cl_simd_supported() != 0

// simdPrime bounds the primes that the vector code takes: twice a prime has to fit 52 bits.
const simdPrime = 1 << 51

// wideRoots are the roots of a ring as the vector transforms need them.
type wideRoots struct {
	once             [2]sync.Once // of the transform and of its inverse
	roots, quotients [2][]uint64
	fold, quotient   [2]uint64 // the root of the conjugate-invariant ring's own stage
}

// make fills in the roots for one direction; first takes the place of the root 0, which
// no stage uses. Stage m of the conjugate-invariant ring, but its own, is stage m/2 of the
// standard ring with other roots.
func (w *wideRoots) make(which int, subring *ring.SubRing, source []uint64, first uint64) {
	wide := func(root uint64) (uint64, uint64) {
		root = ring.IMForm(root, subring.Modulus, subring.MRedConstant)
		return root, wideQuotient(root, subring.Modulus)
	}
	w.roots[which] = make([]uint64, subring.N)
	w.quotients[which] = make([]uint64, subring.N)
	for i := range subring.N {
		root := first
		switch {
		case i == 0:
		case subring.Type() == ring.ConjugateInvariant:
			root = source[i+1<<(bits.Len(uint(i))-1)]
		default:
			root = source[i]
		}
		w.roots[which][i], w.quotients[which][i] = wide(root)
	}
	w.fold[which], w.quotient[which] = wide(source[1])
}

// vectorised tells whether the vector code serves a ring.
func vectorised(subring *ring.SubRing) bool { return simd && subring.Modulus < simdPrime }

func simdTransform(w *wideRoots, subring *ring.SubRing, residues []uint64) {
	w.once[0].Do(func() { w.make(0, subring, subring.RootsForward, subring.RootsForward[0]) })
	values, n, prime := (*C.uint64_t)(&residues[0]), C.long(len(residues)), C.uint64_t(subring.Modulus)
	if subring.Type() == ring.ConjugateInvariant {
		C.cl_simd_fold(values, n, C.uint64_t(w.fold[0]), C.uint64_t(w.quotient[0]), prime)
	}
	C.cl_simd_transform(values, n, (*C.uint64_t)(&w.roots[0][0]), (*C.uint64_t)(&w.quotients[0][0]), prime)
}

func simdInverse(w *wideRoots, subring *ring.SubRing, residues []uint64) {
	w.once[1].Do(func() { w.make(1, subring, subring.RootsBackward, subring.NInv) })
	values, n, prime := (*C.uint64_t)(&residues[0]), C.long(len(residues)), C.uint64_t(subring.Modulus)
	C.cl_simd_inverse(values, n, (*C.uint64_t)(&w.roots[1][0]), (*C.uint64_t)(&w.quotients[1][0]), prime)
	if subring.Type() == ring.ConjugateInvariant {
		C.cl_simd_unfold(values, n, C.uint64_t(w.fold[1]), C.uint64_t(w.quotient[1]), prime)
	}
}

func simdLift16(values []int16, multiplier int64, prime uint64, out []uint64) {
	C.cl_simd_lift16((*C.int16_t)(&values[0]), C.long(len(values)), C.int64_t(multiplier), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdLift32(values []int32, multiplier int64, prime uint64, out []uint64) {
	C.cl_simd_lift32((*C.int32_t)(&values[0]), C.long(len(values)), C.int64_t(multiplier), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdRecenter(values []uint64, from, half, to, rest uint64, out []uint64) {
	C.cl_simd_recenter((*C.uint64_t)(&values[0]), C.long(len(values)), C.uint64_t(from), C.uint64_t(half), C.uint64_t(to),
		C.uint64_t(wideQuotient(1, to)), C.uint64_t(rest), (*C.uint64_t)(&out[0]))
}

func simdSubtractMultiply(x, y []uint64, factor, prime uint64, out []uint64) {
	C.cl_simd_subtract_multiply((*C.uint64_t)(&x[0]), (*C.uint64_t)(&y[0]), C.long(len(x)), C.uint64_t(factor),
		C.uint64_t(wideQuotient(factor, prime)), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdMultiplyAdd(x []uint64, factor, prime uint64, out []uint64) {
	C.cl_simd_multiply_add((*C.uint64_t)(&x[0]), C.long(len(x)), C.uint64_t(factor), C.uint64_t(wideQuotient(factor, prime)),
		C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdAdd(x, y []uint64, prime uint64, out []uint64) {
	C.cl_simd_add((*C.uint64_t)(&x[0]), (*C.uint64_t)(&y[0]), C.long(len(x)), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdPermute(in, index, out []uint64) {
	C.cl_simd_permute((*C.uint64_t)(&in[0]), C.long(len(out)), (*C.uint64_t)(&index[0]), (*C.uint64_t)(&out[0]))
}

func simdAddPermuted(in, index []uint64, prime uint64, out []uint64) {
	C.cl_simd_add_permuted((*C.uint64_t)(&in[0]), C.long(len(out)), (*C.uint64_t)(&index[0]), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdTensor(subring *ring.SubRing, a0, a1, b0, b1, c0, c1, c2 []uint64) {
	prime := subring.Modulus
	power := (1 << 52) % prime
	C.cl_simd_tensor((*C.uint64_t)(&a0[0]), (*C.uint64_t)(&a1[0]), (*C.uint64_t)(&b0[0]), (*C.uint64_t)(&b1[0]), C.long(len(a0)),
		C.uint64_t(power), C.uint64_t(wideQuotient(power, prime)), C.uint64_t(subring.MRedConstant), C.uint64_t(prime),
		(*C.uint64_t)(&c0[0]), (*C.uint64_t)(&c1[0]), (*C.uint64_t)(&c2[0]))
}

func simdSplit(x, y []uint64, constants *[8]uint64) {
	C.cl_simd_split((*C.uint64_t)(&x[0]), (*C.uint64_t)(&y[0]), C.long(len(x)), (*C.uint64_t)(&constants[0]))
}

func simdExtend(x, y []uint64, constants *[7]uint64, prime uint64, out []uint64) {
	C.cl_simd_extend((*C.uint64_t)(&x[0]), (*C.uint64_t)(&y[0]), C.long(len(x)), (*C.uint64_t)(&constants[0]), C.uint64_t(prime),
		(*C.uint64_t)(&out[0]))
}

// simdTerm points at one block of a term.
func simdTerm(plain, c0, c1 []uint64) C.struct_cl_simd_term {
	return C.struct_cl_simd_term{(*C.uint64_t)(&plain[0]), (*C.uint64_t)(&c0[0]), (*C.uint64_t)(&c1[0])}
}

// simdProduct writes the sum of at most 8 terms with whole plaintexts, divided by 2^64.
func simdProduct(subring *ring.SubRing, terms []term, out0, out1 []uint64) {
	var group C.struct_cl_simd_terms
	for i, t := range terms {
		group.term[i] = simdTerm(t.plain, t.c0, t.c1)
	}
	prime := subring.Modulus
	factor := ring.IMForm((1<<52)%prime, prime, subring.MRedConstant)
	C.cl_simd_product(group, C.int(len(terms)), C.long(len(out0)), C.uint64_t(subring.MRedConstant), C.uint64_t(factor),
		C.uint64_t(wideQuotient(factor, prime)), C.uint64_t(prime), (*C.uint64_t)(&out0[0]), (*C.uint64_t)(&out1[0]))
}

// addVector adds up to four terms at a time.
func (a *accumulator) addVector(terms []term, start int) {
	for first := 0; first < len(terms); first += 4 {
		var group [4]C.struct_cl_simd_term
		count := min(4, len(terms)-first)
		for i := range count {
			t := &terms[first+i]
			group[i] = simdTerm(a.plain(t, start, i)[:], t.c0[start:], t.c1[start:])
		}
		C.cl_simd_accumulate((*C.uint64_t)(&a.sums[0]), block, C.int(count), group[0], group[1], group[2], group[3])
	}
}

// reduceVector is reduce for what addVector added up.
func (a *accumulator) reduceVector(out0, out1 []uint64) {
	C.cl_simd_reduce((*C.uint64_t)(&a.sums[0]), block, (*C.uint64_t)(&a.factors[0]), (*C.uint64_t)(&a.quotients[0]),
		C.uint64_t(a.subring.Modulus), (*C.uint64_t)(&out0[0]), (*C.uint64_t)(&out1[0]))
}
