package core

import (
	"math"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
)

// transform applies the inverse canonical embedding in place: values, a power of
// two of them that divides the slots, become the coefficients (before scaling) of
// a polynomial in X^gap: the real parts, then the imaginary parts.
func (p *Parameters) transform(values []complex128) error {
	if p.Real() {
		for i, value := range values {
			values[i] = complex(real(value), 0)
		}
	}
	return p.encoder.IFFT(values, log2(len(values)))
}

// lift writes a small integer modulo a prime of more bits than it has.
func lift(value int64, prime uint64) uint64 {
	return uint64(value) + prime&uint64(value>>63)
}

// Encode makes a plaintext of at most Slots values, zeros after the last.
// Coefficients below 2^62 are rounded and lifted to each prime here, in parallel;
// for greater ones the library's encoder is used.
func (p *Parameters) Encode(values []complex128, level int, scale rlwe.Scale) (*Plaintext, error) {
	if err := p.checkLevel(level); err != nil {
		return nil, err
	}
	if len(values) > p.Slots() {
		return nil, failure(Invalid, "%d values do not fit %d slots", len(values), p.Slots())
	}
	for _, value := range values {
		if math.IsNaN(real(value)+imag(value)) || math.IsInf(real(value), 0) || math.IsInf(imag(value), 0) {
			return nil, failure(Invalid, "cannot encode a value that is not finite")
		}
	}
	coefficients := make([]complex128, p.Slots())
	copy(coefficients, values)
	if err := p.transform(coefficients); err != nil {
		return nil, err
	}
	plaintext := NewPlaintext(p, level, scale)
	factor, greatest := scale.Float64(), 0.0
	for _, c := range coefficients {
		greatest = max(greatest, math.Abs(real(c)), math.Abs(imag(c)))
	}
	if limit := math.Log2(greatest*factor) + 1; limit >= p.logModulus(level) {
		return nil, failure(Scale, "values too great for level %d: %.1f bits at this scale, the modulus has %.1f",
			level, limit, p.logModulus(level))
	}
	if greatest*factor >= 0x1p62 {
		return plaintext, p.encoder.Encode(values, plaintext.Plaintext)
	}
	integers := make([]int64, p.N())
	round(coefficients, factor, p.Real(), integers)
	rings := p.RingQ().SubRings[:level+1]
	return plaintext, parallel(len(rings), func(limb int) error {
		residues := plaintext.Value.Coeffs[limb]
		liftAll(integers, rings[limb], residues)
		p.forward(limb, residues)
		return nil
	})
}

// round scales the coefficients and rounds them to integers below 2^63.
func round(coefficients []complex128, factor float64, onlyReal bool, integers []int64) {
	half := len(coefficients)
	for i, c := range coefficients {
		integers[i] = int64(math.RoundToEven(real(c) * factor))
	}
	if !onlyReal {
		for i, c := range coefficients {
			integers[half+i] = int64(math.RoundToEven(imag(c) * factor))
		}
	}
}

// liftAll reduces integers below 2^62 modulo the prime of a ring.
func liftAll(integers []int64, subring *ring.SubRing, residues []uint64) {
	prime, barrett := subring.Modulus, subring.BRedConstant
	// A multiple of the prime, greater than 2^62, makes every integer positive.
	offset := (1<<62/prime + 1) * prime
	for i, value := range integers {
		residues[i] = ring.BRedAdd(uint64(value)+offset, prime, barrett)
	}
}

func (p *Parameters) logModulus(level int) (bits float64) {
	for _, prime := range p.Q()[:level+1] {
		bits += math.Log2(float64(prime))
	}
	return bits
}

// Decode writes the slots of a plaintext. With precision > 0 values are rounded to
// that many bits after the point before anything else sees them.
func (pt *Plaintext) Decode(precision float64) ([]complex128, error) {
	values := make([]complex128, pt.Params.Slots())
	return values, pt.Params.encoder.DecodePublic(pt.Plaintext, values, precision)
}

func log2(n int) (bits int) {
	for n > 1 {
		n >>= 1
		bits++
	}
	return bits
}
