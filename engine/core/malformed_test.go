package core

import (
	"bytes"
	"math"
	"math/big"
	"math/cmplx"
	"testing"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// TestAMalformedPublicKeyReadsWeights holds a limit that docs/security.md states, so that the document
// changes with the code. The server makes its fresh zeros under a public key that the client chose. With
// (-a s + e + Delta, a) a zero adds u Delta to what the client decrypts: it reads u, takes u a off the
// second component of a result, and has that of the product, which is linear in the weights.
func TestAMalformedPublicKeyReadsWeights(t *testing.T) {
	p := large(t)
	sk := must(NewSecretKey(p))
	delta := new(big.Int).Lsh(big.NewInt(1), 60)
	if worst := readWeights(t, p, sk, must(sk.PublicKey()), delta); worst < 1e6 {
		t.Errorf("with an honest public key, weights were read with an error of %g", worst)
	}
	if worst := readWeights(t, p, sk, malformed(t, p, sk, delta), delta); worst > 1e-6 {
		t.Errorf("this attack no longer reads weights (error %g): say so in docs/security.md", worst)
	}
}

// malformed returns a public key with delta added, as a server reads it.
func malformed(t *testing.T, p *Parameters, sk *SecretKey, delta *big.Int) *PublicKey {
	honest := must(sk.PublicKey())
	first := *honest.Value[0].CopyNew()
	add := new(big.Int).Mul(delta, new(big.Int).SetUint64(p.P()[0]))
	shift := func(rings []*ring.SubRing, limbs [][]uint64) {
		for i, r := range rings {
			m := ring.MForm(new(big.Int).Mod(add, new(big.Int).SetUint64(r.Modulus)).Uint64(), r.Modulus, r.BRedConstant)
			for j := range limbs[i] {
				limbs[i][j] = ring.CRed(limbs[i][j]+m, r.Modulus)
			}
		}
	}
	shift(p.RingQ().SubRings, first.Q.Coeffs)
	shift(p.RingP().SubRings, first.P.Coeffs)
	var wire bytes.Buffer
	if err := must(newPublicKey(p, first, honest.seed, sk.ID)).Write(&wire); err != nil {
		t.Fatal(err)
	}
	data := wire.Bytes()
	header := must(ParseHeader(data[:64], TypePublicKey, p))
	return must(Read(bytes.NewReader(data[64:]), data[:64], header, p)).(*PublicKey)
}

// readWeights multiplies an encryption of zero with secret weights, as a server does, and returns the
// greatest error of the weights that its client reads off the rerandomised result.
func readWeights(t *testing.T, p *Parameters, sk *SecretKey, pk *PublicKey, delta *big.Int) float64 {
	const level, constant = 3, uint64(1) << 35
	// The client sends (-K s, K).
	input := newCiphertext(p, sk.ID, 1, level, p.DefaultScale())
	for limb, r := range p.RingQ().SubRings[:level+1] {
		for j := range input.Value[1].Coeffs[limb] {
			input.Value[1].Coeffs[limb][j] = constant % r.Modulus
		}
	}
	p.RingQ().AtLevel(level).MulCoeffsMontgomeryThenSub(input.Value[1], sk.Value.Q, input.Value[0])

	e := must(NewEvaluator(p, nil))
	weights := noise(p.Slots())
	product := must(e.MulPlain(input, must(p.Encode(weights, level, primeScale(p, level))), nil))
	result := must(e.Rerandomize(must(e.Rescale(product, nil)), pk, 16))

	// The client reads u from what it decrypts, and computes u a as an encryptor does.
	rq := p.RingQ().AtLevel(result.Level())
	decrypted := *must(sk.Decrypt(result)).Value.CopyNew()
	rq.INTT(decrypted, decrypted)
	integers := make([]*big.Int, p.N())
	for i := range integers {
		integers[i] = new(big.Int)
	}
	rq.PolyToBigintCentered(decrypted, 1, integers)
	ringQP := p.RingQP().AtLevel(result.Level(), 0)
	zero := ringQP.NewPoly()
	for i, x := range integers {
		quotient, _ := new(big.Float).Quo(new(big.Float).SetInt(x), new(big.Float).SetInt(delta)).Float64()
		u := int64(math.Round(quotient))
		for limb, r := range p.RingQ().SubRings[:result.Level()+1] {
			zero.Q.Coeffs[limb][i] = uint64(u+int64(r.Modulus)) % r.Modulus
		}
		zero.P.Coeffs[0][i] = uint64(u+int64(p.P()[0])) % p.P()[0]
	}
	ringQP.NTT(zero, zero)
	ringQP.MulCoeffsMontgomery(zero, pk.Value[1], zero)
	ringQP.INTT(zero, zero)
	z1 := rq.NewPoly()
	ring.NewBasisExtender(p.RingQ(), p.RingP()).ModDownQPtoQ(result.Level(), 0, zero.Q, zero.P, z1)
	second := *result.Value[1].CopyNew()
	rq.INTT(second, second)
	rq.Sub(second, z1, second)

	// The second component of the product is K times the weights.
	found := NewPlaintext(p, result.Level(), must(NewScale(float64(constant))))
	rq.NTT(second, found.Value)
	worst := 0.0
	for i, read := range must(found.Decode(0)) {
		if i < len(weights) {
			worst = max(worst, cmplx.Abs(read-weights[i]))
		}
	}
	return worst
}
