package core

import (
	"math/big"
	"math/bits"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// pairing takes numbers modulo the product of two primes of QP to their least absolute
// residues modulo others, in the vector code: what the library's conversions between moduli
// do (Halevi, Polyakov and Shoup, "An Improved RNS Variant of the BFV Homomorphic
// Encryption Scheme", 2018).
type pairing struct {
	split  [8]uint64   // see cl_simd_split
	extend [][7]uint64 // see cl_simd_extend, by prime of QP
}

// newPairing prepares the conversion from two primes, given by their numbers.
func newPairing(p *Parameters, first, second int) *pairing {
	c := &pairing{}
	sources := [2]uint64{p.subring(first).Modulus, p.subring(second).Modulus}
	product := new(big.Int).Mul(new(big.Int).SetUint64(sources[0]), new(big.Int).SetUint64(sources[1]))
	half := new(big.Int).Rsh(product, 1)
	modulo := func(x *big.Int, prime uint64) uint64 {
		return new(big.Int).Mod(x, new(big.Int).SetUint64(prime)).Uint64()
	}
	for i, prime := range sources {
		inverse := ring.ModExp(sources[1-i]%prime, prime-2, prime)
		copy(c.split[4*i:], []uint64{prime, modulo(half, prime), inverse, wideQuotient(inverse, prime)})
	}
	for i := range p.QCount() + p.PCount() {
		prime := p.subring(i).Modulus
		left, right := sources[1]%prime, sources[0]%prime
		constants := [7]uint64{left, wideQuotient(left, prime), right, wideQuotient(right, prime)}
		rest := new(big.Int).Neg(half)
		for v := range 3 {
			constants[4+v] = modulo(rest, prime)
			rest.Sub(rest, product)
		}
		c.extend = append(c.extend, constants)
	}
	return c
}

// to writes what was split modulo a prime of QP, below four times it.
func (c *pairing) to(p *Parameters, prime int, x, y, out []uint64) {
	simdExtend(x, y, &c.extend[prime], p.subring(prime).Modulus, out)
}

// wideQuotient is floor(factor * 2^52 / prime), which the vector code multiplies with.
func wideQuotient(factor, prime uint64) uint64 {
	quotient, _ := bits.Div64(factor>>12, factor<<52, prime)
	return quotient
}
