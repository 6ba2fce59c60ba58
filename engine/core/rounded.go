package core

import (
	"math/big"
	"math/bits"
	"slices"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// rounding says how many low bits of each coefficient are not sent: of the first component,
// and of the second. Their error is that of a rounding in the first, and is multiplied with
// the secret key in the second, so that the first can lose more for the same precision.
type rounding [2]uint8

// roundedLevels is how many primes the modulus of rounded coefficients has at most.
const roundedLevels = 2

func (r rounding) check(p *Parameters, level int, seeded bool) error {
	for _, dropped := range r {
		if int(dropped) > bits.Len64(p.Q()[0])-2 {
			return failure(Invalid, "a coefficient of %d bits cannot lose %d", bits.Len64(p.Q()[0]), dropped)
		}
	}
	if r != (rounding{}) && level != 0 {
		return failure(Level, "only ciphertexts at level 0 can be rounded, not at level %d", level)
	}
	if seeded && r[1] != 0 {
		return failure(Invalid, "the second component comes from a seed: it cannot be rounded")
	}
	return nil
}

// Round rounds the coefficients of a ciphertext at level 0 to multiples of powers of
// two: so many low bits of the first and of the second component are not sent any more.
// The ciphertext becomes what the other side will read.
func (ct *Ciphertext) Round(first, second int) error {
	r := rounding{uint8(min(first, 255)), uint8(min(second, 255))}
	if ct.Degree() != 1 || first < 0 || second < 0 {
		return failure(Invalid, "a ciphertext of degree %d cannot lose %d and %d bits", ct.Degree(), first, second)
	}
	if err := r.check(ct.Params, ct.Level(), ct.Seed != nil); err != nil {
		return err
	}
	for i, dropped := range r {
		if dropped == 0 {
			continue
		}
		grid, coefficients := newGrid(ct.Params, 0, dropped), ct.Value[i].Coeffs
		ct.Params.backward(0, coefficients[0])
		grid.round(coefficients)
		grid.residues(coefficients, 0, coefficients[0])
		ct.Params.forward(0, coefficients[0])
	}
	ct.rounding = r
	return nil
}

// rounded writes a component without the bits that it lost.
func (out *encoder) rounded(ct *Ciphertext, component int) {
	digits := [][]uint64{slices.Clone(ct.Value[component].Coeffs[0])}
	ct.Params.backward(0, digits[0])
	grid := newGrid(ct.Params, 0, ct.rounding[component])
	grid.round(digits)
	out.digits(grid, digits)
}

// rounded is the inverse.
func (in *decoder) rounded(ct *Ciphertext, component int) {
	grid, residues := newGrid(ct.Params, 0, ct.rounding[component]), ct.Value[component].Coeffs
	in.digits(grid, residues)
	if in.err == nil {
		grid.residues(residues, 0, residues[0])
		ct.Params.forward(0, residues[0])
	}
}

// digitBits are those of a digit: a number below a prime is one, below the product of two
// it is two.
const digitBits = 61

// grid is the multiples of 2^dropped below the product Q of the primes up to level 0 or 1.
// A polynomial of such coefficients is kept as the digits of their multiples, those of the
// lowest digits first.
type grid struct {
	rings    []*ring.SubRing
	dropped  uint
	inverse  uint64                // of the first prime modulo the second, in Montgomery form
	greatest [roundedLevels]uint64 // multiple, by digit
	powers   [][]uint64            // what a digit counts modulo each prime, by prime, in Montgomery form
}

func newGrid(p *Parameters, level int, dropped uint8) *grid {
	g := &grid{rings: p.RingQ().SubRings[:level+1], dropped: uint(dropped)}
	greatest := new(big.Int).Rsh(new(big.Int).Sub(p.RingQ().ModulusAtLevel[level], big.NewInt(1)), g.dropped)
	g.greatest[1] = new(big.Int).Rsh(greatest, digitBits).Uint64()
	g.greatest[0] = greatest.And(greatest, big.NewInt(1<<digitBits-1)).Uint64()
	for _, r := range g.rings {
		prime := new(big.Int).SetUint64(r.Modulus)
		var powers []uint64
		for digit := range g.rings {
			power := new(big.Int).Lsh(big.NewInt(1), g.dropped+uint(digit)*digitBits)
			powers = append(powers, ring.MForm(power.Mod(power, prime).Uint64(), r.Modulus, r.BRedConstant))
		}
		g.powers = append(g.powers, powers)
	}
	if level == 1 {
		first, second := g.rings[0].Modulus, g.rings[1]
		inverse := ring.ModExp(first%second.Modulus, second.Modulus-2, second.Modulus)
		g.inverse = ring.MForm(inverse, second.Modulus, second.BRedConstant)
	}
	return g
}

// round takes coefficients, given by their residues, to the nearest multiples: it writes
// the digits of those in their place.
func (g *grid) round(coefficients [][]uint64) {
	half := uint64(1) << g.dropped >> 1
	for i, low := range coefficients[0] {
		high := uint64(0)
		if len(g.rings) == 2 {
			high, low = g.join(low, coefficients[1][i])
		}
		low, carry := bits.Add64(low, half, 0)
		high += carry
		low, high = low>>g.dropped|high<<(64-g.dropped), high>>g.dropped
		low, high = low&(1<<digitBits-1), high<<(64-digitBits)|low>>digitBits
		if high > g.greatest[1] || high == g.greatest[1] && low > g.greatest[0] {
			low, high = 0, 0 // what is rounded up to Q or beyond is zero, nearly
		}
		coefficients[0][i] = low
		if len(g.rings) == 2 {
			coefficients[1][i] = high
		}
	}
}

// join returns the number below Q that has two residues.
func (g *grid) join(x, y uint64) (high, low uint64) {
	prime := g.rings[1].Modulus
	difference := y + prime - ring.BRedAdd(x, prime, g.rings[1].BRedConstant)
	high, low = bits.Mul64(ring.MRed(difference, g.inverse, prime, g.rings[1].MRedConstant), g.rings[0].Modulus)
	low, carry := bits.Add64(low, x, 0)
	return high + carry, low
}

// residues writes coefficients modulo a prime, given by the digits of their multiples.
func (g *grid) residues(digits [][]uint64, limb int, out []uint64) {
	prime, constant, powers := g.rings[limb].Modulus, g.rings[limb].MRedConstant, g.powers[limb]
	if len(digits) == 1 {
		for i, digit := range digits[0] {
			out[i] = ring.MRed(digit, powers[0], prime, constant)
		}
		return
	}
	for i, low := range digits[0] {
		residue := ring.MRed(low, powers[0], prime, constant) + ring.MRed(digits[1][i], powers[1], prime, constant)
		out[i] = ring.CRed(residue, prime)
	}
}

// widths are the bits that each digit takes.
func (g *grid) widths() (widths [roundedLevels]int) {
	widths[0] = bits.Len64(g.greatest[0])
	if g.greatest[1] > 0 {
		widths = [...]int{digitBits, bits.Len64(g.greatest[1])}
	}
	return widths
}

// size is the bytes of so many coefficients, a multiple of 64.
func (g *grid) size(count int) (total uint64) {
	for _, width := range g.widths() {
		total += bitsSize(count, width)
	}
	return total
}

// digits writes the digits of a polynomial, packed.
func (out *encoder) digits(g *grid, digits [][]uint64) {
	for i, width := range g.widths() {
		if width == 0 || out.err != nil {
			return
		}
		size := bitsSize(len(digits[i]), width)
		out.pack = grow(out.pack, size)
		packBits(digits[i], width, out.pack)
		out.bytes(out.pack[:size])
	}
}

// digits reads digits and checks that their coefficients are below the modulus.
func (in *decoder) digits(g *grid, digits [][]uint64) {
	for i, width := range g.widths() {
		if width == 0 {
			break
		}
		size := bitsSize(len(digits[i]), width)
		in.pack = grow(in.pack, size+8)
		in.bytes(in.pack[:size])
		if in.err != nil {
			return
		}
		unpackBits(in.pack, width, digits[i])
	}
	for i, low := range digits[0] {
		high := uint64(0)
		if len(digits) == 2 {
			high = digits[1][i]
		}
		if high > g.greatest[1] || high == g.greatest[1] && low > g.greatest[0] {
			in.fail("a coefficient that is not below its modulus")
			return
		}
	}
}

// Greatest is the greatest coefficient of a plaintext at level 0 as a part of half the
// modulus: near 1, a sum has run over.
func (pt *Plaintext) Greatest() (float64, error) {
	if pt.Level() != 0 {
		return 0, failure(Level, "the coefficients at level %d are not looked at, only at level 0", pt.Level())
	}
	residues := append([]uint64{}, pt.Value.Coeffs[0]...)
	pt.Params.backward(0, residues)
	prime, greatest := pt.Params.Q()[0], uint64(0)
	for _, residue := range residues {
		greatest = max(greatest, min(residue, prime-residue))
	}
	return 2 * float64(greatest) / float64(prime), nil
}
