package core

import (
	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/ring/ringqp"
)

// decomposition is a polynomial, modulo the primes of Q at a level, split into digits for
// key switches.
type decomposition struct {
	switcher     *switcher
	level        int
	poly         ring.Poly     // in NTT form
	coefficients *ring.Poly    // of the digits, ready to be converted to other primes
	kept         []ringqp.Poly // the digits modulo QP in NTT form, if they are kept
}

// decompose splits a polynomial in NTT form. Digits modulo QP are kept to serve several key
// switches. One switch alone computes them prime by prime, each just before it is
// multiplied, so that they do not leave the core's cache.
func (s *switcher) decompose(poly ring.Poly, level int, keep bool) (*decomposition, error) {
	p, top := s.params, s.params.MaxLevelP()
	pool := s.pool.AtLevel(level, top)
	d := &decomposition{switcher: s, level: level, poly: poly, coefficients: pool.GetBuffPoly()}
	library := top > 0 && !s.paired()
	if keep || library {
		d.kept = pool.GetBuffDecompQP(p.Parameters.Parameters, level, top)
	}
	err := parallel(d.digits(), func(digit int) error {
		coefficients := d.coefficients.Coeffs[d.first(digit):min(d.first(digit+1), level+1)]
		for i := range coefficients {
			prime := d.first(digit) + i
			copy(coefficients[i], poly.Coeffs[prime])
			p.backward(prime, coefficients[i])
		}
		if library {
			s.decomposer.DecomposeAndSplit(level, top, top+1, digit, *d.coefficients, d.kept[digit].Q, d.kept[digit].P)
		} else if len(coefficients) == 2 {
			simdSplit(coefficients[0], coefficients[1], &s.digits[digit].split)
		}
		return nil
	})
	if err != nil || d.kept == nil {
		return d, err
	}
	limbs := s.limbs(level)
	return d, parallel(d.digits()*limbs, func(job int) error {
		digit, i := job/limbs, job%limbs
		residues := limb(d.kept[digit], i, level)
		switch {
		case d.owns(digit, i):
			copy(residues, poly.Coeffs[i])
		case library:
			p.forward(s.prime(i, level), residues)
		default:
			d.convert(digit, i, residues)
		}
		return nil
	})
}

// release gives the memory back.
func (d *decomposition) release() {
	pool := d.switcher.pool.AtLevel(d.level, d.switcher.params.MaxLevelP())
	pool.RecycleBuffPoly(d.coefficients)
	if d.kept != nil {
		pool.RecycleBuffDecompQP(d.kept)
	}
}

// first is the number of a digit's first prime.
func (d *decomposition) first(digit int) int { return digit * d.switcher.params.PCount() }

// digits is how many digits there are.
func (d *decomposition) digits() int {
	return d.switcher.params.BaseRNSDecompositionVectorSize(d.level, d.switcher.params.MaxLevelP())
}

// owns tells whether the i-th prime of QP is one of the digit's own, modulo which its
// residues are those of the polynomial.
func (d *decomposition) owns(digit, i int) bool {
	return i <= d.level && d.first(digit) <= i && i < d.first(digit+1)
}

// convert writes a digit modulo the i-th prime of QP, in NTT form.
func (d *decomposition) convert(digit, i int, residues []uint64) {
	s, p, first := d.switcher, d.switcher.params, d.first(digit)
	prime := s.prime(i, d.level)
	if p.PCount() == 1 || first == d.level { // a digit of one prime
		p.recenter(d.coefficients.Coeffs[first], first, p.Q()[first]/2+1, prime, residues)
	} else {
		s.digits[digit].to(p, prime, d.coefficients.Coeffs[first], d.coefficients.Coeffs[first+1], residues)
	}
	p.forward(prime, residues)
}

// modulo hands out the digits modulo the i-th prime of QP, in NTT form.
func (d *decomposition) modulo(i int, use func(digits [][]uint64)) {
	digits := make([][]uint64, d.digits())
	for digit := range digits {
		switch {
		case d.kept != nil:
			digits[digit] = limb(d.kept[digit], i, d.level)
		case d.owns(digit, i):
			digits[digit] = d.poly.Coeffs[i]
		default:
			buffer := d.switcher.pool.GetBuffUintArray()
			defer d.switcher.pool.RecycleBuffUintArray(buffer)
			d.convert(digit, i, *buffer)
			digits[digit] = *buffer
		}
	}
	use(digits)
}

// switchTo switches to the key's key, and hands out the result prime by prime.
func (d *decomposition) switchTo(key *rlwe.GadgetCiphertext, take func(component, prime int, switched []uint64)) error {
	s, level := d.switcher, d.level
	sum := s.newPair(level)
	defer s.releasePair(sum, level)
	err := parallel(s.limbs(level), func(i int) error {
		d.modulo(i, func(digits [][]uint64) {
			s.product(digits, key, level, i, limb(sum[0], i, level), limb(sum[1], i, level))
		})
		return nil
	})
	if err != nil {
		return err
	}
	return s.divide(sum, level, take)
}
