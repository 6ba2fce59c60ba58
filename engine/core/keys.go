package core

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/ring/ringqp"
	"github.com/tuneinsight/lattigo/v6/schemes/ckks"
	"github.com/tuneinsight/lattigo/v6/utils/sampling"
)

// SecretKey decrypts. ID is a random name, not computed from the key: it says
// which key an object belongs to and nothing else.
type SecretKey struct {
	*rlwe.SecretKey
	Params    *Parameters
	ID        ID
	decryptor *rlwe.Decryptor
	zeros     stock[*Ciphertext] // of encryptZero, at the highest level
}

// PublicKey encrypts.
type PublicKey struct {
	*rlwe.PublicKey
	Params    *Parameters
	ID        ID
	seed      [32]byte
	encryptor *rlwe.Encryptor
	covers    stock[*cover]
}

// NewSecretKey samples a key.
func NewSecretKey(p *Parameters) (*SecretKey, error) {
	var id ID
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	return secretKeyFrom(p, rlwe.NewKeyGenerator(p.Parameters).GenSecretKeyNew(), id), nil
}

func secretKeyFrom(p *Parameters, key *rlwe.SecretKey, id ID) *SecretKey {
	return &SecretKey{SecretKey: key, Params: p, ID: id, decryptor: rlwe.NewDecryptor(p.Parameters, key)}
}

// PublicKey makes a public key. The library's compressed evaluation key that takes
// the zero key to this one is made of seeded encryptions of zero modulo QP: the
// first of them is a public key whose uniform part has a seed.
func (sk *SecretKey) PublicKey() (*PublicKey, error) {
	p := sk.Params
	zero := rlwe.NewSecretKey(p.Parameters)
	switching := rlwe.NewKeyGenerator(p.Parameters).GenEvaluationKeyNew(zero, sk.SecretKey,
		rlwe.EvaluationKeyParameters{Compressed: true})
	return newPublicKey(p, switching.Value[0][0][0], *switching.Seed, sk.ID)
}

// newPublicKey makes the key of a first component and the seed of the second.
func newPublicKey(p *Parameters, first ringqp.Poly, seed [32]byte, id ID) (*PublicKey, error) {
	compressed := rlwe.NewEvaluationKey(p.Parameters, rlwe.EvaluationKeyParameters{Compressed: true})
	compressed.Value = compressed.Value[:1]
	compressed.Value[0][0] = rlwe.VectorQP{first}
	compressed.Seed = &seed
	if err := compressed.Expand(p.Parameters, nil); err != nil {
		return nil, err
	}
	key := &rlwe.PublicKey{Value: compressed.Value[0][0]}
	return &PublicKey{PublicKey: key, Params: p, ID: id, seed: seed, encryptor: ckks.NewEncryptor(p.Parameters, key)}, nil
}

// Encrypt encrypts a plaintext under the public key.
func (pk *PublicKey) Encrypt(plaintext *Plaintext) (*Ciphertext, error) {
	if err := pk.Params.same(plaintext.Params); err != nil {
		return nil, err
	}
	ciphertext, err := pk.encryptor.EncryptNew(plaintext.Plaintext)
	return &Ciphertext{Ciphertext: ciphertext, Params: pk.Params, Key: pk.ID}, err
}

// Encrypt encrypts a plaintext under the secret key; the result is seeded.
func (sk *SecretKey) Encrypt(plaintext *Plaintext) (*Ciphertext, error) {
	if err := sk.Params.same(plaintext.Params); err != nil {
		return nil, err
	}
	ciphertext, err := sk.encryptZero(plaintext.Level())
	if err != nil {
		return nil, err
	}
	ringQ := sk.Params.RingQ().AtLevel(plaintext.Level())
	ringQ.Add(ciphertext.Value[0], plaintext.Value, ciphertext.Value[0])
	*ciphertext.MetaData = *plaintext.MetaData
	return ciphertext, nil
}

// encryptZero makes a seeded encryption of zero (e - a*s, a) with a expanded from a
// random seed. Lattigo does this for evaluation keys but its encryptor does not
// export it for ciphertexts, so its samplers are put together here exactly as its
// encryptor does: a uniform in the NTT domain, e from the error distribution of the
// parameters, s in NTT and Montgomery form.
func (sk *SecretKey) encryptZero(level int) (*Ciphertext, error) {
	p := sk.Params
	system, err := sampling.NewPRNG()
	if err != nil {
		return nil, err
	}
	var seed [32]byte
	if _, err := system.Read(seed[:]); err != nil {
		return nil, err
	}
	ciphertext := newCiphertext(p, sk.ID, 1, level, p.DefaultScale())
	errors, err := ring.NewSampler(system, p.RingQ(), p.Xe(), false)
	if err != nil {
		return nil, err
	}
	rings, c0, c1 := p.RingQ().SubRings, ciphertext.Value[0].Coeffs, ciphertext.Value[1].Coeffs
	err = parallel(level+2, func(job int) error {
		if job > 0 {
			return expandLimb(rings[job-1], seed, job-1, c1[job-1])
		}
		errors.AtLevel(level).Read(ciphertext.Value[0])
		return nil
	})
	if err != nil {
		return nil, err
	}
	ciphertext.Seed = &seed
	return ciphertext, parallel(level+1, func(i int) error {
		p.forward(i, c0[i])
		rings[i].MulCoeffsMontgomeryThenSub(c1[i], sk.Value.Q.Coeffs[i], c0[i])
		return nil
	})
}

// zero returns a seeded encryption of zero that served nothing else. Those that were made
// ahead of time lose the primes above the level: seeds are expanded for each prime apart.
func (sk *SecretKey) zero(level int) (*Ciphertext, error) {
	zero, ok := sk.zeros.take()
	if !ok {
		return sk.encryptZero(level)
	}
	zero.Resize(1, level)
	return zero, nil
}

// expandSeed writes the uniform polynomial that a ciphertext's seed stands for.
func expandSeed(p *Parameters, seed [32]byte, polynomial ring.Poly) error {
	return parallel(len(polynomial.Coeffs), func(limb int) error {
		return expandLimb(p.RingQ().SubRings[limb], seed, limb, polynomial.Coeffs[limb])
	})
}

// expandLimb writes a seed's uniform residues modulo one prime, from AES-256 in counter mode
// with the seed, which is public, as its key. FrodoKEM expands its matrix with AES-128 alike,
// and TFHE-rs its seeds. Where processors have AES, that is far faster than the library's
// BLAKE2Xb, which expands evaluation keys. The first half of the counter is the prime's
// number: threads share the work, and no block serves twice.
func expandLimb(r *ring.SubRing, seed [32]byte, limb int, residues []uint64) error {
	block, err := aes.NewCipher(seed[:])
	if err != nil {
		return err
	}
	var counter [aes.BlockSize]byte
	binary.BigEndian.PutUint64(counter[:], uint64(limb))
	generator := keyStream{cipher.NewCTR(block, counter[:])}
	one := &ring.Ring{SubRings: []*ring.SubRing{r}} // a ring of one prime, as the sampler needs it
	ring.NewUniformSampler(generator, one).Read(ring.Poly{Coeffs: [][]uint64{residues}})
	return nil
}

// keyStream is a stream cipher's key stream, as a sampler reads it.
type keyStream struct{ cipher.Stream }

func (k keyStream) Read(out []byte) (int, error) {
	clear(out)
	k.XORKeyStream(out, out)
	return len(out), nil
}

// Decrypt returns the plaintext of a ciphertext.
func (sk *SecretKey) Decrypt(ct *Ciphertext) (*Plaintext, error) {
	if err := sk.owns(ct); err != nil {
		return nil, err
	}
	return &Plaintext{sk.decryptor.DecryptNew(ct.Ciphertext), sk.Params}, nil
}

func (sk *SecretKey) owns(ct *Ciphertext) error {
	if err := sk.Params.same(ct.Params); err != nil {
		return err
	}
	if sk.ID != ct.Key {
		return failure(Key, "a ciphertext of another key: %s, not %s", ct.Key, sk.ID)
	}
	return nil
}
