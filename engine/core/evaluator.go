package core

import (
	"math"
	"math/big"
	"slices"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/schemes/ckks"
)

// Evaluator computes on ciphertexts. It holds evaluation keys (or none) and no
// other key. Its methods may be called from several goroutines at once; out, where
// a method takes it, receives the result and may be the first operand.
type Evaluator struct {
	Params   *Parameters
	keys     *EvaluationKeys
	ckks     *ckks.Evaluator
	switcher *switcher
}

// NewEvaluator expands the keys and makes an evaluator; keys may be nil.
func NewEvaluator(p *Parameters, keys *EvaluationKeys) (*Evaluator, error) {
	if keys == nil {
		return newEvaluator(p, nil, ckks.NewEvaluator(p.Parameters, nil)), nil
	}
	if err := p.same(keys.Params); err != nil {
		return nil, err
	}
	if err := keys.Expand(); err != nil {
		return nil, err
	}
	galois := make([]*rlwe.GaloisKey, 0, len(keys.galois))
	for _, key := range keys.galois {
		galois = append(galois, key)
	}
	// The evaluator builds its automorphism tables for these keys now, so that it
	// never writes to a shared map later.
	set := rlwe.NewMemEvaluationKeySet(keys.relin, galois...)
	return newEvaluator(p, keys, ckks.NewEvaluator(p.Parameters, set)), nil
}

func newEvaluator(p *Parameters, keys *EvaluationKeys, evaluator *ckks.Evaluator) *Evaluator {
	return &Evaluator{p, keys, evaluator, newSwitcher(p, evaluator.Evaluator)}
}

// own checks that ciphertexts are of the evaluator's parameters, of degree 1 where
// linear is set, and under the key that the evaluation keys belong to.
func (e *Evaluator) own(linear bool, ciphertexts ...*Ciphertext) error {
	for _, ct := range ciphertexts {
		if err := e.Params.same(ct.Params); err != nil {
			return err
		}
		if e.keys != nil && e.keys.ID != ct.Key {
			return failure(Key, "a ciphertext under key %s: the evaluation keys are of key %s", ct.Key, e.keys.ID)
		}
		if linear && ct.Degree() != 1 {
			return failure(Invalid, "a ciphertext of degree %d: relinearise it first", ct.Degree())
		}
	}
	return nil
}

// Add adds a ciphertext of the same scale, at the lower of the two levels.
func (e *Evaluator) Add(a, b, out *Ciphertext) (*Ciphertext, error) {
	return e.sum(a, b, out, e.Params.add, e.ckks.Add)
}

// Sub subtracts a ciphertext of the same scale, at the lower of the two levels.
func (e *Evaluator) Sub(a, b, out *Ciphertext) (*Ciphertext, error) {
	return e.sum(a, b, out, e.Params.subtract, e.ckks.Sub)
}

func notSecond(a, b, out *Ciphertext) error {
	if out != nil && out == b && a != b {
		return failure(Invalid, "the result can go to a new ciphertext or to the first operand, not to the second")
	}
	return nil
}

type operation func(*rlwe.Ciphertext, rlwe.Operand, *rlwe.Ciphertext) error

func (e *Evaluator) sum(a, b, out *Ciphertext, apply func(prime int, x, y, out []uint64), general operation) (*Ciphertext, error) {
	if err := notSecond(a, b, out); err != nil {
		return nil, err
	}
	if err := e.own(false, a, b); err != nil {
		return nil, err
	}
	if err := a.compatible(b); err != nil {
		return nil, err
	}
	if err := sameScale(a.Scale, b.Scale); err != nil {
		return nil, err
	}
	scale, level, degree := a.Scale, min(a.Level(), b.Level()), max(a.Degree(), b.Degree())
	result, err := a.target(out, degree, level)
	if err != nil {
		return nil, err
	}
	if a.Degree() == b.Degree() {
		*result.MetaData = *a.MetaData
		result.Resize(degree, level)
		return result, e.Params.pairwise(a.Ciphertext, b.Ciphertext, result.Ciphertext, apply)
	}
	// Equal up to the tolerance: made equal, lest the library multiplies by their ratio.
	right := b.Ciphertext
	if b.Scale.Cmp(scale) != 0 {
		right = withScale(b, scale)
	}
	err = general(a.Ciphertext, right, result.Ciphertext)
	result.Scale = scale
	return result, err
}

// withScale is a view of a ciphertext's polynomials with another scale.
func withScale(ct *Ciphertext, scale rlwe.Scale) *rlwe.Ciphertext {
	view := &rlwe.Ciphertext{}
	view.Value = ct.Value
	view.MetaData = ct.MetaData.CopyNew()
	view.Scale = scale
	return view
}

// AddPlain adds a plaintext of the same scale.
func (e *Evaluator) AddPlain(a *Ciphertext, b *Plaintext, out *Ciphertext) (*Ciphertext, error) {
	return e.plainSum(a, b, out, e.ckks.Add)
}

// SubPlain subtracts a plaintext of the same scale.
func (e *Evaluator) SubPlain(a *Ciphertext, b *Plaintext, out *Ciphertext) (*Ciphertext, error) {
	return e.plainSum(a, b, out, e.ckks.Sub)
}

func (e *Evaluator) plainSum(a *Ciphertext, b *Plaintext, out *Ciphertext, apply operation) (*Ciphertext, error) {
	if err := e.ownPlain(a, b); err != nil {
		return nil, err
	}
	if err := sameScale(a.Scale, b.Scale); err != nil {
		return nil, err
	}
	scale := a.Scale
	result, err := a.target(out, a.Degree(), min(a.Level(), b.Level()))
	if err != nil {
		return nil, err
	}
	right := &rlwe.Plaintext{Element: b.Element, Value: b.Value}
	right.MetaData = b.MetaData.CopyNew()
	right.Scale = scale
	err = apply(a.Ciphertext, right, result.Ciphertext)
	result.Scale = scale
	return result, err
}

func (e *Evaluator) ownPlain(a *Ciphertext, b *Plaintext) error {
	if err := e.own(false, a); err != nil {
		return err
	}
	return e.Params.same(b.Params)
}

// AddConstant adds a constant to every slot.
func (e *Evaluator) AddConstant(a *Ciphertext, constant complex128, out *Ciphertext) (*Ciphertext, error) {
	if err := e.checkConstant(a, constant, a.Scale.Float64()); err != nil {
		return nil, err
	}
	result, err := a.target(out, a.Degree(), a.Level())
	if err != nil {
		return nil, err
	}
	return result, e.ckks.Add(a.Ciphertext, constant, result.Ciphertext)
}

// MulConstant multiplies by a constant. A Gaussian integer costs nothing; another
// constant is scaled by the last prime, and the result is to be rescaled.
func (e *Evaluator) MulConstant(a *Ciphertext, constant complex128, out *Ciphertext) (*Ciphertext, error) {
	if err := e.checkConstant(a, constant, 1); err != nil {
		return nil, err
	}
	result, err := a.target(out, a.Degree(), a.Level())
	if err != nil {
		return nil, err
	}
	return result, e.ckks.Mul(a.Ciphertext, constant, result.Ciphertext)
}

// checkConstant checks a constant that is encoded at a scale.
func (e *Evaluator) checkConstant(a *Ciphertext, constant complex128, scale float64) error {
	if err := e.own(false, a); err != nil {
		return err
	}
	size := math.Hypot(real(constant), imag(constant))
	if math.IsNaN(size) || math.IsInf(size, 0) {
		return failure(Invalid, "a constant must be finite")
	}
	if limit := math.Log2(size) + math.Log2(scale) + 1; limit >= e.Params.logModulus(a.Level()) {
		return failure(Scale, "a constant too great for level %d: %.1f bits at this scale, the modulus has %.1f",
			a.Level(), limit, e.Params.logModulus(a.Level()))
	}
	if e.Params.Real() && imag(constant) != 0 {
		return failure(Invalid, "slots are real in the conjugate-invariant ring: no complex constant")
	}
	return nil
}

// IsInteger tells whether MulConstant by this constant is exact and free.
func IsInteger(constant complex128) bool {
	return real(constant) == math.Trunc(real(constant)) && imag(constant) == math.Trunc(imag(constant))
}

// Mul multiplies two ciphertexts; without relinearisation the result has degree 2.
func (e *Evaluator) Mul(a, b *Ciphertext, relinearize bool, out *Ciphertext) (*Ciphertext, error) {
	if err := notSecond(a, b, out); err != nil {
		return nil, err
	}
	if err := e.own(true, a, b); err != nil {
		return nil, err
	}
	if err := a.compatible(b); err != nil {
		return nil, err
	}
	level := min(a.Level(), b.Level())
	if !relinearize {
		result, err := a.target(out, 2, level)
		if err != nil {
			return nil, err
		}
		return result, e.tensor(a.Ciphertext, b.Ciphertext, result.Ciphertext)
	}
	if err := e.keys.checkRelin(level); err != nil {
		return nil, err
	}
	result, err := a.target(out, 1, level)
	if err != nil {
		return nil, err
	}
	product := a.like(2, level)
	if err := e.tensor(a.Ciphertext, b.Ciphertext, product.Ciphertext); err != nil {
		return nil, err
	}
	return result, e.relinearize(product.Ciphertext, result.Ciphertext)
}

// tensor multiplies two ciphertexts, prime by prime; the product has degree 2.
func (e *Evaluator) tensor(a, b, out *rlwe.Ciphertext) error {
	level, scale, pool := min(a.Level(), b.Level()), a.Scale.Mul(b.Scale), e.switcher.pool
	out.Resize(2, level)
	err := parallel(level+1, func(i int) error {
		r := e.Params.RingQ().SubRings[i]
		a0, a1, b0, b1 := a.Value[0].Coeffs[i], a.Value[1].Coeffs[i], b.Value[0].Coeffs[i], b.Value[1].Coeffs[i]
		c0, c1, c2 := out.Value[0].Coeffs[i], out.Value[1].Coeffs[i], out.Value[2].Coeffs[i]
		if vectorised(r) {
			simdTensor(r, a0, a1, b0, b1, c0, c1, c2)
			return nil
		}
		var scratch [3]*[]uint64
		for i := range scratch {
			scratch[i] = pool.GetBuffUintArray()
			defer pool.RecycleBuffUintArray(scratch[i])
		}
		m0, m1, middle := *scratch[0], *scratch[1], *scratch[2]
		r.MForm(a0, m0)
		r.MForm(a1, m1)
		r.MulCoeffsMontgomery(m1, b1, c2)
		r.MulCoeffsMontgomery(m0, b1, middle)
		r.MulCoeffsMontgomeryThenAdd(m1, b0, middle)
		r.MulCoeffsMontgomery(m0, b0, c0)
		copy(c1, middle) // at last: a, b and the result may be one
		return nil
	})
	*out.MetaData = *a.MetaData
	out.Scale = scale
	return err
}

// MulPlain multiplies by a plaintext.
func (e *Evaluator) MulPlain(a *Ciphertext, b *Plaintext, out *Ciphertext) (*Ciphertext, error) {
	if err := e.ownPlain(a, b); err != nil {
		return nil, err
	}
	if a.Degree() != 1 {
		return nil, failure(Invalid, "a ciphertext of degree %d: relinearise it first", a.Degree())
	}
	scale := a.Scale.Mul(b.Scale)
	result, err := a.target(out, 1, min(a.Level(), b.Level()))
	if err != nil {
		return nil, err
	}
	if err := e.sumPlain([]*Ciphertext{a}, []*Plaintext{b}, result); err != nil {
		return nil, err
	}
	*result.MetaData = *a.MetaData
	result.Scale = scale
	return result, nil
}

// Relinearize brings a product back to degree 1.
func (e *Evaluator) Relinearize(a, out *Ciphertext) (*Ciphertext, error) {
	if err := e.own(false, a); err != nil {
		return nil, err
	}
	if a.Degree() != 2 {
		return nil, failure(Invalid, "a ciphertext of degree %d has nothing to relinearise", a.Degree())
	}
	if err := e.keys.checkRelin(a.Level()); err != nil {
		return nil, err
	}
	result, err := a.target(out, 1, a.Level())
	if err != nil {
		return nil, err
	}
	return result, e.relinearize(a.Ciphertext, result.Ciphertext)
}

// relinearize switches the last component of a product to the key of the others; out
// may be the product itself.
func (e *Evaluator) relinearize(a, out *rlwe.Ciphertext) error {
	level := min(a.Level(), out.Level())
	if out != a {
		out.Resize(1, level)
	}
	*out.MetaData = *a.MetaData
	last, err := e.switcher.decompose(a.Value[2], level, false)
	if err != nil {
		return err
	}
	defer last.release()
	err = last.switchTo(&e.keys.relin.GadgetCiphertext, func(component, prime int, switched []uint64) {
		e.Params.add(prime, a.Value[component].Coeffs[prime], switched, out.Value[component].Coeffs[prime])
	})
	out.Resize(1, level)
	return err
}

// Rescale divides by the last prime, the scale too: the message stays, a level goes.
func (e *Evaluator) Rescale(a, out *Ciphertext) (*Ciphertext, error) {
	if err := e.own(false, a); err != nil {
		return nil, err
	}
	if a.Level() == 0 {
		return nil, failure(Level, "cannot rescale at level 0")
	}
	result, err := a.target(out, a.Degree(), a.Level()-1)
	if err != nil {
		return nil, err
	}
	return result, e.rescale(a.Ciphertext, result.Ciphertext)
}

// rescale divides by the last prime, prime by prime; out may be the ciphertext itself.
func (e *Evaluator) rescale(a, out *rlwe.Ciphertext) error {
	p, level := e.Params, a.Level()
	constants, half := p.RingQ().RescaleConstants[level-1], p.Q()[level]/2
	last := make([][]uint64, len(a.Value))
	err := parallel(len(last), func(component int) error {
		last[component] = slices.Clone(a.Value[component].Coeffs[level])
		p.backward(level, last[component])
		return nil
	})
	if err != nil {
		return err
	}
	if out != a {
		out.Resize(a.Degree(), level-1)
	}
	err = parallel(len(last)*level, func(job int) error {
		component, i := job/level, job%level
		buffer := e.switcher.pool.GetBuffUintArray()
		defer e.switcher.pool.RecycleBuffUintArray(buffer)
		p.recenter(last[component], level, half, i, *buffer)
		p.forward(i, *buffer)
		p.subtractMultiply(i, *buffer, a.Value[component].Coeffs[i], constants[i], out.Value[component].Coeffs[i])
		return nil
	})
	scale := a.Scale.Div(primeScale(p, level))
	*out.MetaData = *a.MetaData
	out.Scale = scale
	out.Resize(out.Degree(), level-1)
	return err
}

// AdjustScale brings the scale to a target and leaves the message, for one level:
// it multiplies by the integer closest to target/scale*q and rescales by q. What
// is rounded away is below 2^-24 of the message, or an error.
func (e *Evaluator) AdjustScale(a *Ciphertext, target rlwe.Scale, out *Ciphertext) (*Ciphertext, error) {
	if err := e.own(false, a); err != nil {
		return nil, err
	}
	if a.Level() == 0 {
		return nil, failure(Level, "cannot adjust the scale at level 0: it takes one level")
	}
	ratio := target.Div(a.Scale).Mul(primeScale(e.Params, a.Level()))
	factor := ratio.BigInt()
	if ratio.Float64() < 0x1p24 {
		return nil, failure(Scale, "the scale can not be lowered from 2^%.2f to 2^%.2f in one level",
			math.Log2(a.Scale.Float64()), math.Log2(target.Float64()))
	}
	if limit := e.Params.logModulus(a.Level() - 1); math.Log2(target.Float64()) >= limit {
		return nil, failure(Scale, "a scale of 2^%.2f does not fit level %d, where the modulus has %.1f bits",
			math.Log2(target.Float64()), a.Level()-1, limit)
	}
	scale := a.Scale.Mul(rlwe.NewScale(factor))
	result, err := a.target(out, a.Degree(), a.Level())
	if err != nil {
		return nil, err
	}
	if err := e.ckks.Mul(a.Ciphertext, new(big.Int).Set(factor), result.Ciphertext); err != nil {
		return nil, err
	}
	result.Scale = scale
	if err := e.rescale(result.Ciphertext, result.Ciphertext); err != nil {
		return nil, err
	}
	result.Scale = target // equal to 2^-24 of itself
	return result, nil
}
