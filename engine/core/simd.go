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

// wideRoots are the roots of a ring as the vector transform needs them.
type wideRoots struct {
	once             sync.Once
	roots, quotients []uint64
}

func (w *wideRoots) get(subring *ring.SubRing) ([]uint64, []uint64) {
	w.once.Do(func() {
		w.roots = make([]uint64, subring.N)
		w.quotients = make([]uint64, subring.N)
		for i := range w.roots {
			root := ring.IMForm(subring.RootsForward[i], subring.Modulus, subring.MRedConstant)
			w.roots[i] = root
			w.quotients[i], _ = bits.Div64(root>>12, root<<52, subring.Modulus)
		}
	})
	return w.roots, w.quotients
}

// vectorised tells whether the vector code serves a ring.
func vectorised(subring *ring.SubRing) bool {
	return simd && subring.Modulus < simdPrime && subring.Type() == ring.Standard
}

func simdTransform(roots *wideRoots, subring *ring.SubRing, residues []uint64) {
	w, quotients := roots.get(subring)
	C.cl_simd_transform((*C.uint64_t)(&residues[0]), C.long(len(residues)),
		(*C.uint64_t)(&w[0]), (*C.uint64_t)(&quotients[0]), C.uint64_t(subring.Modulus))
}

func simdLift16(values []int16, multiplier int64, prime uint64, out []uint64) {
	C.cl_simd_lift16((*C.int16_t)(&values[0]), C.long(len(values)), C.int64_t(multiplier), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}

func simdLift32(values []int32, multiplier int64, prime uint64, out []uint64) {
	C.cl_simd_lift32((*C.int32_t)(&values[0]), C.long(len(values)), C.int64_t(multiplier), C.uint64_t(prime), (*C.uint64_t)(&out[0]))
}
