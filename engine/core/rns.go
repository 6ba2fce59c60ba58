package core

import (
	"math/big"
	"math/bits"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// centred converts polynomials of integers modulo Q = q[0]...q[from] to the same
// integers, taken between -Q/2 and Q/2 and divided by 2^shift (rounded half up),
// modulo the primes q[0] ... q[to]. It is exact.
type centred struct {
	rings         []*ring.SubRing
	from, to      int
	shift         uint
	inverse       []uint64 // of q[0]...q[i-1] modulo q[i]
	half          []uint64 // (Q-1)/2 in the mixed radix q[0], q[1], ...
	modulus       []uint64 // Q modulo each target prime
	modulusLow    uint64   // Q modulo 2^64
	inverseShift  []uint64 // of 2^shift modulo each target prime
	rounding, low uint64
}

func newCentred(ringQ *ring.Ring, from, to int, shift uint) *centred {
	c := &centred{rings: ringQ.SubRings, from: from, to: to, shift: shift}
	half := new(big.Int).Rsh(ringQ.ModulusAtLevel[from], 1)
	prefix, digit := big.NewInt(1), new(big.Int)
	for _, r := range c.rings[:from+1] {
		prime := new(big.Int).SetUint64(r.Modulus)
		inverse := new(big.Int).ModInverse(new(big.Int).Mod(prefix, prime), prime)
		c.inverse = append(c.inverse, inverse.Uint64())
		prefix.Mul(prefix, prime)
		half.DivMod(half, prime, digit)
		c.half = append(c.half, digit.Uint64())
	}
	word := new(big.Int).Lsh(big.NewInt(1), 64)
	c.modulusLow = new(big.Int).Mod(prefix, word).Uint64()
	for _, r := range c.rings[:to+1] {
		prime := new(big.Int).SetUint64(r.Modulus)
		c.modulus = append(c.modulus, new(big.Int).Mod(prefix, prime).Uint64())
		power := new(big.Int).Lsh(big.NewInt(1), shift)
		c.inverseShift = append(c.inverseShift, power.ModInverse(power, prime).Uint64())
	}
	if shift > 0 {
		c.rounding, c.low = 1<<(shift-1), 1<<shift-1
	}
	return c
}

// convert converts coefficients (not in NTT form).
func (c *centred) convert(in ring.Poly, out ring.Poly) error {
	const chunk = 1024
	n := len(in.Coeffs[0])
	return parallel((n+chunk-1)/chunk, func(job int) error {
		digits := make([]uint64, c.from+1)
		for i := job * chunk; i < min(n, (job+1)*chunk); i++ {
			c.radix(in, i, digits)
			c.write(digits, out, i)
		}
		return nil
	})
}

// radix writes an integer in the mixed radix q[0], q[1], ... (Garner's algorithm).
func (c *centred) radix(in ring.Poly, i int, digits []uint64) {
	digits[0] = in.Coeffs[0][i]
	for j := 1; j <= c.from; j++ {
		prime := c.rings[j].Modulus
		known := c.modulo(digits[:j], j)
		difference := in.Coeffs[j][i] + prime - known
		if difference >= prime {
			difference -= prime
		}
		digits[j] = mulMod(difference, c.inverse[j], prime)
	}
}

// modulo reduces an integer in the mixed radix modulo a prime, by Horner's rule.
func (c *centred) modulo(digits []uint64, limb int) uint64 {
	prime := c.rings[limb].Modulus
	value := uint64(0)
	for j := len(digits) - 1; j >= 0; j-- {
		value = mulAddMod(value, c.rings[j].Modulus, digits[j], prime)
	}
	return value
}

func (c *centred) write(digits []uint64, out ring.Poly, i int) {
	negative := false
	for j := c.from; j >= 0; j-- {
		if digits[j] != c.half[j] {
			negative = digits[j] > c.half[j]
			break
		}
	}
	remainder := uint64(0) // of value + rounding, divided by 2^shift
	if c.shift > 0 {
		word := uint64(0)
		for j := c.from; j >= 0; j-- {
			word = word*c.rings[j].Modulus + digits[j]
		}
		if negative {
			word -= c.modulusLow
		}
		remainder = (word + c.rounding) & c.low
	}
	for limb := range out.Coeffs[:c.to+1] {
		prime := c.rings[limb].Modulus
		value := c.modulo(digits, limb)
		if negative {
			value += prime - c.modulus[limb]
		}
		if c.shift > 0 {
			value = (value + c.rounding%prime + prime - remainder%prime) % prime
			value = mulMod(value, c.inverseShift[limb], prime)
		} else if value >= prime {
			value -= prime
		}
		out.Coeffs[limb][i] = value
	}
}

func mulMod(a, b, prime uint64) uint64 { return mulAddMod(a, b, 0, prime) }

// mulAddMod is (a*b + c) modulo a prime, for a below the prime.
func mulAddMod(a, b, c, prime uint64) uint64 {
	high, low := bits.Mul64(a, b)
	low, carry := bits.Add64(low, c, 0)
	return bits.Rem64(high+carry, low, prime)
}
