package core

import (
	"bytes"
	"crypto/rand"
	"io"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tuneinsight/lattigo/v6/utils/sampling"
)

// What Python's tests of errors, seeds and masks cannot see: where randomness comes
// from, and the second error of an encryption under the public key, which rounding
// swallows.

// randomParameters are small: statistics do not need more.
func randomParameters(t *testing.T) *Parameters {
	t.Helper()
	p, err := Literal{LogN: 12, LogQ: []int{38, 28}, LogP: []int{38}, LogScale: 28, Ring: "standard"}.Check()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// system puts a reader in place of the system's randomness for the length of a test.
func system(t *testing.T, reader io.Reader) {
	t.Helper()
	before := rand.Reader
	rand.Reader = reader
	t.Cleanup(func() { rand.Reader = before })
}

type counter struct {
	from  io.Reader
	total atomic.Int64
}

func (c *counter) Read(b []byte) (int, error) {
	c.total.Add(int64(len(b)))
	return c.from.Read(b)
}

// TestRandomnessIsTheSystems counts the bytes that each operation takes from the
// system. A Gaussian coefficient takes 8 or more, a uniform residue too, a ternary
// coefficient a bit or more, and a seed 32.
func TestRandomnessIsTheSystems(t *testing.T) {
	p := randomParameters(t)
	count := &counter{from: rand.Reader}
	system(t, count)
	n := int64(p.N())
	seed, gaussian, uniform, ternary := int64(seedSize), 8*n, 8*n, n/8
	sk, err := NewSecretKey(p)
	if err != nil {
		t.Fatal(err)
	}
	pk, err := sk.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	evaluator, err := NewEvaluator(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	plaintext := NewPlaintext(p, 1, p.DefaultScale())
	fresh, err := sk.Encrypt(plaintext)
	if err != nil {
		t.Fatal(err)
	}
	request, mask, err := evaluator.Mask([]*Ciphertext{fresh, fresh}, pk, 1, 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sk.Refresh(request); err != nil {
		t.Fatal(err)
	}
	// What a request or a reply takes from its stock is made again in the background.
	rest := func() {
		<-mask.lifted
		wait(t, &pk.covers)
		wait(t, &sk.zeros)
	}
	rest()
	zero := ternary + 2*gaussian
	for _, operation := range []struct {
		name  string
		least int64
		run   func() error
	}{
		{"a secret key", ternary, func() error { _, err := NewSecretKey(p); return err }},
		{"a public key", seed + gaussian, func() error { _, err := sk.PublicKey(); return err }},
		{"evaluation keys, of two digits each", 2 * (seed + 2*gaussian), func() error {
			_, err := sk.NewEvaluationKeys([]KeyRequest{{p.RotationElement(1), 1}}, 1)
			return err
		}},
		{"an encryption", seed + gaussian, func() error { _, err := sk.Encrypt(plaintext); return err }},
		{"an encryption under the public key", zero, func() error { _, err := pk.Encrypt(plaintext); return err }},
		{"a request of two", 2 * (2*uniform + zero), func() (err error) {
			_, mask, err = evaluator.Mask([]*Ciphertext{fresh, fresh}, pk, 1, 1, 0)
			return err
		}},
		{"a reply of two", 2 * (seed + gaussian), func() error { _, err := sk.Refresh(request); return err }},
		{"a result", zero + uniform, func() error { _, err := evaluator.Rerandomize(fresh, pk, 16); return err }},
	} {
		before := count.total.Load()
		if err := operation.run(); err != nil {
			t.Fatal(err)
		}
		rest()
		if taken := count.total.Load() - before; taken < operation.least {
			t.Errorf("%s takes %d bytes from the system: %d at least are needed", operation.name, taken, operation.least)
		}
	}
}

// wait returns when a stock is not being filled.
func wait[T any](t *testing.T, s *stock[T]) {
	t.Helper()
	for range 10000 {
		s.lock.Lock()
		filling := s.filling
		s.lock.Unlock()
		if !filling {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("a stock is filled for ever")
}

// TestWhatIsMadeAheadServesOnce takes from a stock in several threads, more than it has.
func TestWhatIsMadeAheadServesOnce(t *testing.T) {
	var s stock[int]
	var made atomic.Int64
	next := func() (int, error) { return int(made.Add(1)), nil }
	var taken []int
	for range 100 {
		s.fill(2*mostAhead, next)
		wait(t, &s)
		if len(s.items) != mostAhead {
			t.Fatalf("a stock of %d items", len(s.items))
		}
		items := make([]int, 2*mostAhead)
		if err := parallel(len(items), func(i int) error {
			items[i], _ = s.take()
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		taken = append(taken, items...)
	}
	slices.Sort(taken)
	if found := slices.Compact(taken)[1:]; len(found) != 100*mostAhead || int(made.Load()) != len(found) {
		t.Errorf("%d items made, %d taken of %d", made.Load(), len(found), 100*mostAhead)
	}
}

// TestRequestsAndRepliesHaveCoversOfTheirOwn makes one after the other, when there is a stock.
func TestRequestsAndRepliesHaveCoversOfTheirOwn(t *testing.T) {
	p := randomParameters(t)
	sk := must(NewSecretKey(p))
	pk, evaluator := must(sk.PublicKey()), must(NewEvaluator(p, nil))
	fresh := must(sk.Encrypt(NewPlaintext(p, 1, p.DefaultScale())))
	var masks, zeros, seconds [][]uint64
	for range 3 * mostAhead {
		request, mask, err := evaluator.Mask([]*Ciphertext{fresh, fresh}, pk, 1, 1, 0)
		if err != nil {
			t.Fatal(err)
		}
		reply := must(sk.Refresh(request))
		<-mask.lifted
		wait(t, &pk.covers)
		wait(t, &sk.zeros)
		for i := range mask.masks {
			masks = append(masks, mask.masks[i].Coeffs[0])
			zeros = append(zeros, request.Masked[i][1].Coeffs[0])
			second := p.RingQ().AtLevel(1).NewPoly()
			if err := expandSeed(p, reply.Fresh[i].Seed, second); err != nil {
				t.Fatal(err)
			}
			seconds = append(seconds, second.Coeffs[0])
		}
	}
	for name, of := range map[string][][]uint64{"masks": masks, "zeros": zeros, "replies": seconds} {
		for i := range of {
			for j := range i {
				if agree(of[i], of[j]) > 1 {
					t.Fatalf("%s %d and %d are one", name, i, j)
				}
			}
		}
	}
}

// TestAStockThatCannotBeFilledIsNoFault makes items that fail, or panic.
func TestAStockThatCannotBeFilledIsNoFault(t *testing.T) {
	for _, item := range []func() (int, error){
		func() (int, error) { return 0, failure(Internal, "no") },
		func() (int, error) { panic("no") },
	} {
		var s stock[int]
		s.fill(1, item)
		wait(t, &s)
		if _, ok := s.take(); ok {
			t.Error("an item that could not be made")
		}
	}
}

// TestErrorsDoNotFollowFromSeeds encrypts with chosen randomness: seeds are public,
// so that the error must come from other bytes than the seed.
func TestErrorsDoNotFollowFromSeeds(t *testing.T) {
	p := randomParameters(t)
	sk, err := NewSecretKey(p)
	if err != nil {
		t.Fatal(err)
	}
	encrypt := func(seed, rest byte) (*Ciphertext, []uint64) {
		stream, err := sampling.NewKeyedPRNG([]byte{rest})
		if err != nil {
			t.Fatal(err)
		}
		system(t, io.MultiReader(bytes.NewReader(bytes.Repeat([]byte{seed}, seedSize)), stream))
		fresh, err := sk.Encrypt(NewPlaintext(p, 0, p.DefaultScale()))
		if err != nil {
			t.Fatal(err)
		}
		opened, err := sk.Decrypt(fresh)
		if err != nil {
			t.Fatal(err)
		}
		residues := make([]uint64, p.N())
		p.RingQ().SubRings[0].INTT(opened.Value.Coeffs[0], residues)
		return fresh, residues
	}
	first, errors := encrypt(1, 1)
	otherSeed, same := encrypt(2, 1)
	otherRest, different := encrypt(1, 2)
	if agree(errors, same) != p.N() || agree(errors, different) > p.N()/2 {
		t.Error("errors follow from the seed")
	}
	if agree(first.Value[1].Coeffs[0], otherSeed.Value[1].Coeffs[0]) > 1 ||
		agree(first.Value[1].Coeffs[0], otherRest.Value[1].Coeffs[0]) != p.N() {
		t.Error("the uniform component does not follow from the seed alone")
	}
}

func agree(a, b []uint64) (count int) {
	for i := range a {
		if a[i] == b[i] {
			count++
		}
	}
	return count
}

// TestZerosHaveTwoErrors puts the constant (P - 1) / 2 in place of both components
// of a public key. Of u c + e, divided by P and rounded, nothing is left but whether
// u is 1 and e positive, or u is -1 and e negative: in 0.292 of the coefficients for
// errors of deviation 3.2, and in no more than that for both components together.
func TestZerosHaveTwoErrors(t *testing.T) {
	p := randomParameters(t)
	sk, err := NewSecretKey(p)
	if err != nil {
		t.Fatal(err)
	}
	pk, err := sk.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	constant := p.P()[0] / 2
	for _, component := range pk.Value {
		for limb, r := range slices.Concat(p.RingQ().SubRings, p.RingP().SubRings) {
			residues := make([]uint64, p.N())
			for i := range residues {
				residues[i] = constant % r.Modulus
			}
			r.MForm(residues, residues)
			if limb < p.QCount() {
				copy(component.Q.Coeffs[limb], residues)
			} else {
				copy(component.P.Coeffs[limb-p.QCount()], residues)
			}
		}
	}
	const rounds = 16
	var set [2]int
	both := 0
	for range rounds {
		zero := pk.encryptor.EncryptZeroNew(0)
		var components [2][]uint64
		for i := range components {
			components[i] = make([]uint64, p.N())
			p.RingQ().SubRings[0].INTT(zero.Value[i].Coeffs[0], components[i])
		}
		for i := range p.N() {
			for c := range components {
				if components[c][i] != 0 {
					set[c]++
				}
			}
			if components[0][i] != 0 && components[1][i] != 0 {
				both++
			}
		}
	}
	// P(e > 0) for a rounded Gaussian; 8 deviations are exceeded once in 10^15 times.
	positive := 0.5 * math.Erfc(0.5/3.2/math.Sqrt2)
	check := func(what string, found int, share float64) {
		n := float64(rounds * p.N())
		if deviation := (float64(found) - n*share) / math.Sqrt(n*share*(1-share)); math.Abs(deviation) > 8 {
			t.Errorf("%s: %d of %.0f coefficients, %.0f deviations from what errors make", what, found, n, deviation)
		}
	}
	check("the first component", set[0], 2./3*positive)
	check("the second component", set[1], 2./3*positive)
	check("both", both, 2./3*positive*positive)
}
