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

// paired tells whether the vector code converts between moduli, two primes at a time.
func (s *switcher) paired() bool { return simd && s.remainder != nil }

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
func (s *switcher) product(digits [][]uint64, key *rlwe.GadgetCiphertext, level, i int, out0, out1 []uint64) {
	terms := make([]term, len(digits))
	for digit := range digits {
		row := key.Value[digit][0]
		// A key may serve higher levels: its primes of P follow those of its own level.
		terms[digit] = term{digits[digit], 1, limb(row[0], i, level), limb(row[1], i, level)}
	}
	subring := s.params.subring(s.prime(i, level))
	if vectorised(subring) && len(terms) <= 8 {
		simdProduct(subring, terms, out0, out1)
		return
	}
	a := s.accumulators.Get().(*accumulator)
	a.sum(terms, subring, true, out0, out1)
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
	paired := s.paired()
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
