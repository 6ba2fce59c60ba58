package core

import (
	"io"
	"slices"

	"github.com/tuneinsight/lattigo/v6/circuits/ckks/bootstrapping"
	"github.com/tuneinsight/lattigo/v6/core/rlwe"
)

// bootstrappingLiterals are circuits by ring degree: for 2^15 the one that the
// library names N15QP880H16384H32, for 2^16 its default, which suits a scale of 2^40.
// The moduli that they add count against the security limit. The secret stays dense;
// the modulus is raised under an ephemeral sparse one (Bossuat et al., ACNS 2022).
func bootstrappingLiteral(logN int) (bootstrapping.ParametersLiteral, error) {
	literal := bootstrapping.ParametersLiteral{LogN: &logN, Xs: rlwe.DefaultXs, Xe: rlwe.DefaultXe}
	switch logN {
	case 15:
		scale := 55
		literal.LogP = []int{56, 56}
		literal.SlotsToCoeffsFactorizationDepthAndLogScales = [][]int{{30, 30}}
		literal.CoeffsToSlotsFactorizationDepthAndLogScales = [][]int{{52}, {52}}
		literal.EvalModLogScale = &scale
	case 16:
	default:
		return literal, failure(Parameter, "bootstrapping needs a ring degree of 2^15 or 2^16, not 2^%d", logN)
	}
	return literal, nil
}

func bootstrappingParameters(p *Parameters) (bootstrapping.Parameters, error) {
	var none bootstrapping.Parameters
	if p.Real() {
		return none, failure(Parameter, "bootstrapping works in the standard ring")
	}
	literal, err := bootstrappingLiteral(p.LogN())
	if err != nil {
		return none, err
	}
	circuit, err := bootstrapping.NewParametersFromLiteral(p.Parameters, literal)
	if err != nil {
		return none, failure(Parameter, "bootstrapping: %v", err)
	}
	return circuit, checkSecurity(circuit.BootstrappingParameters)
}

// BootstrappingKeys are the evaluation keys of the bootstrapping circuit: gigabytes.
type BootstrappingKeys struct {
	Params  *Parameters
	ID      ID
	circuit bootstrapping.Parameters
	keys    *bootstrapping.EvaluationKeys
}

// BootstrappingKeys generates the keys.
func (sk *SecretKey) BootstrappingKeys() (*BootstrappingKeys, error) {
	circuit, err := bootstrappingParameters(sk.Params)
	if err != nil {
		return nil, err
	}
	keys, _, err := circuit.GenEvaluationKeys(sk.SecretKey)
	if err != nil {
		return nil, failure(Parameter, "bootstrapping: %v", err)
	}
	return &BootstrappingKeys{sk.Params, sk.ID, circuit, keys}, nil
}

// Bootstrapper raises ciphertexts to the highest level without the client.
type Bootstrapper struct {
	params    *Parameters
	id        ID
	evaluator *bootstrapping.Evaluator
}

// NewBootstrapper prepares the circuit, its matrices among others.
func NewBootstrapper(keys *BootstrappingKeys) (*Bootstrapper, error) {
	evaluator, err := bootstrapping.NewEvaluator(keys.circuit, keys.keys)
	if err != nil {
		return nil, failure(Parameter, "bootstrapping: %v", err)
	}
	return &Bootstrapper{keys.Params, keys.ID, evaluator}, nil
}

// Bootstrap returns the ciphertext at the highest level. Values must be small
// against q[0] over the scale; the input may be at any level.
func (b *Bootstrapper) Bootstrap(a *Ciphertext) (*Ciphertext, error) {
	if err := b.params.same(a.Params); err != nil {
		return nil, err
	}
	if a.Key != b.id {
		return nil, failure(Key, "a ciphertext under key %s, bootstrapping keys of key %s", a.Key, b.id)
	}
	result, err := b.evaluator.Bootstrap(a.CopyNew())
	if err != nil {
		return nil, failure(Level, "bootstrapping: %v", err)
	}
	return &Ciphertext{Ciphertext: result, Params: b.params, Key: a.Key}, nil
}

// list gives the switching keys and the Galois keys by element.
func (k *BootstrappingKeys) list() (elements []uint64, all []*rlwe.EvaluationKey) {
	elements = make([]uint64, 3)
	all = []*rlwe.EvaluationKey{k.keys.EvkDenseToSparse, k.keys.EvkSparseToDense, &k.keys.RelinearizationKey.EvaluationKey}
	for element := range k.keys.GaloisKeys {
		elements = append(elements, element)
	}
	slices.Sort(elements[3:])
	for _, element := range elements[3:] {
		all = append(all, &k.keys.GaloisKeys[element].EvaluationKey)
	}
	return elements, all
}

// Bytes is the memory that the keys take.
func (k *BootstrappingKeys) Bytes() (total int) {
	_, all := k.list()
	for _, key := range all {
		total += len(key.Value) * 2 * (key.LevelQ() + key.LevelP() + 2) * k.Params.N() * 8
	}
	return total
}

// Write writes the keys whole: the library does not compress these.
func (k *BootstrappingKeys) Write(to io.Writer) error {
	elements, all := k.list()
	size := uint64(8)
	for _, key := range all {
		size += 16 + k.size(key.LevelQ(), key.LevelP())
	}
	h := Header{Type: TypeBootstrappingKeys, Params: k.Params.ID, Key: k.ID}
	return writeFrame(to, h, size, func(out *encoder) {
		out.u64(uint64(len(all)))
		for i, key := range all {
			out.u64(elements[i])
			out.u32(uint32(key.LevelQ()))
			out.u32(uint32(key.LevelP()))
			k.components(key, out.limbs)
		}
	})
}

// size is the packed bytes of a key at its levels.
func (k *BootstrappingKeys) size(levelQ, levelP int) uint64 {
	p := k.circuit.BootstrappingParameters
	digits := p.BaseRNSDecompositionVectorSize(levelQ, levelP)
	return 2 * uint64(digits) * (packedSize(p.RingQ().SubRings[:levelQ+1]) + packedSize(p.RingP().SubRings[:levelP+1]))
}

func (k *BootstrappingKeys) components(key *rlwe.EvaluationKey, visit limbVisitor) {
	p := k.circuit.BootstrappingParameters
	for _, digit := range key.Value {
		for _, component := range digit[0] {
			visit(p.RingQ().SubRings[:key.LevelQ()+1], component.Q.Coeffs)
			visit(p.RingP().SubRings[:key.LevelP()+1], component.P.Coeffs)
		}
	}
}

func readBootstrappingKeys(in *decoder, params *Parameters, h Header) (any, error) {
	circuit, err := bootstrappingParameters(params)
	if err != nil {
		return nil, err
	}
	keys := &bootstrapping.EvaluationKeys{MemEvaluationKeySet: rlwe.NewMemEvaluationKeySet(nil)}
	k := &BootstrappingKeys{params, h.Key, circuit, keys}
	p := circuit.BootstrappingParameters
	count, root, last := in.u64(), p.RingQ().NthRoot(), uint64(0)
	if count < 3 || count > root/2+3 {
		in.fail("%d bootstrapping keys", count)
	}
	for i := range count {
		element, levelQ, levelP := in.u64(), in.u32(), in.u32()
		galois := i >= 3
		if galois && (element <= last || element >= root || element%2 == 0) || !galois && element != 0 ||
			levelQ > uint32(p.MaxLevelQ()) || levelP > uint32(p.MaxLevelP()) {
			in.fail("a bootstrapping key of element %d and levels %d, %d", element, levelQ, levelP)
		}
		if in.err != nil || !in.need(k.size(int(levelQ), int(levelP))) {
			return nil, in.err
		}
		q, special := int(levelQ), int(levelP)
		key := rlwe.NewEvaluationKey(p, rlwe.EvaluationKeyParameters{LevelQ: &q, LevelP: &special})
		k.components(key, in.limbs)
		switch i {
		case 0:
			keys.EvkDenseToSparse = key
		case 1:
			keys.EvkSparseToDense = key
		case 2:
			keys.RelinearizationKey = &rlwe.RelinearizationKey{EvaluationKey: *key}
		default:
			last = element
			keys.GaloisKeys[element] = &rlwe.GaloisKey{GaloisElement: element, NthRoot: root, EvaluationKey: *key}
		}
	}
	return k, in.err
}

// KeyID names the key that the keys belong to.
func (k *BootstrappingKeys) KeyID() ID { return k.ID }
