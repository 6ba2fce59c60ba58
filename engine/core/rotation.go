package core

import (
	"slices"
	"strconv"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
)

// normal brings a rotation into [0, slots).
func (p *Parameters) normal(rotation int) int {
	slots := p.Slots()
	return ((rotation % slots) + slots) % slots
}

// RotationElement is the Galois element of a rotation to the left.
func (p *Parameters) RotationElement(rotation int) uint64 { return p.GaloisElement(p.normal(rotation)) }

// ConjugationElement is the Galois element of complex conjugation.
func (p *Parameters) ConjugationElement() (uint64, error) {
	if p.Real() {
		return 0, failure(Invalid, "slots are real in the conjugate-invariant ring: nothing to conjugate")
	}
	return p.GaloisElementOrderTwoOrthogonalSubgroup(), nil
}

// Rotate rotates the slots to the left.
func (e *Evaluator) Rotate(a *Ciphertext, rotation int, out *Ciphertext) (*Ciphertext, error) {
	return e.automorphism(a, e.Params.RotationElement(rotation), out, "rotation", rotation)
}

// Conjugate conjugates every slot.
func (e *Evaluator) Conjugate(a, out *Ciphertext) (*Ciphertext, error) {
	element, err := e.Params.ConjugationElement()
	if err != nil {
		return nil, err
	}
	return e.automorphism(a, element, out, "conjugation", 0)
}

func (e *Evaluator) automorphism(a *Ciphertext, element uint64, out *Ciphertext, what string, by int) (*Ciphertext, error) {
	if err := e.own(true, a); err != nil {
		return nil, err
	}
	if err := e.checkRotation(element, a.Level(), what, by); err != nil {
		return nil, err
	}
	result, err := a.target(out, 1, a.Level())
	if err != nil {
		return nil, err
	}
	if element == 1 {
		return result, e.ckks.Automorphism(a.Ciphertext, element, result.Ciphertext)
	}
	digits, err := e.switcher.decompose(a.Value[1], a.Level(), false)
	if err != nil {
		return nil, err
	}
	defer digits.release()
	return result, e.rotateDigits(a, digits, element, result)
}

// rotateDigits applies an automorphism to a ciphertext with its decomposition; the
// result may be the ciphertext itself, and has its level.
func (e *Evaluator) rotateDigits(a *Ciphertext, digits *decomposition, element uint64, result *Ciphertext) error {
	key, err := e.ckks.CheckAndGetGaloisKey(element)
	if err != nil {
		return err
	}
	index := e.ckks.AutomorphismIndex(element)
	*result.MetaData = *a.MetaData
	return digits.switchTo(&key.GadgetCiphertext, func(component, prime int, switched []uint64) {
		if component == 0 {
			e.Params.add(prime, switched, a.Value[0].Coeffs[prime], switched)
		}
		e.Params.permute(prime, switched, index, result.Value[component].Coeffs[prime])
	})
}

func (e *Evaluator) checkRotation(element uint64, level int, what string, by int) error {
	if by != 0 {
		return e.keys.checkGalois(element, level, what+" by "+strconv.Itoa(by))
	}
	return e.keys.checkGalois(element, level, what)
}

// RotateHoisted rotates one ciphertext by several amounts, in parallel, sharing
// the decomposition.
func (e *Evaluator) RotateHoisted(a *Ciphertext, rotations []int) ([]*Ciphertext, error) {
	if err := e.own(true, a); err != nil {
		return nil, err
	}
	return e.rotations(a, rotations, a.Level())
}

// rotations returns rotated copies at a level at most that of the ciphertext. They share
// its decomposition (Halevi and Shoup, "Faster Homomorphic Linear Transformations in
// HElib", 2018).
func (e *Evaluator) rotations(a *Ciphertext, rotations []int, level int) ([]*Ciphertext, error) {
	for _, rotation := range rotations {
		if err := e.checkRotation(e.Params.RotationElement(rotation), level, "rotation", rotation); err != nil {
			return nil, err
		}
	}
	var digits *decomposition
	if slices.ContainsFunc(rotations, func(by int) bool { return e.Params.normal(by) != 0 }) {
		var err error
		if digits, err = e.switcher.decompose(a.Value[1], level, len(rotations) > 1); err != nil {
			return nil, err
		}
		defer digits.release()
	}
	results := make([]*Ciphertext, len(rotations))
	return results, parallel(len(rotations), func(i int) error {
		results[i] = a.like(1, level)
		element := e.Params.RotationElement(rotations[i])
		if element != 1 {
			return e.rotateDigits(a, digits, element, results[i])
		}
		for component := range results[i].Value {
			results[i].Value[component].CopyLvl(level, a.Value[component])
		}
		return nil
	})
}

// InnerSum adds count copies of the ciphertext, copy i rotated by i*step.
func (e *Evaluator) InnerSum(a *Ciphertext, step, count int, out *Ciphertext) (*Ciphertext, error) {
	if err := e.own(true, a); err != nil {
		return nil, err
	}
	if count < 1 || count > e.Params.Slots() || e.Params.normal(step) == 0 {
		return nil, failure(Invalid, "inner sum: a step that is no multiple of the slots, and 1 to %d terms", e.Params.Slots())
	}
	for _, rotation := range InnerSumRotations(step, count) {
		if err := e.checkRotation(e.Params.RotationElement(rotation), a.Level(), "rotation", rotation); err != nil {
			return nil, err
		}
	}
	// sum has 2^i terms, rest the terms of the bits of count that were read.
	sum, rest := a.Copy(), (*Ciphertext)(nil)
	for i := 0; count>>i > 1; i++ {
		high, rotations := 0, []int{step << i}
		if count>>i&1 == 1 {
			high = (count - count&((2<<i)-1)) * step
		} else if count>>i&3 == 0 && e.keys.checkGalois(e.Params.RotationElement(3*step<<i), a.Level(), "") == nil {
			rotations = append(rotations, 2*step<<i, 3*step<<i) // two bits at once
			i++
		}
		rotated, err := e.addRotations(sum, rotations, high)
		if err != nil {
			return nil, err
		}
		if rest == nil {
			rest = rotated
		} else if rotated != nil {
			if rest, err = e.Add(rest, rotated, rest); err != nil {
				return nil, err
			}
		}
	}
	result, err := a.target(out, 1, a.Level())
	if err != nil {
		return nil, err
	}
	if rest == nil {
		result.Ciphertext.Copy(sum.Ciphertext)
		return result, nil
	}
	return result, e.ckks.Add(sum.Ciphertext, rest.Ciphertext, result.Ciphertext)
}

// addRotations adds to a ciphertext several rotations of it, which are divided by P
// together. It returns what the ciphertext was, rotated by apart, unless that is 0.
func (e *Evaluator) addRotations(ct *Ciphertext, rotations []int, apart int) (rotated *Ciphertext, err error) {
	level := ct.Level()
	keys := make([]*rlwe.GaloisKey, len(rotations))
	for i, rotation := range rotations {
		if keys[i], err = e.ckks.CheckAndGetGaloisKey(e.Params.RotationElement(rotation)); err != nil {
			return nil, err
		}
	}
	digits, err := e.switcher.decompose(ct.Value[1], level, apart != 0)
	if err != nil {
		return nil, err
	}
	defer digits.release()
	if apart != 0 {
		rotated = ct.like(1, level)
		if err := e.rotateDigits(ct, digits, e.Params.RotationElement(apart), rotated); err != nil {
			return nil, err
		}
	}
	sum, err := e.sumRotations(ct, digits, keys)
	if err != nil {
		return nil, err
	}
	defer e.switcher.releasePair(sum, level)
	return rotated, e.switcher.divide(sum, level, func(component, prime int, quotient []uint64) {
		e.Params.add(prime, ct.Value[component].Coeffs[prime], quotient, ct.Value[component].Coeffs[prime])
	})
}

// sumRotations adds up rotations of a ciphertext, given with its decomposition, modulo
// QP and times P.
func (e *Evaluator) sumRotations(ct *Ciphertext, digits *decomposition, keys []*rlwe.GaloisKey) (pair, error) {
	s, level := e.switcher, digits.level
	sum := s.newPair(level)
	return sum, parallel(s.limbs(level), func(i int) error {
		var switched [2]*[]uint64
		for component := range switched {
			switched[component] = s.pool.GetBuffUintArray()
			defer s.pool.RecycleBuffUintArray(switched[component])
		}
		digits.modulo(i, func(residues [][]uint64) {
			for j, key := range keys {
				s.product(residues, &key.GadgetCiphertext, level, i, *switched[0], *switched[1])
				if i <= level { // times P, it is 0 modulo the primes of P
					e.Params.multiplyAdd(i, ct.Value[0].Coeffs[i], s.special[i], *switched[0])
				}
				index := e.ckks.AutomorphismIndex(key.GaloisElement)
				for component := range switched {
					if out := limb(sum[component], i, level); j == 0 {
						e.Params.permute(s.prime(i, level), *switched[component], index, out)
					} else {
						e.Params.addPermuted(s.prime(i, level), *switched[component], index, out)
					}
				}
			}
		})
		return nil
	})
}

// InnerSumRotations lists the rotations that InnerSum needs, those of the binary
// method that the library follows.
func InnerSumRotations(step, count int) (rotations []int) {
	for i, rest := 0, count; rest > 1; i, rest = i+1, rest>>1 {
		rotations = append(rotations, step<<i)
		if rest&1 == 1 {
			if high := count - count&((2<<i)-1); high != 0 {
				rotations = append(rotations, high*step)
			}
		}
	}
	return rotations
}
