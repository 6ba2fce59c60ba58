package core

import (
	"math/bits"
)

// rounding says how many low bits of each coefficient a ciphertext at level 0 does not
// send: of the first component, and of the second. Their error is that of a rounding in
// the first, and is multiplied with the secret key in the second, so that the first can
// lose more for the same precision.
type rounding [2]uint8

// widths are the bits that a coefficient of each component takes.
func (r rounding) widths(prime uint64) (widths [2]int) {
	for i, dropped := range r {
		widths[i] = bits.Len64((prime - 1) >> dropped)
	}
	return widths
}

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
	prime := ct.Params.Q()[0]
	for i, dropped := range r {
		if dropped == 0 {
			continue
		}
		residues := ct.Value[i].Coeffs[0]
		ct.Params.backward(0, residues)
		half := uint64(1) << dropped >> 1
		for j, residue := range residues {
			// What is rounded up to the prime or beyond is zero, nearly.
			if residue = (residue + half) >> dropped << dropped; residue >= prime {
				residue = 0
			}
			residues[j] = residue
		}
		ct.Params.forward(0, residues)
	}
	ct.rounding = r
	return nil
}

// size is the bytes of one rounded component.
func (r rounding) size(p *Parameters, component int) uint64 {
	return uint64(p.N()*r.widths(p.Q()[0])[component]+7) / 8
}

// rounded writes a component without the bits that it lost.
func (out *encoder) rounded(ct *Ciphertext, component int) {
	p, dropped := ct.Params, ct.rounding[component]
	residues := append([]uint64{}, ct.Value[component].Coeffs[0]...)
	p.backward(0, residues)
	for i := range residues {
		residues[i] >>= dropped
	}
	size := ct.rounding.size(p, component)
	out.pack = grow(out.pack, size+8)
	packBits(residues, ct.rounding.widths(p.Q()[0])[component], out.pack)
	out.bytes(out.pack[:size])
}

// rounded is the inverse.
func (in *decoder) rounded(ct *Ciphertext, component int) {
	p, dropped := ct.Params, ct.rounding[component]
	size := ct.rounding.size(p, component)
	in.pack = grow(in.pack, size+8)
	in.bytes(in.pack[:size])
	if in.err != nil {
		return
	}
	residues := ct.Value[component].Coeffs[0]
	greatest := unpackBits(in.pack, ct.rounding.widths(p.Q()[0])[component], residues)
	if greatest > (p.Q()[0]-1)>>dropped {
		in.fail("a coefficient that is not below its modulus")
		return
	}
	for i := range residues {
		residues[i] <<= dropped
	}
	p.forward(0, residues)
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
