package core

import "math/bits"

// block is how many coefficients are accumulated at a time: its four
// accumulators, 8 bytes each, stay in the first-level cache.
const block = 512

// accumulator adds up products modulo one prime in 128 bits and reduces once.
type accumulator struct{ low0, high0, low1, high1 [block]uint64 }

// term is one product of the sum: a plaintext's residues, each standing for gap
// coefficients, times the two components of a ciphertext.
type term struct {
	plain  []uint64
	gap    int
	c0, c1 []uint64
}

// sum writes the sum of the terms to out0 and out1. Plaintext residues are below
// six times the prime, ciphertext residues below the prime.
func (a *accumulator) sum(terms []term, prime uint64, out0, out1 []uint64) {
	capacity := lazyTerms(prime)
	var repeated [block]uint64
	for start := 0; start < len(out0); start += block {
		*a = accumulator{}
		for i := range terms {
			t := &terms[i]
			plain := &repeated
			if t.gap == 1 {
				plain = (*[block]uint64)(t.plain[start : start+block])
			} else {
				repeat(t.plain[start/t.gap:], t.gap, &repeated)
			}
			if i > 0 && i%capacity == 0 {
				a.reduce(prime)
			}
			a.add(plain, (*[block]uint64)(t.c0[start:start+block]), (*[block]uint64)(t.c1[start:start+block]))
		}
		a.reduce(prime)
		copy(out0[start:], a.low0[:])
		copy(out1[start:], a.low1[:])
	}
}

// lazyTerms is how many products 6q*q, and one rest below q, fit in 128 bits.
func lazyTerms(prime uint64) int {
	return 1 << min(30, max(0, 125-2*bits.Len64(prime)))
}

func (a *accumulator) add(plain, c0, c1 *[block]uint64) {
	for i, x := range plain {
		high, low := bits.Mul64(x, c0[i])
		var carry uint64
		a.low0[i], carry = bits.Add64(a.low0[i], low, 0)
		a.high0[i] += high + carry
		high, low = bits.Mul64(x, c1[i])
		a.low1[i], carry = bits.Add64(a.low1[i], low, 0)
		a.high1[i] += high + carry
	}
}

func (a *accumulator) reduce(prime uint64) {
	for i := range a.low0 {
		_, a.low0[i] = bits.Div64(a.high0[i]%prime, a.low0[i], prime)
		_, a.low1[i] = bits.Div64(a.high1[i]%prime, a.low1[i], prime)
	}
	a.high0, a.high1 = [block]uint64{}, [block]uint64{}
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
