package core

import (
	"math/big"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// centred converts polynomials of integers modulo Q = q[0]...q[from] to the same
// integers, taken between -Q/2 and Q/2 and divided by 2^shift (rounded half up),
// modulo the primes q[0] ... q[to]. It is exact.
type centred struct {
	rings        []*ring.SubRing
	from, to     int
	shift        uint
	inverse      []uint64   // of q[0]...q[i-1] modulo q[i], in Montgomery form
	prefixes     [][]uint64 // q[0]...q[i-1] modulo each prime, by prime, in Montgomery form
	half         []uint64   // (Q-1)/2 in the mixed radix q[0], q[1], ...
	negative     []uint64   // -Q modulo each target prime
	modulusLow   uint64     // Q modulo 2^64
	inverseShift []uint64   // of 2^shift modulo each target prime, in Montgomery form
	rounding     uint64
}

func newCentred(ringQ *ring.Ring, from, to int, shift uint) *centred {
	c := &centred{rings: ringQ.SubRings, from: from, to: to, shift: shift, prefixes: make([][]uint64, max(from, to)+1)}
	montgomery := func(x *big.Int, r *ring.SubRing) uint64 {
		residue := new(big.Int).Mod(x, new(big.Int).SetUint64(r.Modulus)).Uint64()
		return ring.MForm(residue, r.Modulus, r.BRedConstant)
	}
	half := new(big.Int).Rsh(ringQ.ModulusAtLevel[from], 1)
	prefix, digit := big.NewInt(1), new(big.Int)
	for _, r := range c.rings[:from+1] {
		prime := new(big.Int).SetUint64(r.Modulus)
		c.inverse = append(c.inverse, montgomery(new(big.Int).ModInverse(new(big.Int).Mod(prefix, prime), prime), r))
		for limb := range c.prefixes {
			c.prefixes[limb] = append(c.prefixes[limb], montgomery(prefix, c.rings[limb]))
		}
		prefix.Mul(prefix, prime)
		half.DivMod(half, prime, digit)
		c.half = append(c.half, digit.Uint64())
	}
	word := new(big.Int).Lsh(big.NewInt(1), 64)
	c.modulusLow = new(big.Int).Mod(prefix, word).Uint64()
	power := new(big.Int).Lsh(big.NewInt(1), shift)
	for _, r := range c.rings[:to+1] {
		prime := new(big.Int).SetUint64(r.Modulus)
		c.negative = append(c.negative, new(big.Int).Mod(new(big.Int).Neg(prefix), prime).Uint64())
		c.inverseShift = append(c.inverseShift, montgomery(new(big.Int).ModInverse(power, prime), r))
	}
	c.rounding = 1 << shift >> 1
	return c
}

// convert converts coefficients (not in NTT form).
func (c *centred) convert(in ring.Poly, out ring.Poly) error {
	const chunk = 512
	n := len(in.Coeffs[0])
	return parallel((n+chunk-1)/chunk, func(job int) error {
		start, end := job*chunk, min(n, (job+1)*chunk)
		digits := make([][]uint64, c.from+1)
		for j := range digits {
			digits[j] = make([]uint64, end-start)
			c.digit(in.Coeffs[j][start:end], digits[:j], digits[j])
		}
		negative, remainders := c.signs(digits)
		for limb := range out.Coeffs[:c.to+1] {
			c.write(limb, digits, negative, remainders, out.Coeffs[limb][start:end])
		}
		return nil
	})
}

// digit writes the next digits of integers in the mixed radix q[0], q[1], ... from their
// residues modulo that prime and the digits before (Garner's algorithm).
func (c *centred) digit(residues []uint64, before [][]uint64, out []uint64) {
	j := len(before)
	if j == 0 {
		copy(out, residues)
		return
	}
	c.modulo(j, before, out)
	prime, constant := c.rings[j].Modulus, c.rings[j].MRedConstant
	for i, known := range out {
		out[i] = ring.MRed(residues[i]+prime-known, c.inverse[j], prime, constant)
	}
}

// modulo reduces integers in the mixed radix modulo a prime.
func (c *centred) modulo(limb int, digits [][]uint64, out []uint64) {
	prime, barrett, constant := c.rings[limb].Modulus, c.rings[limb].BRedConstant, c.rings[limb].MRedConstant
	for i, digit := range digits[0] {
		out[i] = ring.BRedAdd(digit, prime, barrett)
	}
	for j := 1; j < len(digits); j++ {
		prefix := c.prefixes[limb][j]
		for i, digit := range digits[j] {
			out[i] = ring.CRed(out[i]+ring.MRed(digit, prefix, prime, constant), prime)
		}
	}
}

// signs tells which integers stand for negative ones (all ones, else zero), and what is
// left of each, with the rounding, after the division by 2^shift.
func (c *centred) signs(digits [][]uint64) (negative, remainders []uint64) {
	negative, remainders = make([]uint64, len(digits[0])), make([]uint64, len(digits[0]))
	for i := range negative {
		for j := c.from; j >= 0; j-- {
			if digit := digits[j][i]; digit != c.half[j] {
				if digit > c.half[j] {
					negative[i] = ^uint64(0)
				}
				break
			}
		}
		word := uint64(0) // the integer modulo 2^64
		for j := c.from; j >= 0; j-- {
			word = word*c.rings[j].Modulus + digits[j][i]
		}
		remainders[i] = (word - c.modulusLow&negative[i] + c.rounding) & (1<<c.shift - 1)
	}
	return negative, remainders
}

// write writes what the integers come to modulo one prime.
func (c *centred) write(limb int, digits [][]uint64, negative, remainders, out []uint64) {
	c.modulo(limb, digits, out)
	prime, barrett, constant := c.rings[limb].Modulus, c.rings[limb].BRedConstant, c.rings[limb].MRedConstant
	less := c.negative[limb]
	if c.shift == 0 {
		for i, value := range out {
			out[i] = ring.CRed(value+less&negative[i], prime)
		}
		return
	}
	rounding := ring.BRedAdd(c.rounding, prime, barrett) + prime
	for i, value := range out {
		value += less&negative[i] + rounding - ring.BRedAdd(remainders[i], prime, barrett)
		out[i] = ring.MRed(value, c.inverseShift[limb], prime, constant)
	}
}
