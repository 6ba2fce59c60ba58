package core

import (
	"math"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// Storage says how the diagonals of a linear transformation are kept.
type Storage int

// The coefficients of a diagonal as small integers take 8 (int16: 16) times less
// memory than its residues modulo five primes, and are transformed on the fly, one
// number theoretic transform a prime; the residues are ready but large.
const (
	Int16 Storage = iota
	Int32
	Residues
)

// diagonal is one encoded plaintext vector, multiplied with the input rotated by
// baby. A vector of period n < slots is a polynomial in X^gap: only every gap-th
// coefficient is kept, and the transform is gap times smaller.
type diagonal struct {
	baby       int
	gap        int
	multiplier int64 // the coefficients are multiplier times what is kept
	narrow     []int16
	wide       []int32
	residues   ring.Poly
}

// newDiagonal encodes a vector of n values (n divides the slots) at the scale
// factor. It returns nil for a vector that encodes to zero.
func newDiagonal(p *Parameters, values []complex128, factor float64, baby, level int, storage Storage) (*diagonal, error) {
	if err := p.transform(values); err != nil {
		return nil, err
	}
	greatest := 0.0
	for _, c := range values {
		greatest = max(greatest, math.Abs(real(c)), math.Abs(imag(c)))
	}
	greatest *= factor
	if !(greatest < 0x1p61) {
		return nil, failure(Scale, "a diagonal with values that are not finite or too great to encode")
	}
	if greatest < 0.5 {
		return nil, nil
	}
	size := len(values)
	if !p.Real() {
		size *= 2
	}
	d := &diagonal{baby: baby, gap: p.N() / size, multiplier: 1}
	integers := make([]int64, size)
	switch storage {
	case Residues:
		round(values, factor, p.Real(), integers)
		d.residues = ring.NewPoly(size, level)
		for limb, residues := range d.residues.Coeffs {
			liftAll(integers, p.RingQ().SubRings[limb], residues)
			transformSmall(p, limb, residues)
		}
	case Int32:
		d.multiplier = int64(math.Ceil(greatest / math.MaxInt32))
		round(values, factor/float64(d.multiplier), p.Real(), integers)
		d.wide = make([]int32, size)
		for i, value := range integers {
			d.wide[i] = int32(value)
		}
	default:
		d.multiplier = int64(math.Ceil(greatest / math.MaxInt16))
		round(values, factor/float64(d.multiplier), p.Real(), integers)
		d.narrow = make([]int16, size)
		for i, value := range integers {
			d.narrow[i] = int16(value)
		}
	}
	return d, nil
}

// at returns the residues of the diagonal modulo one prime, in NTT order, gap
// times fewer than the ring degree. They are made in the given memory, or given as
// they are kept.
func (d *diagonal) at(p *Parameters, limb int, residues []uint64) []uint64 {
	if d.residues.Coeffs != nil {
		return d.residues.Coeffs[limb]
	}
	subring := p.RingQ().SubRings[limb]
	if d.narrow != nil {
		residues = residues[:len(d.narrow)]
		liftSmall(d.narrow, d.multiplier, math.MaxInt16, subring, residues, simdLift16)
	} else {
		residues = residues[:len(d.wide)]
		liftSmall(d.wide, d.multiplier, math.MaxInt32, subring, residues, simdLift32)
	}
	transformSmall(p, limb, residues)
	return residues
}

// liftSmall writes small integers, times a multiplier, modulo the prime.
func liftSmall[T int16 | int32](values []T, multiplier, bound int64, subring *ring.SubRing, residues []uint64,
	vector func([]T, int64, uint64, []uint64)) {
	prime := subring.Modulus
	if multiplier > int64(prime-1)/bound { // a product may exceed the prime
		offset := (1<<62/prime + 1) * prime
		for i, value := range values {
			residues[i] = ring.BRedAdd(uint64(int64(value)*multiplier)+offset, prime, subring.BRedConstant)
		}
		return
	}
	if vectorised(subring) {
		vector(values, multiplier, prime, residues)
		return
	}
	for i, value := range values {
		residues[i] = lift(int64(value)*multiplier, prime)
	}
}

// transformSmall transforms a polynomial in X^gap without its zeros. Its transform
// is that of the smaller ring, each value repeated gap times, under the same roots:
// they are stored in bit-reversed order, so the first are those of the smaller ring.
func transformSmall(p *Parameters, limb int, residues []uint64) {
	subring := p.RingQ().SubRings[limb]
	if vectorised(subring) {
		simdTransform(&p.roots[limb], subring, residues)
		return
	}
	apply := ring.NTTStandard
	if subring.Type() == ring.ConjugateInvariant {
		apply = ring.NTTConjugateInvariant
	}
	apply(residues, residues, len(residues), subring.Modulus, subring.MRedConstant, subring.BRedConstant, subring.RootsForward)
}

// Bytes is the memory that the diagonal takes.
func (d *diagonal) Bytes() int {
	total := 2*len(d.narrow) + 4*len(d.wide)
	for _, limb := range d.residues.Coeffs {
		total += 8 * len(limb)
	}
	return total
}
