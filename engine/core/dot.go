package core

import "github.com/tuneinsight/lattigo/v6/core/rlwe"

// Dot is the sum of the products a[i]*b[i], relinearised once; not rescaled.
func (e *Evaluator) Dot(a []*Ciphertext, b []*Ciphertext) (*Ciphertext, error) {
	if err := e.own(true, append(append([]*Ciphertext{}, a...), b...)...); err != nil {
		return nil, err
	}
	operands := make([]rlwe.Operand, len(b))
	level := e.Params.MaxLevel()
	for i := range b {
		if err := a[0].compatible(b[i]); err != nil {
			return nil, err
		}
		operands[i], level = b[i].Ciphertext, min(level, b[i].Level())
	}
	sum, err := e.dot(a, operands, func(i int) rlwe.Scale { return b[i].Scale }, 2, level)
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
	operands := make([]rlwe.Operand, len(b))
	level := e.Params.MaxLevel()
	for i := range b {
		if err := e.Params.same(b[i].Params); err != nil {
			return nil, err
		}
		operands[i], level = b[i].Plaintext, min(level, b[i].Level())
	}
	return e.dot(a, operands, func(i int) rlwe.Scale { return b[i].Scale }, 1, level)
}

func (e *Evaluator) dot(a []*Ciphertext, b []rlwe.Operand, scale func(int) rlwe.Scale, degree, level int) (*Ciphertext, error) {
	product := a[0].Scale.Mul(scale(0))
	for i, ct := range a {
		if err := a[0].compatible(ct); err != nil {
			return nil, err
		}
		if err := sameScale(product, ct.Scale.Mul(scale(i))); err != nil {
			return nil, err
		}
		level = min(level, ct.Level())
	}
	if degree == 2 {
		if err := e.keys.checkRelin(level); err != nil {
			return nil, err
		}
	}
	// Each worker adds up its own products; the partial sums are added in the end.
	partial := make([]*Ciphertext, Threads())
	err := parallelWorkers(len(partial), len(a), func(worker, i int) error {
		if partial[worker] == nil {
			partial[worker] = newCiphertext(e.Params, a[0].Key, degree, level, product)
		}
		sum := partial[worker]
		sum.Scale = a[i].Scale.Mul(scale(i)) // equal up to the tolerance
		return e.ckks.MulThenAdd(a[i].Ciphertext, b[i], sum.Ciphertext)
	})
	if err != nil {
		return nil, err
	}
	var sum *Ciphertext
	for _, part := range partial {
		switch {
		case part == nil:
		case sum == nil:
			sum = part
			sum.Scale = product
		default:
			part.Scale = product
			if err := e.ckks.Add(sum.Ciphertext, part.Ciphertext, sum.Ciphertext); err != nil {
				return nil, err
			}
		}
	}
	return sum, nil
}
