package core

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
	sums                     [4 * block]uint64 // low0, high0, low1, high1
	repeated                 [4][block]uint64
	low0, high0, low1, high1 []uint64
	subring                  *ring.SubRing
	vector                   bool
	factors                  [3]uint64 // of low words, high words and, in the vector code, of what is over
	quotients                [3]uint64 // floor(factors * 2^52 / prime)
}

// term is one product of the sum: a plaintext's residues, each standing for gap
// coefficients, times the two components of a ciphertext. All are below the prime.
type term struct {
	plain  []uint64
	gap    int
	c0, c1 []uint64
}

// sum writes the sum of the terms to out0 and out1. Ciphertexts in Montgomery form, as
// keys are, make at most one group of terms; the sum is not in that form.
func (a *accumulator) sum(terms []term, subring *ring.SubRing, montgomery bool, out0, out1 []uint64) {
	a.prepare(subring, montgomery)
	for start := 0; start < len(out0); start += block {
		a.sumBlock(terms, start, out0, out1)
	}
}

// sumBlock does so for one block of coefficients, once the accumulator is prepared.
func (a *accumulator) sumBlock(terms []term, start int, out0, out1 []uint64) {
	add, together := a.addGo, lazyTerms(a.subring.Modulus)
	if a.vector {
		add, together = a.addVector, 1<<10
	}
	clear(a.sums[:])
	for first := 0; first < len(terms); first += together {
		if first > 0 {
			a.reduce(a.low0, a.low1)
			clear(a.high0)
			clear(a.high1)
		}
		add(terms[first:min(len(terms), first+together)], start)
	}
	a.reduce(out0[start:start+block], out1[start:start+block])
}

func (a *accumulator) prepare(subring *ring.SubRing, montgomery bool) {
	prime, barrett := subring.Modulus, subring.BRedConstant
	a.subring, a.vector = subring, vectorised(subring)
	if a.vector {
		factor := uint64(1)
		if montgomery {
			factor = ring.IMForm(1, prime, subring.MRedConstant)
		}
		for i := range a.factors {
			a.factors[i] = factor
			a.quotients[i] = wideQuotient(factor, prime)
			factor = ring.BRed(factor, (1<<52)%prime, prime, barrett)
		}
	} else {
		a.factors = [3]uint64{1, ring.MForm(1, prime, barrett), 0} // 2^64 modulo the prime
		if !montgomery {
			a.factors = [3]uint64{a.factors[1], ring.MForm(a.factors[1], prime, barrett), 0}
		}
	}
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

// reduce writes the sums, brought below the prime.
func (a *accumulator) reduce(out0, out1 []uint64) {
	prime, constant := a.subring.Modulus, a.subring.MRedConstant
	if a.vector {
		a.reduceVector(out0, out1)
		return
	}
	reduced := func(low, high uint64) uint64 {
		return ring.CRed(ring.MRed(low, a.factors[0], prime, constant)+ring.MRed(high, a.factors[1], prime, constant), prime)
	}
	for i := range out0 {
		out0[i] = reduced(a.low0[i], a.high0[i])
		out1[i] = reduced(a.low1[i], a.high1[i])
	}
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
