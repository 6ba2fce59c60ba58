package core

import (
	"math/bits"
	"slices"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// Subring is where a message lies: the polynomials that some automorphisms leave as they
// are. A vector that repeats as a whole, Copies times, is a polynomial in X^Copies, which
// rotations by its period leave alone; a vector of real numbers is left alone by conjugation.
//
// With n automorphisms, one of n coefficients tells such a message, or one of n residues in NTT
// form: of a ciphertext's first component no more has to be sent. The other coefficients may
// then be anything: the sum over all automorphisms, the trace, makes them right (Chen, Dai, Kim
// and Song, "Efficient Homomorphic Conversion Between (Ring) LWE Ciphertexts", ACNS 2021,
// Algorithm 1). What is sent follows from a whole ciphertext, so that it tells nothing more.
type Subring struct {
	LogCopies uint8
	Real      bool
}

// leastResidues is the least number of residues that is packed to bits.
const leastResidues = 64

// realFlag marks real messages in a subring's byte.
const realFlag = 0x80

// parseSubring returns what a byte stands for.
func parseSubring(code byte) Subring { return Subring{code &^ realFlag, code&realFlag != 0} }

func (s Subring) code() byte {
	if s.Real {
		return s.LogCopies | realFlag
	}
	return s.LogCopies
}

// logOrder is the logarithm of the number of automorphisms.
func (s Subring) logOrder() int {
	if s.Real {
		return int(s.LogCopies) + 1
	}
	return int(s.LogCopies)
}

// size is the number of coefficients of a polynomial of the subring.
func (s Subring) size(p *Parameters) int { return p.N() >> s.logOrder() }

func (s Subring) check(p *Parameters) error {
	if s == (Subring{}) {
		return nil
	}
	if p.Real() {
		return failure(Invalid, "subrings of the conjugate-invariant ring are not known here")
	}
	if s.size(p) < leastResidues {
		return failure(Invalid, "a subring of 2^%d copies in a ring of degree %d", s.LogCopies, p.N())
	}
	return nil
}

// growth is the power of two that a refresh multiplies a message by: the trace multiplies it by
// the number of automorphisms, and the sum of a real message with its conjugate by two more.
func (s Subring) growth() uint {
	if s.Real {
		return uint(s.logOrder()) + 1
	}
	return uint(s.logOrder())
}

// checkShift checks that a refresh can divide by 2^shift and by what it multiplies with.
func (s Subring) checkShift(shift uint) error {
	if shift+s.growth() > maxShift {
		return failure(Invalid, "a refresh divides by 2^0 to 2^%d, not 2^%d", maxShift, shift+s.growth())
	}
	return nil
}

// project returns the coefficients, modulo a prime, that tell a message of the subring: twice
// those of a real one, without the part of the noise that is imaginary.
func (s Subring) project(coefficients []uint64, prime uint64) []uint64 {
	n := len(coefficients)
	if s == (Subring{}) {
		return coefficients
	}
	out := make([]uint64, n>>s.logOrder())
	for i := range out {
		out[i] = coefficients[i<<s.LogCopies]
	}
	if s.Real { // conjugation takes X^i to -X^(n-i)
		out[0] = ring.CRed(2*out[0], prime)
		for i := 1; i < len(out); i++ {
			out[i] = ring.CRed(out[i]+prime-coefficients[n-i<<s.LogCopies], prime)
		}
	}
	return out
}

// embed writes the coefficients of the whole polynomial.
func (s Subring) embed(compact []uint64, prime uint64, out []uint64) {
	clear(out)
	for i, value := range compact {
		out[i<<s.LogCopies] = value
		if s.Real && i > 0 {
			out[len(out)-i<<s.LogCopies] = ring.CRed(prime-value, prime)
		}
	}
}

// trace returns the residues in NTT form, each once, of the sum of a polynomial's images
// under all automorphisms. Residue i is the value at a root of unity to the power of 1 +
// 2 reversed(i): rotations by the period exchange neighbours, and conjugation the ends.
func (s Subring) trace(residues []uint64, prime uint64) []uint64 {
	if s == (Subring{}) {
		return residues
	}
	copies := 1 << s.LogCopies
	sums := make([]uint64, len(residues)>>s.LogCopies)
	for i := range sums {
		sum := uint64(0)
		for _, residue := range residues[i*copies : (i+1)*copies] {
			sum = ring.CRed(sum+residue, prime)
		}
		sums[i] = sum
	}
	if !s.Real {
		return sums
	}
	half := len(sums) / 2
	for i := range half {
		sums[i] = ring.CRed(sums[i]+sums[len(sums)-1-i], prime)
	}
	return sums[:half]
}

// addSpread adds residues in NTT form, given each once, to those of a whole polynomial.
func (s Subring) addSpread(compact []uint64, prime uint64, out []uint64) {
	copies, last := 1<<s.LogCopies, len(out)-1
	for i, residue := range compact {
		for j := i * copies; j < (i+1)*copies; j++ {
			out[j] = ring.CRed(out[j]+residue, prime)
			if s.Real {
				out[last-j] = ring.CRed(out[last-j]+residue, prime)
			}
		}
	}
}

// Compact is a fresh encryption of a message in a subring: the trace of its first component,
// and the seed of the second. That is expanded when it is known to be wanted: it may be a
// thousand times as long.
type Compact struct {
	Subring Subring
	Seed    [seedSize]byte
	First   ring.Poly // Subring.size residues for each prime, in NTT form
}

// compact takes a fresh ciphertext, which it uses up.
func (s Subring) compact(p *Parameters, fresh *Ciphertext) *Compact {
	first := ring.Poly{Coeffs: make([][]uint64, fresh.Level()+1)}
	for limb, residues := range fresh.Value[0].Coeffs {
		first.Coeffs[limb] = s.trace(residues, p.Q()[limb])
	}
	return &Compact{s, *fresh.Seed, first}
}

// expand writes the ciphertext of a compact one, less a mask, to a ciphertext of zeros. Of
// the second component it takes the trace too, by rotations and conjugation.
func (e *Evaluator) expand(c *Compact, mask ring.Poly, out *Ciphertext) error {
	p, s := e.Params, c.Subring
	if err := expandSeed(p, c.Seed, out.Value[1]); err != nil {
		return err
	}
	if s.LogCopies > 0 {
		if _, err := e.InnerSum(out, p.Slots()>>s.LogCopies, 1<<s.LogCopies, out); err != nil {
			return err
		}
	}
	if s.Real {
		conjugate, err := e.Conjugate(out, nil)
		if err != nil {
			return err
		}
		if _, err := e.Add(out, conjugate, out); err != nil {
			return err
		}
	}
	return parallel(len(c.First.Coeffs), func(limb int) error {
		r, residues := p.RingQ().SubRings[limb], make([]uint64, s.size(p))
		r.Sub(c.First.Coeffs[limb], mask.Coeffs[limb], residues)
		s.addSpread(residues, r.Modulus, out.Value[0].Coeffs[limb])
		return nil
	})
}

// Held is what a ciphertext holds: one message, or two real ones as real and imaginary part.
type Held []Subring

// sent is the subring of the ciphertext.
func (h Held) sent() Subring {
	if len(h) == 1 {
		return h[0]
	}
	return Subring{LogCopies: min(h[0].LogCopies, h[1].LogCopies)}
}

func (h Held) check(p *Parameters) error {
	if len(h) != 1 && (len(h) != 2 || !h[0].Real || !h[1].Real) {
		return failure(Invalid, "a ciphertext holds one message, or two real ones, not %d", len(h))
	}
	for _, s := range h {
		if err := s.check(p); err != nil {
			return err
		}
	}
	return nil
}

// apart returns the coefficients of each message, modulo a prime, of those that were sent.
func (h Held) apart(coefficients []uint64, prime uint64, n int) [][]uint64 {
	if len(h) == 1 {
		return [][]uint64{coefficients}
	}
	whole := make([]uint64, n)
	h.sent().embed(coefficients, prime, whole)
	// X^(n/2) is the imaginary unit in every slot: divide by it.
	divided := slices.Clone(whole[n/2:])
	for _, residue := range whole[:n/2] {
		divided = append(divided, ring.CRed(prime-residue, prime))
	}
	return [][]uint64{h[0].project(whole, prime), h[1].project(divided, prime)}
}

// all returns the coefficients of each message for each prime.
func (h Held) all(p *Parameters, sent ring.Poly) []ring.Poly {
	parts, size := make([]ring.Poly, len(h)), h.sent().size(p)
	for limb, residues := range sent.Coeffs {
		for i, part := range h.apart(residues[:size], p.Q()[limb], p.N()) {
			parts[i].Coeffs = append(parts[i].Coeffs, part)
		}
	}
	return parts
}

// NewSubring checks what a caller knows of a message.
func NewSubring(p *Parameters, copies int, real bool) (Subring, error) {
	if copies < 1 || copies&(copies-1) != 0 {
		return Subring{}, failure(Invalid, "a vector repeats 1, 2, 4, ... times, not %d", copies)
	}
	s := Subring{uint8(bits.Len(uint(copies)) - 1), real}
	return s, s.check(p)
}
