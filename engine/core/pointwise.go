package core

import (
	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
)

// What is done number by number modulo one prime of QP, in the vector code where it serves
// the prime. Factors are in Montgomery form.

// add writes x + y.
func (p *Parameters) add(prime int, x, y, out []uint64) {
	if r := p.subring(prime); vectorised(r) {
		simdAdd(x, y, r.Modulus, out)
	} else {
		r.Add(x, y, out)
	}
}

// subtract writes x - y.
func (p *Parameters) subtract(prime int, x, y, out []uint64) { p.subring(prime).Sub(x, y, out) }

// pairwise applies add or subtract to ciphertexts, as many components as y has, up to the
// level of the result.
func (p *Parameters) pairwise(x, y, out *rlwe.Ciphertext, apply func(prime int, x, y, out []uint64)) error {
	return parallel(out.Level()+1, func(i int) error {
		for component := range y.Value {
			apply(i, x.Value[component].Coeffs[i], y.Value[component].Coeffs[i], out.Value[component].Coeffs[i])
		}
		return nil
	})
}

// multiplyAdd adds x times a factor to out.
func (p *Parameters) multiplyAdd(prime int, x []uint64, factor uint64, out []uint64) {
	if r := p.subring(prime); vectorised(r) {
		simdMultiplyAdd(x, ring.IMForm(factor, r.Modulus, r.MRedConstant), r.Modulus, out)
	} else {
		r.MulScalarMontgomeryThenAdd(x, factor, out)
	}
}

// subtractMultiply writes (x - y) times a factor.
func (p *Parameters) subtractMultiply(prime int, x, y []uint64, factor uint64, out []uint64) {
	if r := p.subring(prime); vectorised(r) {
		simdSubtractMultiply(x, y, ring.IMForm(factor, r.Modulus, r.MRedConstant), r.Modulus, out)
	} else {
		r.SubThenMulScalarMontgomeryTwoModulus(x, y, factor, out)
	}
}

// recenter takes residues modulo one prime to their least absolute residues modulo
// another. half is half the first prime, rounded down or up: the numbers from -half on.
func (p *Parameters) recenter(values []uint64, from int, half uint64, to int, out []uint64) {
	source, target := p.subring(from), p.subring(to)
	rest := half % target.Modulus
	if vectorised(source) && vectorised(target) {
		simdRecenter(values, source.Modulus, half, target.Modulus, rest, out)
		return
	}
	for i, value := range values {
		shifted := ring.BRedAdd(ring.CRed(value+half, source.Modulus), target.Modulus, target.BRedConstant)
		out[i] = ring.CRed(shifted+target.Modulus-rest, target.Modulus)
	}
}

// permute applies an automorphism in NTT form modulo one prime. In the standard ring eight
// neighbours come from eight neighbours, in another order: bit-reversed, they stand for powers
// of the root that differ by multiples of an eighth of its order, and so do their images.
func (p *Parameters) permute(prime int, in []uint64, index []uint64, out []uint64) {
	if p.RingType() == ring.Standard && vectorised(p.subring(prime)) {
		simdPermute(in, index, out)
		return
	}
	for i, from := range index {
		out[i] = in[from]
	}
}

// addPermuted adds what permute would write.
func (p *Parameters) addPermuted(prime int, in []uint64, index []uint64, out []uint64) {
	r := p.subring(prime)
	if p.RingType() == ring.Standard && vectorised(r) {
		simdAddPermuted(in, index, r.Modulus, out)
		return
	}
	for i, from := range index {
		out[i] = ring.CRed(out[i]+in[from], r.Modulus)
	}
}
