package core

import (
	"math"
	"math/bits"

	"github.com/tuneinsight/lattigo/v6/circuits/ckks/polynomial"
	"github.com/tuneinsight/lattigo/v6/utils/bignum"
)

// Chebyshev is a polynomial on an interval by its Chebyshev coefficients there.
type Chebyshev struct {
	Coefficients []float64
	From, To     float64
	Drift        float64 // bits of precision that mapping the interval may cost
}

// maxDrift bounds the drift: far beyond it the evaluation overflows.
const maxDrift = 12

func (c Chebyshev) check() error {
	if len(c.Coefficients) < 2 || len(c.Coefficients) > 1<<16 {
		return failure(Invalid, "a polynomial of degree 1 to 65535, not of %d coefficients", len(c.Coefficients))
	}
	for _, coefficient := range c.Coefficients {
		if math.IsNaN(coefficient) || math.IsInf(coefficient, 0) {
			return failure(Invalid, "a polynomial with a coefficient that is not finite")
		}
	}
	if !(c.Drift >= 0 && c.Drift <= maxDrift) {
		return failure(Invalid, "0 to %d bits of drift, not %g", maxDrift, c.Drift)
	}
	if !(c.From < c.To) || math.IsInf(c.To-c.From, 0) {
		return failure(Invalid, "[%g, %g] is no interval", c.From, c.To)
	}
	return nil
}

// freeInterval tells whether the interval can be mapped to [-1, 1] by declaring
// another scale, which takes no level. It costs precision instead: powers square the
// ratio of the scale to the primes (an input 2 times off is 2^8 times off in its
// eighth power), and the noise of the evaluation grows by the same factor.
func (c Chebyshev) freeInterval(p *Parameters, scale float64) bool {
	drift := math.Abs(math.Log2(scale * (c.To - c.From) / 2 / p.DefaultScale().Float64()))
	highest := 1 << (bits.Len(uint(len(c.Coefficients)-1)) - 1)
	return drift*float64(highest) <= c.Drift
}

// Levels is how many levels the evaluation takes at an input scale.
func (c Chebyshev) Levels(p *Parameters, scale float64) (int, error) {
	if err := c.check(); err != nil {
		return 0, err
	}
	levels := bits.Len(uint(len(c.Coefficients) - 1))
	if !c.freeInterval(p, scale) {
		levels++
	}
	return levels, nil
}

// Evaluate evaluates a polynomial on every slot, by the method of Paterson and
// Stockmeyer in the Chebyshev basis; the result has the default scale. Slots must
// lie in the interval: outside, a Chebyshev polynomial grows as fast as its degree
// allows.
func (e *Evaluator) Evaluate(a *Ciphertext, c Chebyshev) (*Ciphertext, error) {
	if err := e.own(true, a); err != nil {
		return nil, err
	}
	levels, err := c.Levels(e.Params, a.Scale.Float64())
	if err != nil {
		return nil, err
	}
	if a.Level() < levels {
		return nil, failure(Level, "a polynomial of degree %d takes %d levels here, the ciphertext is at level %d",
			len(c.Coefficients)-1, levels, a.Level())
	}
	if err := e.keys.checkRelin(a.Level()); err != nil {
		return nil, err
	}
	free := c.freeInterval(e.Params, a.Scale.Float64())
	half, middle := (c.To-c.From)/2, (c.From+c.To)/2
	scale, err := NewScale(half)
	if err != nil {
		return nil, err
	}
	input, err := a.SetScale(a.Scale.Mul(scale), nil) // the message divided by half
	if err != nil {
		return nil, err
	}
	if !free {
		if input, err = e.AdjustScale(input, e.Params.DefaultScale(), input); err != nil {
			return nil, err
		}
	}
	if middle != 0 {
		if input, err = e.AddConstant(input, complex(-middle/half, 0), input); err != nil {
			return nil, err
		}
	}
	basis := bignum.NewPolynomial(bignum.Chebyshev, c.Coefficients, [2]float64{-1, 1})
	evaluator := polynomial.NewEvaluator(e.Params.Parameters, e.ckks)
	result, err := evaluator.Evaluate(input.Ciphertext, polynomial.NewPolynomial(basis), e.Params.DefaultScale())
	if err != nil {
		return nil, err
	}
	return &Ciphertext{Ciphertext: result, Params: e.Params, Key: a.Key}, nil
}
