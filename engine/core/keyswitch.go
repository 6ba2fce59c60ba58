package core

import (
	"math/big"
	"sync"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/ring/ringqp"
)

// A key switch takes a polynomial that decrypts under one key to a pair that decrypts
// under another (hybrid switching: Han and Ki, CT-RSA 2020). The steps are those of the
// library, on its polynomials and with its conversions between moduli, and so are the
// results, bit for bit. Here they go prime by prime, so that one switch uses all
// threads, and through the vector code.

// switcher is what key switches share.
type switcher struct {
	params       *Parameters
	decomposer   *ring.Decomposer
	extender     *ring.BasisExtender
	pool         *rlwe.BufferPool
	accumulators sync.Pool
	special      []uint64   // P modulo each prime of Q, in Montgomery form
	inverse      []uint64   // -1/P, likewise
	digits       []*pairing // of the two primes of each digit, where the vector code converts them
	remainder    *pairing   // of the two primes of P
}

func newSwitcher(p *Parameters, evaluator *rlwe.Evaluator) *switcher {
	s := &switcher{params: p, decomposer: evaluator.Decomposer, extender: evaluator.BasisExtender, pool: rlwe.NewPool(p.RingQP())}
	s.accumulators.New = func() any { return new(accumulator) }
	special := p.RingP().ModulusAtLevel[p.MaxLevelP()]
	for _, r := range p.RingQ().SubRings {
		prime := new(big.Int).SetUint64(r.Modulus)
		rest, inverse := new(big.Int).Mod(special, prime), new(big.Int).ModInverse(special, prime)
		s.special = append(s.special, ring.MForm(rest.Uint64(), r.Modulus, r.BRedConstant))
		s.inverse = append(s.inverse, r.Modulus-ring.MForm(inverse.Uint64(), r.Modulus, r.BRedConstant))
	}
	if p.PCount() == 2 && p.vectorised() {
		for first := 0; first+1 < p.QCount(); first += 2 {
			s.digits = append(s.digits, newPairing(p, first, first+1))
		}
		s.remainder = newPairing(p, p.QCount(), p.QCount()+1)
	}
	return s
}

// vectorised tells whether the vector code serves all primes of QP.
func (p *Parameters) vectorised() bool {
	for prime := range p.QCount() + p.PCount() {
		if !vectorised(p.subring(prime)) {
			return false
		}
	}
	return true
}

// subring is the ring modulo one prime: those of Q, and from there on those of P.
func (p *Parameters) subring(prime int) *ring.SubRing {
	if q := p.QCount(); prime >= q {
		return p.RingP().SubRings[prime-q]
	}
	return p.RingQ().SubRings[prime]
}

// forward transforms a polynomial modulo one prime in place.
func (p *Parameters) forward(prime int, residues []uint64) {
	if subring := p.subring(prime); vectorised(subring) {
		simdTransform(&p.roots[prime], subring, residues)
	} else {
		subring.NTT(residues, residues)
	}
}

// backward undoes forward.
func (p *Parameters) backward(prime int, residues []uint64) {
	if subring := p.subring(prime); vectorised(subring) {
		simdInverse(&p.roots[prime], subring, residues)
	} else {
		subring.INTT(residues, residues)
	}
}

// each applies forward or backward to a polynomial modulo Q, in parallel.
func (p *Parameters) each(poly ring.Poly, transform func(prime int, residues []uint64)) error {
	return parallel(len(poly.Coeffs), func(prime int) error {
		transform(prime, poly.Coeffs[prime])
		return nil
	})
}

// limbs is how many primes Q has at a level and P has.
func (s *switcher) limbs(level int) int { return level + 1 + s.params.PCount() }

// prime is the number of the i-th prime of QP at a level.
func (s *switcher) prime(i, level int) int {
	if i > level {
		return i - level - 1 + s.params.QCount()
	}
	return i
}

// limb is a polynomial modulo the i-th prime of QP at a level.
func limb(poly ringqp.Poly, i, level int) []uint64 {
	if i > level {
		return poly.P.Coeffs[i-level-1]
	}
	return poly.Q.Coeffs[i]
}

// decompose splits a polynomial in NTT form into digits modulo QP, in NTT form.
func (s *switcher) decompose(poly ring.Poly, level int) ([]ringqp.Poly, error) {
	p, top := s.params, s.params.MaxLevelP()
	pool := s.pool.AtLevel(level, top)
	digits := pool.GetBuffDecompQP(p.Parameters.Parameters, level, top)
	coefficients := pool.GetBuffPoly()
	defer pool.RecycleBuffPoly(coefficients)
	limbs, paired := s.limbs(level), s.remainder != nil && simd
	single := func(digit int) bool { return top == 0 || paired && 2*digit == level }
	err := parallel(len(digits), func(digit int) error {
		first, last := digit*(top+1), min((digit+1)*(top+1), level+1)
		for i := first; i < last; i++ {
			copy(coefficients.Coeffs[i], poly.Coeffs[i])
			p.backward(i, coefficients.Coeffs[i])
		}
		switch {
		case single(digit):
		case paired:
			simdSplit(coefficients.Coeffs[first], coefficients.Coeffs[first+1], &s.digits[digit].split)
		default:
			s.decomposer.DecomposeAndSplit(level, top, top+1, digit, *coefficients, digits[digit].Q, digits[digit].P)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return digits, parallel(len(digits)*limbs, func(job int) error {
		digit, i := job/limbs, job%limbs
		residues, first, prime := limb(digits[digit], i, level), digit*(top+1), s.prime(i, level)
		switch {
		case i <= level && i/(top+1) == digit: // its own primes' residues are known
			copy(residues, poly.Coeffs[i])
			return nil
		case single(digit):
			p.recenter(coefficients.Coeffs[first], first, p.Q()[first]/2+1, prime, residues)
		case paired:
			s.digits[digit].to(p, prime, coefficients.Coeffs[first], coefficients.Coeffs[first+1], residues)
		}
		p.forward(prime, residues)
		return nil
	})
}

// release gives digits back.
func (s *switcher) release(digits []ringqp.Poly, level int) {
	s.pool.AtLevel(level, s.params.MaxLevelP()).RecycleBuffDecompQP(digits)
}

// pair is a ciphertext modulo QP.
type pair [2]ringqp.Poly

func (s *switcher) newPair(level int) pair {
	pool := s.pool.AtLevel(level, s.params.MaxLevelP())
	return pair{*pool.GetBuffPolyQP(), *pool.GetBuffPolyQP()}
}

func (s *switcher) releasePair(sum pair, level int) {
	pool := s.pool.AtLevel(level, s.params.MaxLevelP())
	for i := range sum {
		pool.RecycleBuffPolyQP(&sum[i])
	}
}

// product multiplies digits with a key modulo one prime, the i-th of QP.
func (s *switcher) product(digits []ringqp.Poly, key *rlwe.GadgetCiphertext, level, i int, out0, out1 []uint64) {
	terms := make([]term, len(digits))
	for digit := range digits {
		row := key.Value[digit][0]
		// A key may serve higher levels: its primes of P follow those of its own level.
		terms[digit] = term{limb(digits[digit], i, level), 1, limb(row[0], i, level), limb(row[1], i, level)}
	}
	a := s.accumulators.Get().(*accumulator)
	a.sum(terms, s.params.subring(s.prime(i, level)), true, out0, out1)
	s.accumulators.Put(a)
}

// divide divides a pair by P, rounded, and hands out the quotient prime by prime; the
// pair is spent.
func (s *switcher) divide(sum pair, level int, take func(component, prime int, quotient []uint64)) error {
	p, top := s.params, s.params.MaxLevelP()
	pool := s.pool.AtLevel(level, top)
	var rest [2]*ring.Poly
	for i := range rest {
		rest[i] = pool.GetBuffPoly()
		defer pool.RecycleBuffPoly(rest[i])
	}
	paired := s.remainder != nil && simd
	err := parallel(2, func(component int) error {
		special := sum[component].P.Coeffs
		for i := range special {
			p.backward(p.QCount()+i, special[i])
		}
		switch {
		case top == 0:
		case paired:
			simdSplit(special[0], special[1], &s.remainder.split)
		default:
			s.extender.ModUpPtoQ(top, level, sum[component].P, *rest[component])
		}
		return nil
	})
	if err != nil {
		return err
	}
	return parallel(2*(level+1), func(job int) error {
		component, i := job%2, job/2
		special, residues := sum[component].P.Coeffs, rest[component].Coeffs[i]
		switch {
		case top == 0:
			p.recenter(special[0], p.QCount(), p.P()[0]/2, i, residues)
		case paired:
			s.remainder.to(p, i, special[0], special[1], residues)
		}
		p.forward(i, residues)
		p.subtractMultiply(i, residues, sum[component].Q.Coeffs[i], s.inverse[i], residues)
		take(component, i, residues)
		return nil
	})
}

// switchKey switches a polynomial in NTT form.
func (s *switcher) switchKey(poly ring.Poly, key *rlwe.GadgetCiphertext, level int,
	take func(component, prime int, switched []uint64)) error {
	digits, err := s.decompose(poly, level)
	if err != nil {
		return err
	}
	defer s.release(digits, level)
	return s.switchDigits(digits, key, level, take)
}

// switchDigits is switchKey for a polynomial that was decomposed.
func (s *switcher) switchDigits(digits []ringqp.Poly, key *rlwe.GadgetCiphertext, level int,
	take func(component, prime int, switched []uint64)) error {
	sum := s.newPair(level)
	defer s.releasePair(sum, level)
	err := parallel(s.limbs(level), func(i int) error {
		s.product(digits, key, level, i, limb(sum[0], i, level), limb(sum[1], i, level))
		return nil
	})
	if err != nil {
		return err
	}
	return s.divide(sum, level, take)
}

// permute applies an automorphism in NTT form modulo one prime.
func permute(in []uint64, index []uint64, out []uint64) {
	for i, from := range index {
		out[i] = in[from]
	}
}

// addPermuted adds what permute would write.
func addPermuted(in []uint64, index []uint64, prime uint64, out []uint64) {
	for i, from := range index {
		out[i] = ring.CRed(out[i]+in[from], prime)
	}
}
