package core

import (
	"encoding/binary"
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
	Level  int    // of the masked ciphertexts
	To     int    // the level to encrypt at
	Shift  uint   // the client divides by 2^Shift
	Held   []Held // by ciphertext
	// Masked are coefficients of the first component, as many as the subring has, and residues
	// in NTT form of the second, or digits of the coefficients of both: see grids.
	Masked [][2]ring.Poly
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

// RefreshReply is the client's answer: fresh encryptions of (m + r) / 2^Shift at a level, of
// each message that is held.
type RefreshReply struct {
	Params *Parameters
	Key    ID
	Level  int
	Fresh  []*Compact
}

// RefreshMask is what the server keeps to take the masks off again. It serves once.
type RefreshMask struct {
	params   *Parameters
	key      ID
	to       int
	subrings []Subring
	masks    []ring.Poly // traces of r / 2^shift modulo the primes up to to, when lifted is closed
	scales   []rlwe.Scale
	lifted   chan struct{}
	failed   error // of lifting
	removed  atomic.Bool
}

// Count is the number of ciphertexts that come back.
func (m *RefreshMask) Count() int { return len(m.masks) }

// Mask is the server's first half of a refresh. To c0 goes a mask r, uniform
// modulo Q = q[0]...q[level]: what the client decrypts is uniform whatever the
// message is. To both components goes a fresh encryption of zero: c1 of a computed
// ciphertext is a linear function of polynomials that the client knows, and would
// give away what was multiplied with it; with the u*a + e of a public-key
// encryption added it is an RLWE sample whose secret u nobody but the server knew.
//
// Of messages in subrings, if it is said what ciphertexts hold, no more than these
// coefficients is sent; of two messages in one ciphertext each comes back as one.
func (e *Evaluator) Mask(inputs []*Ciphertext, pk *PublicKey, level, to int, shift uint, held ...Held) (*RefreshRequest, *RefreshMask, error) {
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
	if len(held) == 0 {
		held = slices.Repeat([]Held{{Subring{}}}, len(inputs))
	}
	if len(held) != len(inputs) {
		return nil, nil, failure(Invalid, "%d ciphertexts, and what %d hold", len(inputs), len(held))
	}
	for _, h := range held {
		if err := h.check(p); err != nil {
			return nil, nil, err
		}
		for _, s := range h {
			if err := s.checkShift(shift); err != nil {
				return nil, nil, err
			}
		}
	}
	request := &RefreshRequest{p, pk.ID, level, to, shift, held, make([][2]ring.Poly, len(inputs))}
	mask := &RefreshMask{params: p, key: pk.ID, to: to, subrings: slices.Concat(held...), lifted: make(chan struct{})}
	mask.masks = make([]ring.Poly, len(mask.subrings))
	divisor := rlwe.NewScale(uint64(1) << shift)
	for i, input := range inputs {
		if input.Key != pk.ID {
			return nil, nil, failure(Key, "a ciphertext under key %s, a public key of key %s", input.Key, pk.ID)
		}
		if input.Level() < level {
			return nil, nil, failure(Level, "a ciphertext at level %d cannot be masked at level %d", input.Level(), level)
		}
		for range held[i] {
			mask.scales = append(mask.scales, input.Scale.Div(divisor))
		}
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
			if component == 1 && grids == nil {
				p.forward(limb, residues)
				r.Add(residues, input, residues)
				continue
			}
			input = slices.Clone(input)
			p.backward(limb, input)
			r.Add(residues, input, residues)
			if component == 0 {
				residues = held[i].sent().project(residues, r.Modulus)
				r.Add(residues, drawn[i].Coeffs[limb][:len(residues)], residues)
				masked[limb] = residues
			}
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
		mask.failed = protected(func() error { return mask.lift(drawn, held, level, shift) })
		pk.covers.fill(len(inputs), func() (*cover, error) { return pk.newCover(level) })
	}()
	return request, mask, nil
}

// lift brings the masks to where the client's answer will be.
func (m *RefreshMask) lift(drawn []ring.Poly, held []Held, level int, shift uint) error {
	var parts []ring.Poly
	for i, r := range drawn {
		parts = append(parts, held[i].all(m.params, r)...)
	}
	for i, r := range parts {
		s := m.subrings[i]
		lifted, err := s.lift(m.params, r, level, m.to, shift)
		if err != nil {
			return err
		}
		m.masks[i] = ring.Poly{Coeffs: make([][]uint64, m.to+1)}
		for limb, residues := range lifted.Coeffs {
			m.masks[i].Coeffs[limb] = s.trace(residues, m.params.Q()[limb])
		}
	}
	return nil
}

// lift returns the polynomial, in NTT form at level to, of coefficients of the subring modulo
// Q = q[0]...q[level], divided by 2^shift and by what a refresh multiplies them with.
func (s Subring) lift(p *Parameters, coefficients ring.Poly, level, to int, shift uint) (ring.Poly, error) {
	lifted := ring.NewPoly(p.N(), to)
	compact := lifted
	if s != (Subring{}) {
		compact = ring.NewPoly(s.size(p), to)
	}
	if err := newCentred(p.RingQ(), level, to, shift+s.growth()).convert(coefficients, compact); err != nil {
		return lifted, err
	}
	return lifted, p.each(lifted, func(limb int, residues []uint64) {
		if s != (Subring{}) {
			s.embed(compact.Coeffs[limb], p.Q()[limb], residues)
		}
		p.forward(limb, residues)
	})
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
	subrings := slices.Concat(request.Held...)
	reply := &RefreshReply{p, sk.ID, request.To, make([]*Compact, len(subrings))}
	grids, parts := request.grids(), make([][]ring.Poly, len(request.Masked))
	defer sk.zeros.fill(len(subrings), func() (*Ciphertext, error) { return sk.encryptZero(p.MaxLevel()) })
	err := parallel(len(request.Masked), func(i int) error {
		held, masked := request.Held[i], ring.Poly{Coeffs: make([][]uint64, request.Level+1)}
		err := parallel(request.Level+1, func(limb int) error {
			masked.Coeffs[limb] = sk.decryptLimb(request.Masked[i], held.sent(), grids, limb)
			return nil
		})
		if err == nil {
			parts[i] = held.all(p, masked)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	messages := slices.Concat(parts...)
	return reply, parallel(len(messages), func(i int) error {
		s := subrings[i]
		lifted, err := s.lift(p, messages[i], request.Level, request.To, request.Shift)
		if err != nil {
			return err
		}
		fresh, err := sk.zero(request.To)
		if err != nil {
			return err
		}
		p.RingQ().AtLevel(request.To).Add(fresh.Value[0], lifted, fresh.Value[0])
		reply.Fresh[i] = s.compact(p, fresh)
		return nil
	})
}

// decryptLimb decrypts a masked ciphertext to the coefficients of a subring modulo one prime.
func (sk *SecretKey) decryptLimb(masked [2]ring.Poly, s Subring, grids []*grid, limb int) []uint64 {
	p, r := sk.Params, sk.Params.RingQ().SubRings[limb]
	first, second := masked[0].Coeffs[limb], slices.Clone(masked[1].Coeffs[limb])
	if grids != nil {
		first = make([]uint64, len(first))
		grids[0].residues(masked[0].Coeffs, limb, first)
		grids[1].residues(masked[1].Coeffs, limb, second)
		p.forward(limb, second)
	}
	r.MulCoeffsMontgomery(second, sk.Value.Q.Coeffs[limb], second)
	p.backward(limb, second)
	out := s.project(second, r.Modulus)
	r.Add(out, first, out)
	return out
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
	if reply.Level != mask.to {
		return nil, failure(Level, "a refresh reply at level %d, not %d", reply.Level, mask.to)
	}
	for i, fresh := range reply.Fresh {
		if fresh.Subring != mask.subrings[i] {
			return nil, failure(Invalid, "a refresh reply of another subring than was asked for")
		}
	}
	if mask.removed.Swap(true) {
		return nil, failure(Invalid, "this refresh mask was used already: a mask serves once")
	}
	if <-mask.lifted; mask.failed != nil {
		return nil, mask.failed
	}
	results := make([]*Ciphertext, len(reply.Fresh))
	return results, parallel(len(results), func(i int) error {
		results[i] = newCiphertext(p, reply.Key, 1, mask.to, mask.scales[i])
		return e.expand(reply.Fresh[i], mask.masks[i], results[i])
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
