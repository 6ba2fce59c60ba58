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
	forward, backward sync.Once
	roots, quotients  [2][]uint64 // of the transform and of its inverse
}

func (w *wideRoots) make(which int, subring *ring.SubRing, source []uint64, first uint64) {
	w.roots[which] = make([]uint64, subring.N)
	w.quotients[which] = make([]uint64, subring.N)
	for i, root := range source {
		if i == 0 {
			root = first
		}
		root = ring.IMForm(root, subring.Modulus, subring.MRedConstant)
		w.roots[which][i] = root
		w.quotients[which][i], _ = bits.Div64(root>>12, root<<52, subring.Modulus)
	}
}

// vectorised tells whether the vector code serves a ring.
func vectorised(subring *ring.SubRing) bool {
	return simd && subring.Modulus < simdPrime && subring.Type() == ring.Standard
}

func simdTransform(w *wideRoots, subring *ring.SubRing, residues []uint64) {
	w.forward.Do(func() { w.make(0, subring, subring.RootsForward, subring.RootsForward[0]) })
	C.cl_simd_transform((*C.uint64_t)(&residues[0]), C.long(len(residues)),
		(*C.uint64_t)(&w.roots[0][0]), (*C.uint64_t)(&w.quotients[0][0]), C.uint64_t(subring.Modulus))
}

func simdInverse(w *wideRoots, subring *ring.SubRing, residues []uint64) {
	w.backward.Do(func() { w.make(1, subring, subring.RootsBackward, subring.NInv) })
	C.cl_simd_inverse((*C.uint64_t)(&residues[0]), C.long(len(residues)),
		(*C.uint64_t)(&w.roots[1][0]), (*C.uint64_t)(&w.quotients[1][0]), C.uint64_t(subring.Modulus))
}

func simdLift16(values []int16, multiplier int64, prime uint64, out []uint64) {
	C.cl_simd_lift16((*C.int16_t)(&values[0]), C.long(len(values)), C.int64_t(multiplier), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdLift32(values []int32, multiplier int64, prime uint64, out []uint64) {
	C.cl_simd_lift32((*C.int32_t)(&values[0]), C.long(len(values)), C.int64_t(multiplier), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}
