package core

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync/atomic"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/utils/sampling"
)

// maxShift bounds the division that a refresh may do on the way.
const maxShift = 60

// RefreshRequest is what a server sends to have ciphertexts refreshed: each
// encrypts m + r modulo Q for a mask r that is uniform modulo Q. It carries no
// scale and nothing else that depends on what the server computes.
type RefreshRequest struct {
	Params *Parameters
	Key    ID
	Level  int            // of the masked ciphertexts
	To     int            // the level to encrypt at
	Shift  uint           // the client divides by 2^Shift
	Masked [][2]ring.Poly // residues in NTT form, or digits of coefficients: see grids
}

// grids are where the coefficients of each component lie, or nothing where they are not
// rounded: that follows from level and shift alone. After the division by 2^Shift the error
// of rounding is at most 0.3 times that of a rescaling, in any ring.
//
// A rescaling rounds to integers, r0 + r1 s, and the second term is by far the greater:
// of N coefficients of the secret s, 2/3 are not zero. Rounding to multiples of
// 2^(Shift-2) makes a fourth of that. The first component, without the factor s, loses
// half of log2(N) bits more, less one bit, for about half the error of the second.
func (r *RefreshRequest) grids() []*grid {
	if r.Level >= roundedLevels || r.Shift < 2 {
		return nil
	}
	second := int(r.Shift) - 2
	first := second + (r.Params.LogN()-2)/2
	grids := make([]*grid, 2)
	for i, dropped := range [2]int{first, second} {
		// Something must be left, however absurd the shift.
		grids[i] = newGrid(r.Params, r.Level, uint8(min(dropped, maxShift, r.Params.RingQ().ModulusAtLevel[r.Level].BitLen()-2)))
	}
	return grids
}

// RefreshReply is the client's answer: fresh seeded encryptions of (m + r) / 2^Shift.
type RefreshReply struct {
	Params *Parameters
	Key    ID
	Fresh  []*Ciphertext
}

// RefreshMask is what the server keeps to take the masks off again. It serves once.
type RefreshMask struct {
	params  *Parameters
	key     ID
	to      int
	masks   []ring.Poly // r / 2^shift modulo the primes up to to, in NTT form, when lifted is closed
	scales  []rlwe.Scale
	lifted  chan struct{}
	failed  error // of lifting
	removed atomic.Bool
}

// Count is the number of ciphertexts that the mask is for.
func (m *RefreshMask) Count() int { return len(m.masks) }

// Mask is the server's first half of a refresh. To c0 goes a mask r, uniform
// modulo Q = q[0]...q[level]: what the client decrypts is uniform whatever the
// message is. To both components goes a fresh encryption of zero: c1 of a computed
// ciphertext is a linear function of polynomials that the client knows, and would
// give away what was multiplied with it; with the u*a + e of a public-key
// encryption added it is an RLWE sample whose secret u nobody but the server knew.
func (e *Evaluator) Mask(inputs []*Ciphertext, pk *PublicKey, level, to int, shift uint) (*RefreshRequest, *RefreshMask, error) {
	p := e.Params
	if err := e.own(true, inputs...); err != nil {
		return nil, nil, err
	}
	if err := p.same(pk.Params); err != nil {
		return nil, nil, err
	}
	if err := p.checkLevel(to); err != nil {
		return nil, nil, err
	}
	if err := p.checkLevel(level); err != nil {
		return nil, nil, err
	}
	if len(inputs) > maxBatch {
		return nil, nil, failure(Invalid, "a refresh of at most %d ciphertexts, not %d", maxBatch, len(inputs))
	}
	if shift > maxShift {
		return nil, nil, failure(Invalid, "a refresh divides by 2^0 to 2^%d, not 2^%d", maxShift, shift)
	}
	request := &RefreshRequest{p, pk.ID, level, to, shift, make([][2]ring.Poly, len(inputs))}
	mask := &RefreshMask{params: p, key: pk.ID, to: to, masks: make([]ring.Poly, len(inputs)), scales: make([]rlwe.Scale, len(inputs)), lifted: make(chan struct{})}
	divisor := rlwe.NewScale(uint64(1) << shift)
	for i, input := range inputs {
		if input.Key != pk.ID {
			return nil, nil, failure(Key, "a ciphertext under key %s, a public key of key %s", input.Key, pk.ID)
		}
		if input.Level() < level {
			return nil, nil, failure(Level, "a ciphertext at level %d cannot be masked at level %d", input.Level(), level)
		}
		mask.scales[i] = input.Scale.Div(divisor)
	}
	drawn := make([]ring.Poly, len(inputs))
	err := parallel(len(inputs), func(i int) error {
		cover, err := pk.cover(level)
		if err == nil {
			drawn[i], request.Masked[i] = cover.mask, cover.zero
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	grids := request.grids()
	err = parallel(2*len(inputs), func(job int) error {
		i, component := job/2, job%2
		masked := request.Masked[i][component].Coeffs
		for limb, residues := range masked {
			r, input := p.RingQ().SubRings[limb], inputs[i].Value[component].Coeffs[limb]
			if component == 0 {
				r.Add(residues, drawn[i].Coeffs[limb], residues)
			}
			if grids == nil {
				p.forward(limb, residues)
			} else {
				input = slices.Clone(input)
				p.backward(limb, input)
			}
			r.Add(residues, input, residues)
		}
		if grids != nil {
			grids[component].round(masked)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	// There is time for the rest while the client works.
	go func() {
		defer close(mask.lifted)
		mask.failed = protected(func() error { return mask.lift(drawn, level, shift) })
		pk.covers.fill(len(inputs), func() (*cover, error) { return pk.newCover(level) })
	}()
	return request, mask, nil
}

// lift brings the masks to where the client's answer will be.
func (m *RefreshMask) lift(drawn []ring.Poly, level int, shift uint) error {
	p := m.params
	convert := newCentred(p.RingQ(), level, m.to, shift)
	for i, r := range drawn {
		m.masks[i] = p.RingQ().AtLevel(m.to).NewPoly()
		if err := errors.Join(convert.convert(r, m.masks[i]), p.each(m.masks[i], p.forward)); err != nil {
			return err
		}
	}
	return nil
}

// cover is what hides one ciphertext from the client: a mask, uniform modulo Q, and an
// encryption of zero, both in coefficients.
type cover struct {
	mask ring.Poly
	zero [2]ring.Poly
}

// cover returns a cover that nothing else was hidden with.
func (pk *PublicKey) cover(level int) (*cover, error) {
	for {
		ready, ok := pk.covers.take()
		if !ok {
			return pk.newCover(level)
		}
		if ready.mask.Level() == level {
			return ready, nil
		}
	}
}

// newCover makes a mask and a zero, which take equally long, on two threads.
func (pk *PublicKey) newCover(level int) (*cover, error) {
	p := pk.Params
	system, err := sampling.NewPRNG()
	if err != nil {
		return nil, err
	}
	r := p.RingQ().AtLevel(level).NewPoly()
	masked := newCiphertext(p, pk.ID, 1, level, p.DefaultScale()).Ciphertext
	masked.IsNTT = false // the mask comes in first
	return &cover{r, [2]ring.Poly{masked.Value[0], masked.Value[1]}}, parallel(2, func(job int) error {
		if job == 1 {
			return pk.encryptor.EncryptZero(masked)
		}
		ring.NewUniformSampler(system, p.RingQ()).AtLevel(level).Read(r)
		return nil
	})
}

// Refresh is the client's half: decrypt to integers, divide, encrypt again.
func (sk *SecretKey) Refresh(request *RefreshRequest) (*RefreshReply, error) {
	p := sk.Params
	if err := p.same(request.Params); err != nil {
		return nil, err
	}
	if request.Key != sk.ID {
		return nil, failure(Key, "a refresh request for key %s, not %s", request.Key, sk.ID)
	}
	reply := &RefreshReply{p, sk.ID, make([]*Ciphertext, len(request.Masked))}
	convert := newCentred(p.RingQ(), request.Level, request.To, request.Shift)
	low, high := p.RingQ().AtLevel(request.Level), p.RingQ().AtLevel(request.To)
	grids := request.grids()
	defer sk.zeros.fill(len(request.Masked), func() (*Ciphertext, error) { return sk.encryptZero(p.MaxLevel()) })
	return reply, parallel(len(request.Masked), func(i int) error {
		masked, lifted := low.NewPoly(), high.NewPoly()
		err := parallel(request.Level+1, func(limb int) error {
			sk.decryptLimb(request.Masked[i], grids, limb, masked.Coeffs[limb])
			return nil
		})
		if err != nil {
			return err
		}
		if err := convert.convert(masked, lifted); err != nil {
			return err
		}
		if err := p.each(lifted, p.forward); err != nil {
			return err
		}
		fresh, err := sk.zero(request.To)
		if err != nil {
			return err
		}
		high.Add(fresh.Value[0], lifted, fresh.Value[0])
		reply.Fresh[i] = fresh
		return nil
	})
}

// decryptLimb decrypts a masked ciphertext to coefficients modulo one prime.
func (sk *SecretKey) decryptLimb(masked [2]ring.Poly, grids []*grid, limb int, out []uint64) {
	p, r := sk.Params, sk.Params.RingQ().SubRings[limb]
	secret := sk.Value.Q.Coeffs[limb]
	if grids == nil {
		r.MulCoeffsMontgomery(masked[1].Coeffs[limb], secret, out)
		r.Add(out, masked[0].Coeffs[limb], out)
		p.backward(limb, out)
		return
	}
	grids[1].residues(masked[1].Coeffs, limb, out)
	p.forward(limb, out)
	r.MulCoeffsMontgomery(out, secret, out)
	p.backward(limb, out)
	first := make([]uint64, p.N())
	grids[0].residues(masked[0].Coeffs, limb, first)
	r.Add(out, first, out)
}

// Unmask is the server's second half: it subtracts the masks.
func (e *Evaluator) Unmask(reply *RefreshReply, mask *RefreshMask) ([]*Ciphertext, error) {
	p := e.Params
	if err := p.same(reply.Params); err != nil {
		return nil, err
	}
	if err := p.same(mask.params); err != nil {
		return nil, err
	}
	if reply.Key != mask.key {
		return nil, failure(Key, "a refresh reply of key %s to a request for key %s", reply.Key, mask.key)
	}
	if len(reply.Fresh) != len(mask.masks) {
		return nil, failure(Invalid, "a refresh reply of %d ciphertexts to a request of %d", len(reply.Fresh), len(mask.masks))
	}
	for _, fresh := range reply.Fresh {
		if fresh.Level() != mask.to || fresh.Degree() != 1 {
			return nil, failure(Level, "a refresh reply at level %d, not %d", fresh.Level(), mask.to)
		}
	}
	if mask.removed.Swap(true) {
		return nil, failure(Invalid, "this refresh mask was used already: a mask serves once")
	}
	if <-mask.lifted; mask.failed != nil {
		return nil, mask.failed
	}
	ringQ := p.RingQ().AtLevel(mask.to)
	results := make([]*Ciphertext, len(reply.Fresh))
	return results, parallel(len(results), func(i int) error {
		results[i] = newCiphertext(p, reply.Key, 1, mask.to, mask.scales[i])
		ringQ.Sub(reply.Fresh[i].Value[0], mask.masks[i], results[i].Value[0])
		results[i].Value[1].Copy(reply.Fresh[i].Value[1])
		return nil
	})
}

// maxFlood bounds the flooding noise.
const maxFlood = 60

// Rerandomize prepares a ciphertext to leave the server for good: it adds a fresh
// encryption of zero and, to c0, noise that is uniform in [-2^flood, 2^flood) (none
// where flood is 0). A computation's noise tells about the weights; e of it is
// hidden up to a statistical distance of e / 2^(flood+1) for each coefficient.
func (e *Evaluator) Rerandomize(a *Ciphertext, pk *PublicKey, flood int) (*Ciphertext, error) {
	p := e.Params
	if err := e.own(true, a); err != nil {
		return nil, err
	}
	if err := p.same(pk.Params); err != nil {
		return nil, err
	}
	if a.Key != pk.ID {
		return nil, failure(Key, "a ciphertext under key %s, a public key of key %s", a.Key, pk.ID)
	}
	if flood < 0 || flood > maxFlood {
		return nil, failure(Invalid, "flooding noise of 2^0 to 2^%d, not 2^%d", maxFlood, flood)
	}
	if limit := p.logModulus(a.Level()); float64(flood+1) >= limit {
		return nil, failure(Scale, "flooding noise of 2^%d at level %d, where the modulus has %.1f bits", flood, a.Level(), limit)
	}
	ringQ := p.RingQ().AtLevel(a.Level())
	result := &Ciphertext{Ciphertext: pk.encryptor.EncryptZeroNew(a.Level()), Params: p, Key: a.Key}
	*result.MetaData = *a.MetaData
	for i := range result.Value {
		ringQ.Add(result.Value[i], a.Value[i], result.Value[i])
	}
	if flood == 0 {
		return result, nil
	}
	noise, err := uniformNoise(p, a.Level(), flood)
	if err != nil {
		return nil, err
	}
	ringQ.Add(result.Value[0], noise, result.Value[0])
	return result, nil
}

// uniformNoise samples integers in [-2^size, 2^size), in NTT form. The library's
// Gaussian sampler will not do here: it does not reduce samples beyond a prime, and
// wide samples of it have a grid, through which small noise stays visible.
func uniformNoise(p *Parameters, level, size int) (ring.Poly, error) {
	system, err := sampling.NewPRNG()
	if err != nil {
		return ring.Poly{}, err
	}
	random := make([]byte, 8*p.N())
	if _, err := system.Read(random); err != nil {
		return ring.Poly{}, err
	}
	integers := make([]int64, p.N())
	for i := range integers {
		word := binary.LittleEndian.Uint64(random[8*i:]) & (2<<size - 1)
		integers[i] = int64(word) - 1<<size
	}
	noise := p.RingQ().AtLevel(level).NewPoly()
	for limb, residues := range noise.Coeffs {
		liftAll(integers, p.RingQ().SubRings[limb], residues)
	}
	return noise, p.each(noise, p.forward)
}
