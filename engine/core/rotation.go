package core

import (
	"strconv"

	"github.com/tuneinsight/lattigo/v6/ring/ringqp"
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
	return result, e.ckks.Automorphism(a.Ciphertext, element, result.Ciphertext)
}

func (e *Evaluator) checkRotation(element uint64, level int, what string, by int) error {
	if by != 0 {
		return e.keys.checkGalois(element, level, what+" by "+strconv.Itoa(by))
	}
	return e.keys.checkGalois(element, level, what)
}

// hoisted is a ciphertext with the decomposition that all its rotations share
// (Halevi and Shoup, "Faster Homomorphic Linear Transformations in HElib", 2018).
type hoisted struct {
	ciphertext *Ciphertext
	digits     []ringqp.Poly
}

// hoist decomposes a ciphertext at a level, one digit a job.
func (e *Evaluator) hoist(ct *Ciphertext, level int) (*hoisted, error) {
	p := e.Params
	top := p.MaxLevelP()
	ring := p.RingQ().AtLevel(level)
	coefficients := ring.NewPoly()
	ring.INTT(ct.Value[1], coefficients)
	digits := make([]ringqp.Poly, p.BaseRNSDecompositionVectorSize(level, top))
	err := parallel(len(digits), func(i int) error {
		digits[i] = p.RingQP().AtLevel(level, top).NewPoly()
		e.ckks.DecomposeSingleNTT(level, top, top+1, i, ct.Value[1], coefficients, digits[i].Q, digits[i].P)
		return nil
	})
	return &hoisted{ct, digits}, err
}

func (e *Evaluator) rotateHoisted(h *hoisted, rotation, level int) (*Ciphertext, error) {
	result := h.ciphertext.like(1, level)
	if e.Params.normal(rotation) == 0 {
		for i := range result.Value {
			result.Value[i].CopyLvl(level, h.ciphertext.Value[i])
		}
		return result, nil
	}
	element := e.Params.RotationElement(rotation)
	return result, e.ckks.AutomorphismHoisted(level, h.ciphertext.Ciphertext, h.digits, element, result.Ciphertext)
}

// RotateHoisted rotates one ciphertext by several amounts, in parallel, sharing
// the decomposition.
func (e *Evaluator) RotateHoisted(a *Ciphertext, rotations []int) ([]*Ciphertext, error) {
	if err := e.own(true, a); err != nil {
		return nil, err
	}
	return e.rotations(a, rotations, a.Level())
}

// rotations returns rotated copies at a level at most that of the ciphertext.
func (e *Evaluator) rotations(a *Ciphertext, rotations []int, level int) ([]*Ciphertext, error) {
	for _, rotation := range rotations {
		if err := e.checkRotation(e.Params.RotationElement(rotation), level, "rotation", rotation); err != nil {
			return nil, err
		}
	}
	shared, err := e.hoist(a, level)
	if err != nil {
		return nil, err
	}
	results := make([]*Ciphertext, len(rotations))
	return results, parallel(len(rotations), func(i int) (err error) {
		results[i], err = e.rotateHoisted(shared, rotations[i], level)
		return err
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
	result, err := a.target(out, 1, a.Level())
	if err != nil {
		return nil, err
	}
	return result, e.ckks.PartialTracesSum(a.Ciphertext, step, count, result.Ciphertext)
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
