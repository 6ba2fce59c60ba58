package core

import (
	"math"
	"math/big"
	"math/bits"

	"github.com/tuneinsight/lattigo/v6/circuits/ckks/polynomial"
	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/schemes/ckks"
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
	// The message divided by half. Polynomials are not copied for that.
	input := &Ciphertext{Ciphertext: withScale(a, a.Scale.Mul(scale)), Params: e.Params, Key: a.Key}
	if !free {
		if input, err = e.AdjustScale(input, e.Params.DefaultScale(), nil); err != nil {
			return nil, err
		}
	}
	if middle != 0 {
		if input, err = e.AddConstant(input, complex(-middle/half, 0), nil); err != nil {
			return nil, err
		}
	}
	basis := bignum.NewPolynomial(bignum.Chebyshev, c.Coefficients, [2]float64{-1, 1})
	evaluator := polynomial.NewEvaluator(e.Params.Parameters, e.ckks)
	evaluator.Evaluator.Evaluator = arithmetic{e.ckks, e}
	result, err := evaluator.Evaluate(input.Ciphertext, polynomial.NewPolynomial(basis), e.Params.DefaultScale())
	if err != nil {
		return nil, err
	}
	return &Ciphertext{Ciphertext: result, Params: e.Params, Key: a.Key}, nil
}

// arithmetic is what the library's evaluation of polynomials computes with: the costly
// operations go prime by prime, on all threads.
type arithmetic struct {
	*ckks.Evaluator
	e *Evaluator
}

// Mul multiplies; of two ciphertexts the product has degree 2.
func (a arithmetic) Mul(x *rlwe.Ciphertext, y rlwe.Operand, out *rlwe.Ciphertext) error {
	if y, ok := y.(*rlwe.Ciphertext); ok && x.Degree() == 1 && y.Degree() == 1 {
		return a.e.tensor(x, y, out)
	}
	return a.Evaluator.Mul(x, y, out)
}

// MulRelinNew multiplies two ciphertexts and relinearises.
func (a arithmetic) MulRelinNew(x *rlwe.Ciphertext, y rlwe.Operand) (*rlwe.Ciphertext, error) {
	out := ckks.NewCiphertext(a.e.Params.Parameters, 2, min(x.Level(), y.(*rlwe.Ciphertext).Level()))
	if err := a.Mul(x, y, out); err != nil {
		return nil, err
	}
	return out, a.Relinearize(out, out)
}

// Add adds.
func (a arithmetic) Add(x *rlwe.Ciphertext, y rlwe.Operand, out *rlwe.Ciphertext) error {
	if y, ok := y.(*rlwe.Ciphertext); ok && out == x && alike(x, y) {
		return a.inPlace(x, y, a.e.Params.add)
	}
	return a.Evaluator.Add(x, y, out)
}

// Sub subtracts.
func (a arithmetic) Sub(x *rlwe.Ciphertext, y rlwe.Operand, out *rlwe.Ciphertext) error {
	if y, ok := y.(*rlwe.Ciphertext); ok && out == x && alike(x, y) {
		return a.inPlace(x, y, a.e.Params.subtract)
	}
	return a.Evaluator.Sub(x, y, out)
}

// alike tells whether nothing of y is to be multiplied or copied when it goes to x. Where
// one scale is less than twice the other the library multiplies by the integer 1.
func alike(x, y *rlwe.Ciphertext) bool {
	ratio := x.Scale.Div(y.Scale).Float64()
	return ratio > 0.5 && ratio < 2 && x.Degree() >= y.Degree() && x.IsNTT && y.IsNTT
}

// inPlace adds or subtracts; the result has the greater of the two scales.
func (a arithmetic) inPlace(x, y *rlwe.Ciphertext, apply func(prime int, x, y, out []uint64)) error {
	x.Resize(x.Degree(), min(x.Level(), y.Level()))
	if x.Scale.Cmp(y.Scale) < 0 {
		x.Scale = y.Scale
	}
	return a.e.Params.pairwise(x, y, x, apply)
}

// MulThenAdd adds a ciphertext times a coefficient, encoded at the ratio of the scales.
func (a arithmetic) MulThenAdd(x *rlwe.Ciphertext, y rlwe.Operand, out *rlwe.Ciphertext) error {
	coefficient, ok := y.(*bignum.Complex)
	if !ok || !coefficient.IsReal() || x.Degree() != out.Degree() || x.Level() < out.Level() || x.Scale.Cmp(out.Scale) >= 0 {
		return a.Evaluator.MulThenAdd(x, y, out)
	}
	ratio := out.Scale.Div(x.Scale)
	scaled := new(big.Float).SetPrec(rlwe.ScalePrecision).Mul(coefficient.Real(), &ratio.Value)
	half := math.Copysign(0.5, float64(scaled.Sign()))
	factor, _ := scaled.Add(scaled, big.NewFloat(half)).Int(nil) // rounded
	return parallel(out.Level()+1, func(i int) error {
		r := a.e.Params.RingQ().SubRings[i]
		residue := new(big.Int).Mod(factor, new(big.Int).SetUint64(r.Modulus)).Uint64()
		scalar := ring.MForm(residue, r.Modulus, r.BRedConstant)
		for component := range out.Value {
			a.e.Params.multiplyAdd(i, x.Value[component].Coeffs[i], scalar, out.Value[component].Coeffs[i])
		}
		return nil
	})
}

// Relinearize brings a product to degree 1.
func (a arithmetic) Relinearize(x, out *rlwe.Ciphertext) error { return a.e.relinearize(x, out) }

// Rescale divides by the last prime.
func (a arithmetic) Rescale(x, out *rlwe.Ciphertext) error { return a.e.rescale(x, out) }
