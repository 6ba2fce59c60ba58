package core

import (
	"io"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
)

const (
	seedSize  = 32
	scaleSize = 20
	// maxBatch bounds how many ciphertexts one refresh carries.
	maxBatch = 4096
)

// Object is what can be written as a frame.
type Object interface{ Write(io.Writer) error }

// limit is the greatest payload that a type can have under the parameters.
func (t Type) limit(p *Parameters) uint64 {
	if t == TypeParameters || p == nil {
		return 1 << 16
	}
	polynomial := packedSize(p.RingQ().SubRings)
	extended := polynomial + packedSize(p.RingP().SubRings)
	key := uint64(p.MaxLevel()+1)*extended + seedSize + 16
	switch t {
	case TypeSecretKey:
		return uint64(p.N()) / 4
	case TypePublicKey:
		return extended + seedSize
	case TypeEvaluationKeys:
		return 8 + key*(uint64(2*p.N())+1)
	case TypePlaintext, TypeCiphertext:
		return 3*polynomial + seedSize + scaleSize + 8
	case TypeRefreshRequest, TypeRefreshReply:
		return 8 + maxBatch*(1+2*polynomial+seedSize)
	default:
		return 1 << 40 // bootstrapping keys, of parameters of their own
	}
}

// Write writes the literal as JSON.
func (p *Parameters) Write(to io.Writer) error {
	text := p.Describe()
	return writeFrame(to, Header{Type: TypeParameters, Params: p.ID}, uint64(len(text)), func(out *encoder) { out.bytes(text) })
}

// Write writes the coefficients, 2 bits each.
func (sk *SecretKey) Write(to io.Writer) error {
	p := sk.Params
	r := p.RingQ().SubRings[0]
	residues := make([]uint64, p.N())
	r.IMForm(sk.Value.Q.Coeffs[0], residues)
	r.INTT(residues, residues)
	packed := make([]byte, p.N()/4)
	for i, residue := range residues {
		code := residue // 0 and 1 as they are, -1 as 2
		if residue == r.Modulus-1 {
			code = 2
		} else if residue > 1 {
			return failure(Internal, "a secret key that is not ternary")
		}
		packed[i/4] |= byte(code << (2 * (i % 4)))
	}
	h := Header{Type: TypeSecretKey, Params: p.ID, Key: sk.ID}
	return writeFrame(to, h, uint64(len(packed)), func(out *encoder) { out.bytes(packed) })
}

func readSecretKey(in *decoder, p *Parameters, h Header) (any, error) {
	packed := make([]byte, p.N()/4)
	in.bytes(packed)
	key := rlwe.NewSecretKey(p.Parameters)
	ternary := func(rings []*ring.SubRing, out ring.Poly) {
		for limb, r := range rings {
			for i := range out.Coeffs[limb] {
				switch packed[i/4] >> (2 * (i % 4)) & 3 {
				case 1:
					out.Coeffs[limb][i] = 1
				case 2:
					out.Coeffs[limb][i] = r.Modulus - 1
				case 3:
					in.fail("a secret key that is not ternary")
				}
			}
		}
	}
	ternary(p.RingQ().SubRings, key.Value.Q)
	ternary(p.RingP().SubRings, key.Value.P)
	extended := p.RingQP()
	extended.NTT(key.Value, key.Value)
	extended.MForm(key.Value, key.Value)
	return secretKeyFrom(p, key, h.Key), nil
}

// Write writes the first component and the seed of the second.
func (pk *PublicKey) Write(to io.Writer) error {
	p := pk.Params
	size := packedSize(p.RingQ().SubRings) + packedSize(p.RingP().SubRings) + seedSize
	return writeFrame(to, Header{Type: TypePublicKey, Params: p.ID, Key: pk.ID}, size, func(out *encoder) {
		out.bytes(pk.seed[:])
		out.limbs(p.RingQ().SubRings, pk.Value[0].Q.Coeffs)
		out.limbs(p.RingP().SubRings, pk.Value[0].P.Coeffs)
	})
}

func readPublicKey(in *decoder, p *Parameters, h Header) (any, error) {
	var seed [seedSize]byte
	in.bytes(seed[:])
	first := p.RingQP().NewPoly()
	in.limbs(p.RingQ().SubRings, first.Q.Coeffs)
	in.limbs(p.RingP().SubRings, first.P.Coeffs)
	if in.err != nil {
		return nil, in.err
	}
	return newPublicKey(p, first, seed, h.Key)
}

// Write writes the first components and the seeds.
func (keys *EvaluationKeys) Write(to io.Writer) error {
	p := keys.Params
	keys.lock.Lock()
	defer keys.lock.Unlock()
	size := uint64(8)
	all := keys.list()
	for _, key := range all {
		size += 16 + evaluationKeySize(p, key.LevelQ())
	}
	h := Header{Type: TypeEvaluationKeys, Params: p.ID, Key: keys.ID}
	return writeFrame(to, h, size, func(out *encoder) {
		out.u32(uint32(len(all)))
		out.u32(0)
		elements := keys.elements()
		if keys.relin != nil {
			elements = append([]uint64{0}, elements...) // element 0 stands for the relinearisation key
		}
		for i, key := range all {
			out.entry(p, elements[i], key)
		}
	})
}

// entry writes one key of many, with its name.
func (out *encoder) entry(p *Parameters, element uint64, key *rlwe.EvaluationKey) {
	out.u64(element)
	out.u64(uint64(key.LevelQ()))
	out.evaluationKey(p, key)
}

func evaluationKeySize(p *Parameters, level int) uint64 {
	digits := p.BaseRNSDecompositionVectorSize(level, p.MaxLevelP())
	return seedSize + uint64(digits)*(packedSize(p.RingQ().SubRings[:level+1])+packedSize(p.RingP().SubRings))
}

func (out *encoder) evaluationKey(p *Parameters, key *rlwe.EvaluationKey) {
	out.bytes(key.Seed[:])
	for _, digit := range key.Value {
		out.limbs(p.RingQ().SubRings[:key.LevelQ()+1], digit[0][0].Q.Coeffs)
		out.limbs(p.RingP().SubRings, digit[0][0].P.Coeffs)
	}
}

func (in *decoder) evaluationKey(p *Parameters, level int) *rlwe.EvaluationKey {
	if !in.need(evaluationKeySize(p, level)) {
		return nil
	}
	key := rlwe.NewEvaluationKey(p.Parameters, rlwe.EvaluationKeyParameters{LevelQ: &level, Compressed: true})
	key.Seed = new([seedSize]byte)
	in.bytes(key.Seed[:])
	for _, digit := range key.Value {
		in.limbs(p.RingQ().SubRings[:level+1], digit[0][0].Q.Coeffs)
		in.limbs(p.RingP().SubRings, digit[0][0].P.Coeffs)
	}
	return key
}

func readEvaluationKeys(in *decoder, p *Parameters, h Header) (any, error) {
	keys := &EvaluationKeys{Params: p, ID: h.Key, galois: map[uint64]*rlwe.GaloisKey{}}
	count, root, last := in.u32(), p.RingQ().NthRoot(), uint64(0)
	if in.u32() != 0 || uint64(count) > root/2+1 {
		in.fail("%d evaluation keys", count)
	}
	for i := range count {
		element, level := in.u64(), in.u64()
		relin := i == 0 && element == 0
		if !relin && (element <= last || element >= root || element%2 == 0) || level > uint64(p.MaxLevel()) {
			in.fail("an evaluation key of element %d and level %d", element, level)
		}
		if in.err != nil {
			return nil, in.err
		}
		key := in.evaluationKey(p, int(level))
		if in.err != nil {
			return nil, in.err
		}
		if relin {
			keys.relin = &rlwe.RelinearizationKey{EvaluationKey: *key}
			continue
		}
		last = element
		keys.galois[element] = &rlwe.GaloisKey{GaloisElement: element, NthRoot: root, EvaluationKey: *key}
	}
	return keys, in.err
}

func (out *encoder) scale(scale rlwe.Scale) {
	high, low, exponent := scaleParts(scale)
	out.u64(high)
	out.u64(low)
	out.u32(uint32(int32(exponent)))
}

func (in *decoder) scale() rlwe.Scale {
	high, low, exponent := in.u64(), in.u64(), int(int32(in.u32()))
	if in.err != nil {
		return rlwe.NewScale(1)
	}
	scale, err := scaleFrom(high, low, exponent)
	if err != nil {
		in.err = err
		return rlwe.NewScale(1)
	}
	return scale
}

// Write writes level, scale and residues.
func (pt *Plaintext) Write(to io.Writer) error {
	rings := pt.Params.RingQ().SubRings[:pt.Level()+1]
	size := 8 + scaleSize + packedSize(rings)
	return writeFrame(to, Header{Type: TypePlaintext, Params: pt.Params.ID}, size, func(out *encoder) {
		out.u64(uint64(pt.Level()))
		out.scale(pt.Scale)
		out.limbs(rings, pt.Value.Coeffs)
	})
}

func (in *decoder) level(p *Parameters) int {
	level := in.u64()
	if level > uint64(p.MaxLevel()) {
		in.fail("level %d", level)
		return 0
	}
	return int(level)
}

func readPlaintext(in *decoder, p *Parameters, _ Header) (any, error) {
	level, scale := in.level(p), in.scale()
	rings := p.RingQ().SubRings[:level+1]
	if !in.need(packedSize(rings)) {
		return nil, in.err
	}
	plaintext := NewPlaintext(p, level, scale)
	in.limbs(rings, plaintext.Value.Coeffs)
	return plaintext, in.err
}

// Write writes the residues, or the seed for the component that it generates. Of a
// rounded ciphertext it writes the coefficients without the bits that they lost.
func (ct *Ciphertext) Write(to io.Writer) error {
	p, rings := ct.Params, ct.Params.RingQ().SubRings[:ct.Level()+1]
	kind, components, size := ct.Degree(), ct.Value, uint64(8+scaleSize)
	if ct.Seed != nil && ct.Degree() == 1 {
		kind, components, size = 0, ct.Value[:1], size+seedSize
	}
	for i := range components {
		if ct.rounding == (rounding{}) {
			size += packedSize(rings)
		} else {
			size += newGrid(p, 0, ct.rounding[i]).size(p.N())
		}
	}
	h := Header{Type: TypeCiphertext, Params: p.ID, Key: ct.Key}
	return writeFrame(to, h, size, func(out *encoder) {
		out.bytes([]byte{byte(kind), ct.rounding[0], ct.rounding[1], 0})
		out.u32(uint32(ct.Level()))
		out.scale(ct.Scale)
		if kind == 0 {
			out.bytes(ct.Seed[:])
		}
		for i, polynomial := range components {
			if ct.rounding == (rounding{}) {
				out.limbs(rings, polynomial.Coeffs)
			} else {
				out.rounded(ct, i)
			}
		}
	})
}

func readCiphertext(in *decoder, p *Parameters, h Header) (any, error) {
	kind, rounded, padding := in.u8(), rounding{byte(in.u8()), byte(in.u8())}, in.u8()
	level := in.u32()
	if kind > 2 || padding != 0 || level > uint32(p.MaxLevel()) {
		in.fail("a ciphertext of kind %d at level %d", kind, level)
	}
	scale := in.scale()
	if in.err != nil {
		return nil, in.err
	}
	if rounded != (rounding{}) {
		return in.roundedCiphertext(p, h.Key, kind, int(level), rounded, scale)
	}
	if kind == 0 {
		return in.seeded(p, h.Key, int(level), scale)
	}
	rings := p.RingQ().SubRings[:level+1]
	if !in.need(uint64(kind+1) * packedSize(rings)) {
		return nil, in.err
	}
	ct := newCiphertext(p, h.Key, kind, int(level), scale)
	for _, polynomial := range ct.Value {
		in.limbs(rings, polynomial.Coeffs)
	}
	return ct, in.err
}

func (in *decoder) roundedCiphertext(p *Parameters, key ID, kind, level int, r rounding, scale rlwe.Scale) (any, error) {
	if err := r.check(p, level, kind == 0); err != nil || kind > 1 {
		in.fail("a rounded ciphertext of kind %d at level %d that lost %d and %d bits", kind, level, r[0], r[1])
		return nil, in.err
	}
	if !in.need(newGrid(p, 0, r[0]).size(p.N())) {
		return nil, in.err
	}
	ct := newCiphertext(p, key, 1, level, scale)
	ct.rounding = r
	if kind == 0 {
		ct.Seed = new([seedSize]byte)
		in.bytes(ct.Seed[:])
		in.rounded(ct, 0)
		if in.err != nil {
			return nil, in.err
		}
		return ct, expandSeed(p, *ct.Seed, ct.Value[1])
	}
	in.rounded(ct, 0)
	in.rounded(ct, 1)
	return ct, in.err
}

func (in *decoder) seeded(p *Parameters, key ID, level int, scale rlwe.Scale) (*Ciphertext, error) {
	rings := p.RingQ().SubRings[:level+1]
	if !in.need(seedSize + packedSize(rings)) {
		return nil, in.err
	}
	ct := newCiphertext(p, key, 1, level, scale)
	ct.Seed = new([seedSize]byte)
	in.bytes(ct.Seed[:])
	in.limbs(rings, ct.Value[0].Coeffs)
	if in.err != nil {
		return nil, in.err
	}
	return ct, expandSeed(p, *ct.Seed, ct.Value[1])
}
