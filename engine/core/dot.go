package core

import (
	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
)

// Dot is the sum of the products a[i]*b[i], relinearised once; not rescaled.
func (e *Evaluator) Dot(a []*Ciphertext, b []*Ciphertext) (*Ciphertext, error) {
	if err := e.own(true, append(append([]*Ciphertext{}, a...), b...)...); err != nil {
		return nil, err
	}
	right := make([]rlwe.Element[ring.Poly], len(b))
	for i := range b {
		if err := a[0].compatible(b[i]); err != nil {
			return nil, err
		}
		right[i] = b[i].Element
	}
	level, scale, err := e.dotLevel(a, right)
	if err != nil {
		return nil, err
	}
	if err := e.keys.checkRelin(level); err != nil {
		return nil, err
	}
	sum := newCiphertext(e.Params, a[0].Key, 2, level, scale)
	err = parallel(level+1, func(i int) error {
		// Terms of the first components make c0 and a part of c1, of the second the rest and c2.
		buffer := e.switcher.pool.GetBuffUintArray()
		defer e.switcher.pool.RecycleBuffUintArray(buffer)
		out := [3][]uint64{sum.Value[0].Coeffs[i], sum.Value[1].Coeffs[i], sum.Value[2].Coeffs[i]}
		terms := make([]term, len(a))
		for component := range 2 {
			for j := range terms {
				terms[j] = term{a[j].Value[component].Coeffs[i], 1, b[j].Value[0].Coeffs[i], b[j].Value[1].Coeffs[i]}
			}
			if component == 0 {
				e.accumulate(terms, i, out[0], *buffer)
			} else {
				e.accumulate(terms, i, out[1], out[2])
			}
		}
		e.Params.add(i, *buffer, out[1], out[1])
		return nil
	})
	if err != nil {
		return nil, err
	}
	return e.Relinearize(sum, sum)
}

// DotPlain is the sum of the products a[i]*b[i]; not rescaled.
func (e *Evaluator) DotPlain(a []*Ciphertext, b []*Plaintext) (*Ciphertext, error) {
	if err := e.own(true, a...); err != nil {
		return nil, err
	}
	right := make([]rlwe.Element[ring.Poly], len(b))
	for i := range b {
		if err := e.Params.same(b[i].Params); err != nil {
			return nil, err
		}
		right[i] = b[i].Element
	}
	level, scale, err := e.dotLevel(a, right)
	if err != nil {
		return nil, err
	}
	sum := newCiphertext(e.Params, a[0].Key, 1, level, scale)
	return sum, e.sumPlain(a, b, sum)
}

// sumPlain writes the sum of products with plaintexts, prime by prime; the result may be
// one of the ciphertexts.
func (e *Evaluator) sumPlain(a []*Ciphertext, b []*Plaintext, out *Ciphertext) error {
	return parallel(out.Level()+1, func(i int) error {
		terms := make([]term, len(a))
		for j := range terms {
			terms[j] = term{b[j].Value.Coeffs[i], 1, a[j].Value[0].Coeffs[i], a[j].Value[1].Coeffs[i]}
		}
		e.accumulate(terms, i, out.Value[0].Coeffs[i], out.Value[1].Coeffs[i])
		return nil
	})
}

// accumulate writes a sum of products modulo a prime of Q.
func (e *Evaluator) accumulate(terms []term, prime int, out0, out1 []uint64) {
	a := e.switcher.accumulators.Get().(*accumulator)
	a.sum(terms, e.Params.subring(prime), false, out0, out1)
	e.switcher.accumulators.Put(a)
}

// dotLevel is the level of a sum of products and its scale, after checks of both.
func (e *Evaluator) dotLevel(a []*Ciphertext, b []rlwe.Element[ring.Poly]) (int, rlwe.Scale, error) {
	level, scale := e.Params.MaxLevel(), a[0].Scale.Mul(b[0].Scale)
	for i, ct := range a {
		if err := a[0].compatible(ct); err != nil {
			return 0, scale, err
		}
		if err := sameScale(scale, ct.Scale.Mul(b[i].Scale)); err != nil {
			return 0, scale, err
		}
		level = min(level, ct.Level(), b[i].Level())
	}
	return level, scale, nil
}
