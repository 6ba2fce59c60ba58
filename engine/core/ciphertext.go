package core

import (
	"math"
	"math/big"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/schemes/ckks"
)

// scaleTolerance is how far two scales may be apart, relatively, and still count
// as equal. Primes of one size differ by 2^-20 of their value, so the scale that a
// product takes after rescaling is a different one; a scale that went through a
// float64 is off by 2^-53.
const scaleTolerance = 0x1p-40

// Plaintext is an encoded vector.
type Plaintext struct {
	*rlwe.Plaintext
	Params *Parameters
}

// Ciphertext is an encrypted vector. Key names the secret key that decrypts it.
// Seed is set while the second component is the one that the seed generates: such
// a ciphertext takes half the bytes on the wire.
type Ciphertext struct {
	*rlwe.Ciphertext
	Params *Parameters
	Key    ID
	Seed   *[32]byte

	rounding rounding
}

// NewPlaintext returns an empty plaintext.
func NewPlaintext(p *Parameters, level int, scale rlwe.Scale) *Plaintext {
	plaintext := ckks.NewPlaintext(p.Parameters, level)
	plaintext.Scale = scale
	return &Plaintext{plaintext, p}
}

func newCiphertext(p *Parameters, key ID, degree, level int, scale rlwe.Scale) *Ciphertext {
	ciphertext := ckks.NewCiphertext(p.Parameters, degree, level)
	ciphertext.Scale = scale
	return &Ciphertext{Ciphertext: ciphertext, Params: p, Key: key}
}

// like returns an empty ciphertext of the same parameters and key.
func (ct *Ciphertext) like(degree, level int) *Ciphertext {
	return newCiphertext(ct.Params, ct.Key, degree, level, ct.Scale)
}

// target returns out made ready to take a result, or a new ciphertext where out is nil.
func (ct *Ciphertext) target(out *Ciphertext, degree, level int) (*Ciphertext, error) {
	if out == nil {
		return ct.like(degree, level), nil
	}
	if err := ct.compatible(out); err != nil {
		return nil, err
	}
	out.Seed, out.rounding = nil, rounding{}
	if out != ct {
		out.Resize(degree, level)
	}
	return out, nil
}

// Copy returns a deep copy.
func (ct *Ciphertext) Copy() *Ciphertext {
	return &Ciphertext{ct.CopyNew(), ct.Params, ct.Key, ct.Seed, ct.rounding}
}

// compatible checks that two ciphertexts can be combined.
func (ct *Ciphertext) compatible(other *Ciphertext) error {
	if err := ct.Params.same(other.Params); err != nil {
		return err
	}
	if ct.Key != other.Key {
		return failure(Key, "ciphertexts under different keys: %s and %s", ct.Key, other.Key)
	}
	return nil
}

// sameScale checks that two scales are equal within the tolerance.
func sameScale(a, b rlwe.Scale) error {
	if ratio := a.Div(b).Float64(); math.Abs(ratio-1) > scaleTolerance {
		return failure(Scale, "unequal scales 2^%.6f and 2^%.6f (ratio %.9g): adjust one of them first",
			math.Log2(a.Float64()), math.Log2(b.Float64()), ratio)
	}
	return nil
}

// NewScale checks a scale that comes from outside.
func NewScale(scale float64) (rlwe.Scale, error) {
	if !(scale >= 0x1p-200 && scale <= 0x1p1000) {
		return rlwe.Scale{}, failure(Scale, "a scale must be a positive number, not %g", scale)
	}
	return rlwe.NewScale(scale), nil
}

func primeScale(p *Parameters, level int) rlwe.Scale { return rlwe.NewScale(p.Q()[level]) }

// SetScale declares another scale, which multiplies the message by old/new: an
// exact multiplication that costs nothing.
func (ct *Ciphertext) SetScale(scale rlwe.Scale, out *Ciphertext) (*Ciphertext, error) {
	result := out
	if out == nil {
		result = ct.Copy()
	} else if out != ct {
		return nil, failure(Invalid, "the scale can be set in place or on a copy only")
	}
	result.Scale = scale
	return result, nil
}

// DropLevel lowers the level; the message stays.
func (ct *Ciphertext) DropLevel(level int, out *Ciphertext) (*Ciphertext, error) {
	if level < 0 || level > ct.Level() {
		return nil, failure(Level, "cannot drop from level %d to level %d", ct.Level(), level)
	}
	if out == ct {
		ct.Resize(ct.Degree(), level)
		return ct, nil
	}
	if out != nil {
		return nil, failure(Invalid, "a level can be dropped in place or on a copy only")
	}
	// Each limb has a generator of its own, so the limbs that stay are what the same
	// seed gives at the lower level, and the seed stays valid.
	result := ct.like(ct.Degree(), level)
	for i := range result.Value {
		result.Value[i].CopyLvl(level, ct.Value[i])
	}
	result.Seed = ct.Seed
	return result, nil
}

// Bytes is the memory that the polynomials take.
func (ct *Ciphertext) Bytes() int { return len(ct.Value) * (ct.Level() + 1) * ct.Params.N() * 8 }

// Bytes is the memory that the polynomial takes.
func (pt *Plaintext) Bytes() int { return (pt.Level() + 1) * pt.Params.N() * 8 }

// scaleParts splits a scale in a 128-bit integer and an exponent: mantissa * 2^exponent.
func scaleParts(scale rlwe.Scale) (high, low uint64, exponent int) {
	fraction := new(big.Float)
	exponent = scale.Value.MantExp(fraction) - 128
	mantissa, _ := fraction.SetMantExp(fraction, 128).Int(nil)
	low = new(big.Int).And(mantissa, new(big.Int).SetUint64(math.MaxUint64)).Uint64()
	return mantissa.Rsh(mantissa, 64).Uint64(), low, exponent
}

// scaleFrom is the inverse of scaleParts for what scaleParts can give.
func scaleFrom(high, low uint64, exponent int) (rlwe.Scale, error) {
	if high>>63 != 1 || exponent < -328 || exponent > 872 {
		return rlwe.Scale{}, failure(Corrupt, "a scale out of range")
	}
	mantissa := new(big.Int).SetUint64(high)
	mantissa.Lsh(mantissa, 64).Or(mantissa, new(big.Int).SetUint64(low))
	value := new(big.Float).SetPrec(rlwe.ScalePrecision).SetInt(mantissa)
	return rlwe.NewScale(value.SetMantExp(value, exponent)), nil
}

// KeyID names the key that an object belongs to.
func (ct *Ciphertext) KeyID() ID       { return ct.Key }
func (sk *SecretKey) KeyID() ID        { return sk.ID }
func (pk *PublicKey) KeyID() ID        { return pk.ID }
func (keys *EvaluationKeys) KeyID() ID { return keys.ID }
func (r *RefreshRequest) KeyID() ID    { return r.Key }
func (r *RefreshReply) KeyID() ID      { return r.Key }
