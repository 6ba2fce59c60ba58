package core

/*
#include "simd.h"
*/
import "C"

import (
	"math/bits"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// block is how many coefficients are accumulated at a time: its four accumulators, 8
// bytes each, stay in the fastest cache.
const block = 512

// accumulator adds up products modulo one prime and reduces once: in words of 64 bits,
// or of 52 in the vector code.
type accumulator struct {
	sums                       [4 * block]uint64 // low0, high0, low1, high1
	repeated                   [4][block]uint64
	low0, high0, low1, high1   []uint64
	prime, montgomery, shifted uint64 // shifted is a word, in Montgomery form
	barrett                    [2]uint64
}

// term is one product of the sum: a plaintext's residues, each standing for gap
// coefficients, times the two components of a ciphertext. All are below the prime.
type term struct {
	plain  []uint64
	gap    int
	c0, c1 []uint64
}

// sum writes the sum of the terms to out0 and out1.
func (a *accumulator) sum(terms []term, subring *ring.SubRing, out0, out1 []uint64) {
	a.prepare(subring)
	add, together := a.addGo, lazyTerms(a.prime)
	if vectorised(subring) {
		add, together = a.addVector, 1<<10
	}
	for start := 0; start < len(out0); start += block {
		clear(a.sums[:])
		for first := 0; first < len(terms); first += together {
			if first > 0 {
				a.reduce()
			}
			add(terms[first:min(len(terms), first+together)], start)
		}
		a.reduce()
		copy(out0[start:], a.low0)
		copy(out1[start:], a.low1)
	}
}

func (a *accumulator) prepare(subring *ring.SubRing) {
	a.prime, a.montgomery, a.barrett = subring.Modulus, subring.MRedConstant, subring.BRedConstant
	word := ring.MForm(1, a.prime, a.barrett) // 2^64 modulo the prime
	if vectorised(subring) {
		word = (1 << 52) % a.prime
	}
	a.shifted = ring.MForm(word, a.prime, a.barrett)
	a.low0, a.high0 = a.sums[:block], a.sums[block:2*block]
	a.low1, a.high1 = a.sums[2*block:3*block], a.sums[3*block:]
}

// lazyTerms is how many products of two residues, and one rest, fit in 128 bits.
func lazyTerms(prime uint64) int {
	return 1 << min(30, max(0, 127-2*bits.Len64(prime)))
}

// plain is the block of a plaintext that begins at a coefficient.
func (a *accumulator) plain(t *term, start, scratch int) *[block]uint64 {
	if t.gap == 1 {
		return (*[block]uint64)(t.plain[start : start+block])
	}
	repeat(t.plain[start/t.gap:], t.gap, &a.repeated[scratch])
	return &a.repeated[scratch]
}

func (a *accumulator) addGo(terms []term, start int) {
	low0, high0 := (*[block]uint64)(a.low0), (*[block]uint64)(a.high0)
	low1, high1 := (*[block]uint64)(a.low1), (*[block]uint64)(a.high1)
	for i := range terms {
		plain := a.plain(&terms[i], start, 0)
		c0, c1 := (*[block]uint64)(terms[i].c0[start:start+block]), (*[block]uint64)(terms[i].c1[start:start+block])
		for j, x := range plain {
			high, low := bits.Mul64(x, c0[j])
			var carry uint64
			low0[j], carry = bits.Add64(low0[j], low, 0)
			high0[j] += high + carry
			high, low = bits.Mul64(x, c1[j])
			low1[j], carry = bits.Add64(low1[j], low, 0)
			high1[j] += high + carry
		}
	}
}

var zeros [block]uint64

// simdTerm points at one block of a term.
func simdTerm(plain, c0, c1 []uint64) C.struct_cl_simd_term {
	return C.struct_cl_simd_term{(*C.uint64_t)(&plain[0]), (*C.uint64_t)(&c0[0]), (*C.uint64_t)(&c1[0])}
}

// addVector adds four terms at a time, zeros where there are no more.
func (a *accumulator) addVector(terms []term, start int) {
	for first := 0; first < len(terms); first += 4 {
		var group [4]C.struct_cl_simd_term
		for i := range group {
			if first+i >= len(terms) {
				group[i] = simdTerm(zeros[:], zeros[:], zeros[:])
				continue
			}
			t := &terms[first+i]
			group[i] = simdTerm(a.plain(t, start, i)[:], t.c0[start:], t.c1[start:])
		}
		C.cl_simd_accumulate((*C.uint64_t)(&a.sums[0]), block, group[0], group[1], group[2], group[3])
	}
}

// reduce brings the sums below the prime.
func (a *accumulator) reduce() {
	for i := range a.low0 {
		a.low0[i] = a.reduced(a.low0[i], a.high0[i])
		a.low1[i] = a.reduced(a.low1[i], a.high1[i])
	}
	clear(a.high0)
	clear(a.high1)
}

func (a *accumulator) reduced(low, high uint64) uint64 {
	rest := ring.BRedAdd(low, a.prime, a.barrett)
	return ring.CRed(rest+ring.MRed(high, a.shifted, a.prime, a.montgomery), a.prime)
}

// repeat writes each value gap times, as far as a block goes.
func repeat(values []uint64, gap int, out *[block]uint64) {
	if gap >= block {
		for i := range out {
			out[i] = values[0]
		}
		return
	}
	for i := 0; i < block; i += gap {
		value := values[i/gap]
		for j := i; j < i+gap; j++ {
			out[j] = value
		}
	}
}
