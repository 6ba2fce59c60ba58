package core

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"math"
	"math/big"
	"math/bits"
	"slices"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/schemes/ckks"
	"golang.org/x/crypto/blake2b"
)

// securityLimit maps log2 of the ring degree to the greatest log2(QP) that gives
// 128 bits of classical security with a uniform ternary secret and an error of
// standard deviation 3.2: the Homomorphic Encryption Standard (2018) for 2^12 to
// 2^15, "Security Guidelines for Implementing Homomorphic Encryption" (Bossuat et
// al., 2024) for 2^16.
var securityLimit = map[int]int{12: 109, 13: 218, 14: 438, 15: 881, 16: 1747}

const (
	maxLogScale = 53 // beyond, a float64 cannot carry the message
	minLogScale = 10
	maxPrimes   = 64
)

// ID is a fingerprint: of parameters, or the public name of a secret key.
type ID [16]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// Literal describes parameters: sizes in bits (LogQ, LogP) or the primes
// themselves (Q, P).
type Literal struct {
	LogN     int      `json:"log_n"`
	LogQ     []int    `json:"log_q,omitempty"`
	LogP     []int    `json:"log_p,omitempty"`
	Q        []uint64 `json:"q,omitempty"`
	P        []uint64 `json:"p,omitempty"`
	LogScale int      `json:"log_scale"`
	Ring     string   `json:"ring"`
}

// Parameters are checked CKKS parameters with what is computed from them once.
type Parameters struct {
	ckks.Parameters
	ID      ID
	Literal Literal // with the primes, not their sizes
	encoder *ckks.Encoder
	roots   []wideRoots // by prime, those of P after those of Q
}

var ringTypes = map[string]ring.Type{"standard": ring.Standard, "conjugate_invariant": ring.ConjugateInvariant}

// NewParameters checks a literal, given as JSON: form, primes and security.
func NewParameters(text []byte) (*Parameters, error) {
	var literal Literal
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&literal); err != nil {
		return nil, failure(Parameter, "parameters: %v", err)
	}
	return literal.Check()
}

// Check is the one constructor of Parameters.
func (literal Literal) Check() (*Parameters, error) {
	if err := literal.checkForm(); err != nil {
		return nil, err
	}
	ckksLiteral := ckks.ParametersLiteral{
		LogN: literal.LogN, Q: literal.Q, P: literal.P, LogQ: literal.LogQ, LogP: literal.LogP,
		RingType: ringTypes[literal.Ring], LogDefaultScale: literal.LogScale,
		Xs: rlwe.DefaultXs, Xe: rlwe.DefaultXe, // uniform ternary secret, sigma 3.2
	}
	parameters, err := ckks.NewParametersFromLiteral(ckksLiteral)
	if err != nil {
		return nil, failure(Parameter, "parameters: %v", err)
	}
	for _, prime := range parameters.P() {
		if slices.Contains(parameters.Q(), prime) {
			return nil, failure(Parameter, "the prime %d is in both moduli", prime)
		}
	}
	if err := checkSecurity(parameters); err != nil {
		return nil, err
	}
	literal.LogQ, literal.LogP, literal.Q, literal.P = nil, nil, parameters.Q(), parameters.P()
	p := &Parameters{Parameters: parameters, Literal: literal, encoder: ckks.NewEncoder(parameters, 53), roots: make([]wideRoots, parameters.QCount()+parameters.PCount())}
	canonical, err := json.Marshal(literal)
	if err != nil {
		return nil, failure(Parameter, "parameters: %v", err)
	}
	digest := blake2b.Sum256(append([]byte("cipherlm parameters 1\n"), canonical...))
	copy(p.ID[:], digest[:])
	return p, nil
}

func (literal Literal) checkForm() error {
	if _, ok := ringTypes[literal.Ring]; !ok {
		return failure(Parameter, "the ring must be \"standard\" or \"conjugate_invariant\", not %q", literal.Ring)
	}
	if _, ok := securityLimit[literal.LogN]; !ok {
		return failure(Parameter, "the ring degree must be 2^12 to 2^16, not 2^%d", literal.LogN)
	}
	if (len(literal.Q) == 0) == (len(literal.LogQ) == 0) || (len(literal.P) == 0) == (len(literal.LogP) == 0) {
		return failure(Parameter, "give the moduli either as sizes (log_q, log_p) or as primes (q, p)")
	}
	if (len(literal.Q) == 0) != (len(literal.P) == 0) {
		return failure(Parameter, "give both moduli as sizes or both as primes")
	}
	if len(literal.Q)+len(literal.LogQ) > maxPrimes || len(literal.P)+len(literal.LogP) > maxPrimes {
		return failure(Parameter, "more than %d primes in a modulus", maxPrimes)
	}
	for _, size := range append(append([]int{}, literal.LogQ...), literal.LogP...) {
		if size < 20 || size > 60 {
			return failure(Parameter, "a prime must have 20 to 60 bits, not %d", size)
		}
	}
	for _, prime := range append(append([]uint64{}, literal.Q...), literal.P...) {
		if size := bits.Len64(prime); size < 20 || size > 61 {
			return failure(Parameter, "a prime must have 20 to 60 bits: %d has %d", prime, size)
		}
	}
	if literal.LogScale < minLogScale || literal.LogScale > maxLogScale {
		return failure(Parameter, "the scale must be 2^%d to 2^%d, not 2^%d", minLogScale, maxLogScale, literal.LogScale)
	}
	return nil
}

// checkSecurity compares Q*P, an integer, with the table. A conjugate-invariant
// ring of degree N lives in the ring of degree 2N, but its secrets and errors have
// N coefficients only: it is held to the limit of N.
func checkSecurity(parameters ckks.Parameters) error {
	product := big.NewInt(1)
	for _, prime := range append(parameters.Q(), parameters.P()...) {
		product.Mul(product, new(big.Int).SetUint64(prime))
	}
	limit := securityLimit[parameters.LogN()]
	if product.BitLen() > limit {
		return failure(Insecure, "log2(QP) is %.5f, over the %d bits that give 128-bit security at ring degree 2^%d",
			logTwo(product), limit, parameters.LogN())
	}
	return nil
}

func logTwo(x *big.Int) float64 {
	shift := max(0, x.BitLen()-63)
	return math.Log2(float64(new(big.Int).Rsh(x, uint(shift)).Uint64())) + float64(shift)
}

// Slots is the number of values in a ciphertext.
func (p *Parameters) Slots() int { return p.MaxSlots() }

// Real tells whether slots are real numbers (conjugate-invariant ring).
func (p *Parameters) Real() bool { return p.RingType() == ring.ConjugateInvariant }

// Describe returns the literal and what follows from it, as JSON.
func (p *Parameters) Describe() []byte {
	text, err := json.Marshal(struct {
		Literal
		Slots    int     `json:"slots"`
		MaxLevel int     `json:"max_level"`
		LogQP    float64 `json:"log_qp"`
		ID       string  `json:"fingerprint"`
	}{p.Literal, p.Slots(), p.MaxLevel(), p.LogQP(), p.ID.String()})
	if err != nil {
		panic(err)
	}
	return text
}

func (p *Parameters) checkLevel(level int) error {
	if level < 0 || level > p.MaxLevel() {
		return failure(Level, "level %d: these parameters have levels 0 to %d", level, p.MaxLevel())
	}
	return nil
}

// same checks that two objects were made with equal parameters.
func (p *Parameters) same(other *Parameters) error {
	if p != other && p.ID != other.ID {
		return failure(Parameter, "objects of different parameters: %s and %s", p.ID, other.ID)
	}
	return nil
}
