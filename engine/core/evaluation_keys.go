package core

import (
	"slices"
	"sync"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
)

// EvaluationKeys hold what a server needs to multiply and rotate: a
// relinearisation key and Galois keys. They are generated seed-compressed, and
// expanded once, in place, when an evaluator first needs them. A key keeps its
// seed, so that it can always be written in half the bytes.
type EvaluationKeys struct {
	Params *Parameters
	ID     ID
	relin  *rlwe.RelinearizationKey
	galois map[uint64]*rlwe.GaloisKey

	lock     sync.Mutex // of expansion
	expanded bool
}

// KeyRequest asks for one Galois key, for ciphertexts up to a level.
type KeyRequest struct {
	Element uint64
	Level   int
}

// NewEvaluationKeys generates keys; relinLevel < 0 leaves the relinearisation key out.
func (sk *SecretKey) NewEvaluationKeys(requests []KeyRequest, relinLevel int) (*EvaluationKeys, error) {
	p := sk.Params
	keys := &EvaluationKeys{Params: p, ID: sk.ID, galois: map[uint64]*rlwe.GaloisKey{}}
	generator := rlwe.NewKeyGenerator(p.Parameters)
	at := func(level int) rlwe.EvaluationKeyParameters {
		return rlwe.EvaluationKeyParameters{LevelQ: &level, Compressed: true}
	}
	levels := map[uint64]int{}
	for _, request := range requests {
		if err := p.checkLevel(request.Level); err != nil {
			return nil, err
		}
		levels[request.Element] = max(levels[request.Element], request.Level)
	}
	elements := make([]uint64, 0, len(levels))
	for element := range levels {
		elements = append(elements, element)
	}
	slices.Sort(elements)
	generated := make([]*rlwe.GaloisKey, len(elements))
	if relinLevel >= 0 {
		if err := p.checkLevel(relinLevel); err != nil {
			return nil, err
		}
		keys.relin = generator.GenRelinearizationKeyNew(sk.SecretKey, at(relinLevel))
	}
	err := parallel(len(elements), func(i int) error {
		generated[i] = generator.GenGaloisKeyNew(elements[i], sk.SecretKey, at(levels[elements[i]]))
		return nil
	})
	for i, element := range elements {
		keys.galois[element] = generated[i]
	}
	return keys, err
}

// Expand makes the keys usable. Later calls do nothing.
func (keys *EvaluationKeys) Expand() error {
	keys.lock.Lock()
	defer keys.lock.Unlock()
	if keys.expanded {
		return nil
	}
	all := keys.list()
	err := parallel(len(all), func(i int) error {
		if !all[i].IsCompressed() {
			return nil
		}
		return all[i].Expand(keys.Params.Parameters, nil)
	})
	keys.expanded = err == nil
	return err
}

// list returns the keys in the order in which they are written: the
// relinearisation key, then the Galois keys by element.
func (keys *EvaluationKeys) list() (all []*rlwe.EvaluationKey) {
	if keys.relin != nil {
		all = append(all, &keys.relin.EvaluationKey)
	}
	for _, element := range keys.elements() {
		all = append(all, &keys.galois[element].EvaluationKey)
	}
	return all
}

func (keys *EvaluationKeys) elements() []uint64 {
	elements := make([]uint64, 0, len(keys.galois))
	for element := range keys.galois {
		elements = append(elements, element)
	}
	slices.Sort(elements)
	return elements
}

// Bytes is the memory that the keys take now.
func (keys *EvaluationKeys) Bytes() (total int) {
	keys.lock.Lock()
	defer keys.lock.Unlock()
	for _, key := range keys.list() {
		limbs := key.LevelQ() + key.LevelP() + 2
		total += len(key.Value) * (key.Degree() + 1) * limbs * keys.Params.N() * 8
	}
	return total
}

// Levels returns the level of every key: of the relinearisation key (-1 where
// there is none) and of each Galois element.
func (keys *EvaluationKeys) Levels() (relin int, galois map[uint64]int) {
	keys.lock.Lock()
	defer keys.lock.Unlock()
	relin, galois = -1, map[uint64]int{}
	if keys.relin != nil {
		relin = keys.relin.LevelQ()
	}
	for element, key := range keys.galois {
		galois[element] = key.LevelQ()
	}
	return relin, galois
}

// checkGalois checks that the automorphism can be applied at a level. Lattigo
// would use a key of a lower level without a word, and give a wrong result.
func (keys *EvaluationKeys) checkGalois(element uint64, level int, what string) error {
	if element == 1 {
		return nil
	}
	if keys == nil {
		return failure(Key, "%s: the evaluator has no evaluation keys", what)
	}
	key, ok := keys.galois[element]
	if !ok {
		return failure(Key, "%s: no Galois key for it (element %d)", what, element)
	}
	if key.LevelQ() < level {
		return failure(Key, "%s: its key serves up to level %d, the ciphertext is at level %d", what, key.LevelQ(), level)
	}
	return nil
}

func (keys *EvaluationKeys) checkRelin(level int) error {
	if keys == nil || keys.relin == nil {
		return failure(Key, "no relinearisation key")
	}
	if keys.relin.LevelQ() < level {
		return failure(Key, "the relinearisation key serves up to level %d, the ciphertext is at level %d", keys.relin.LevelQ(), level)
	}
	return nil
}
