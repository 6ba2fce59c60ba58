package core

import (
	"bytes"
	"io"
	"math"
	"math/cmplx"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
)

func parameters(t testing.TB, logN int, logQ, logP []int, logScale int, kind string) *Parameters {
	t.Helper()
	p, err := Literal{LogN: logN, LogQ: logQ, LogP: logP, LogScale: logScale, Ring: kind}.Check()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// small is a quick set for tests, large the one that models use.
func small(t testing.TB) *Parameters {
	return parameters(t, 13, []int{45, 33, 33, 33}, []int{45}, 33, "standard")
}

func large(t testing.TB) *Parameters {
	return parameters(t, 14, []int{50, 36, 36, 36, 36, 36, 36, 36, 36}, []int{50, 49}, 36, "standard")
}

// product is a set for one plaintext product with nothing after it.
func product(t testing.TB) *Parameters {
	return parameters(t, 12, []int{49}, []int{51}, 24, "conjugate_invariant")
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func noise(n int) []complex128 {
	values := make([]complex128, n)
	for i := range values {
		values[i] = complex(2*rand.Float64()-1, 2*rand.Float64()-1)
	}
	return values
}

func distance(a, b []complex128) (greatest float64) {
	for i := range a {
		greatest = max(greatest, cmplx.Abs(a[i]-b[i]))
	}
	return greatest
}

// party is a client and a server in one place.
type party struct {
	p  *Parameters
	sk *SecretKey
	pk *PublicKey
	e  *Evaluator
}

func newParty(t testing.TB, p *Parameters, rotations ...int) party {
	t.Helper()
	sk := must(NewSecretKey(p))
	var requests []KeyRequest
	for _, rotation := range rotations {
		requests = append(requests, KeyRequest{p.RotationElement(rotation), p.MaxLevel()})
	}
	keys := must(sk.NewEvaluationKeys(requests, p.MaxLevel()))
	return party{p, sk, must(sk.PublicKey()), must(NewEvaluator(p, keys))}
}

func (a party) encrypt(values []complex128, level int) *Ciphertext {
	return must(a.sk.Encrypt(must(a.p.Encode(values, level, a.p.DefaultScale()))))
}

func (a party) decrypt(ct *Ciphertext) []complex128 {
	return must(must(a.sk.Decrypt(ct)).Decode(0))
}

func TestEncryptBothWays(t *testing.T) {
	a := newParty(t, small(t))
	values := noise(a.p.Slots())
	if d := distance(values, a.decrypt(a.encrypt(values, 2))); d > 1e-5 {
		t.Errorf("secret key: error %g", d)
	}
	ct := must(a.pk.Encrypt(must(a.p.Encode(values, 3, a.p.DefaultScale()))))
	if d := distance(values, a.decrypt(ct)); d > 1e-5 {
		t.Errorf("public key: error %g", d)
	}
}

func TestTransform(t *testing.T) {
	p := small(t)
	const giant, babies, giants = 32, 4, 3
	var rotations []int
	for i := range babies {
		rotations = append(rotations, 8*i)
	}
	for i := range giants {
		rotations = append(rotations, giant*i)
	}
	one := newParty(t, p, rotations...)
	// In two stages, 24 is 16 and 8; a second giant step of 64 is one of the second stage.
	two := newParty(t, p, 8, 16, 32, 64)
	for _, of := range []struct {
		party
		stages [2]int
	}{{one, [2]int{giant, p.Slots()}}, {two, [2]int{16, 64}}} {
		testTransform(t, of.party, giant, babies, giants, of.stages)
	}
}

func testTransform(t *testing.T, a party, giant, babies, giants int, stages [2]int) {
	p := a.p
	values, other := noise(p.Slots()), noise(p.Slots())
	inputs := []*Ciphertext{a.encrypt(values, 3), a.encrypt(other, 2)}
	for _, storage := range []Storage{Int16, Int32, Residues} {
		for _, shape := range [][2]int{{p.Slots(), 1}, {p.Slots() / 8, 8}, {64, 1}, {16, 2}} {
			length, inner := shape[0], shape[1]
			matrices := make([]*LinearTransformation, 2)
			want := make([][][]complex128, 2)
			for m := range matrices {
				matrices[m] = must(NewLinearTransformation(p, 2, giant, stages, storage, 0))
				want[m] = [][]complex128{make([]complex128, p.Slots()), make([]complex128, p.Slots())}
				for i := range babies * giants {
					rotation := 8*(i%babies) + giant*(i/babies)
					diagonal := noise(length)
					if err := matrices[m].Add([]int{rotation}, diagonal, inner); err != nil {
						t.Fatal(err)
					}
					for j := range p.Slots() {
						weight := diagonal[j/inner%length]
						want[m][0][j] += weight * values[(j+rotation)%p.Slots()]
						want[m][1][j] += weight * other[(j+rotation)%p.Slots()]
					}
				}
			}
			results := must(a.e.Transform(inputs, matrices))
			for m := range matrices {
				for i := range inputs {
					bound := 2e-4
					if storage == Int16 {
						bound = 2e-2
					}
					if d := distance(want[m][i], a.decrypt(results[m][i])); d > bound {
						t.Errorf("stages %v, storage %d, %d values %d times, matrix %d, input %d: error %g", stages, storage, length, inner, m, i, d)
					}
				}
			}
		}
	}
}

// TestRefreshIsExact compares the integers before and after, with the encryption
// noise taken out of the picture by comparing decrypted coefficients.
func TestRefreshIsExact(t *testing.T) {
	a := newParty(t, large(t))
	values := noise(a.p.Slots())
	for _, level := range []int{1, 2} {
		for _, shift := range []uint{0, 3, 20} {
			input := a.encrypt(values, level)
			request, mask, err := a.e.Mask([]*Ciphertext{input}, a.pk, level, 5, shift)
			if err != nil {
				t.Fatal(err)
			}
			reply := must(a.sk.Refresh(request))
			output := must(a.e.Unmask(reply, mask))[0]
			if output.Level() != 5 {
				t.Errorf("level %d", output.Level())
			}
			if d := distance(values, a.decrypt(output)); d > math.Exp2(float64(shift))*2e-6 {
				t.Errorf("level %d, shift %d: error %g", level, shift, d)
			}
			if _, err := a.e.Unmask(reply, mask); err == nil {
				t.Error("a mask served twice")
			}
		}
	}
}

func TestFrames(t *testing.T) {
	a := newParty(t, small(t), 1, 5)
	seeded := a.encrypt(noise(a.p.Slots()), 2)
	request, mask, err := a.e.Mask([]*Ciphertext{seeded, seeded}, a.pk, 1, 3, 2)
	if err != nil {
		t.Fatal(err)
	}
	objects := map[Type]Object{
		TypeParameters: a.p, TypeSecretKey: a.sk, TypePublicKey: a.pk, TypeEvaluationKeys: a.e.keys,
		TypePlaintext: must(a.p.Encode(noise(3), 1, a.p.DefaultScale())), TypeCiphertext: seeded,
		TypeRefreshRequest: request, TypeRefreshReply: must(a.sk.Refresh(request)),
	}
	read := map[Type]any{}
	for kind, object := range objects {
		var first, second bytes.Buffer
		if err := object.Write(&first); err != nil {
			t.Fatal(kind, err)
		}
		p := a.p
		if kind == TypeParameters {
			p = nil
		}
		header := first.Bytes()[:HeaderSize]
		h := must(ParseHeader(header, kind, p))
		if int(h.Length)+HeaderSize != first.Len() {
			t.Errorf("type %d: %d bytes, the header says %d", kind, first.Len(), h.Length+HeaderSize)
		}
		read[kind] = must(Read(bytes.NewReader(first.Bytes()[HeaderSize:]), header, h, p))
		if err := read[kind].(Object).Write(&second); err != nil {
			t.Fatal(kind, err)
		}
		if !bytes.Equal(first.Bytes(), second.Bytes()) {
			t.Errorf("type %d changed on the way", kind)
		}
	}
	// Everything read back works together.
	b := party{read[TypeParameters].(*Parameters), read[TypeSecretKey].(*SecretKey), read[TypePublicKey].(*PublicKey), nil}
	b.e = must(NewEvaluator(b.p, read[TypeEvaluationKeys].(*EvaluationKeys)))
	values := noise(b.p.Slots())
	product := must(b.e.Mul(b.encrypt(values, 3), b.encrypt(values, 3), true, nil))
	product = must(b.e.Rotate(must(b.e.Rescale(product, nil)), 5, nil))
	want := make([]complex128, len(values))
	for i := range want {
		v := values[(i+5)%len(values)]
		want[i] = v * v
	}
	if d := distance(want, b.decrypt(product)); d > 1e-4 {
		t.Errorf("error %g", d)
	}
	refreshed := must(b.e.Unmask(read[TypeRefreshReply].(*RefreshReply), mask))
	if d := distance(a.decrypt(seeded), b.decrypt(refreshed[0])); d > 1e-5 {
		t.Errorf("refresh: error %g", d)
	}
}

func TestPacking(t *testing.T) {
	for width := 20; width <= 61; width++ {
		values, back := make([]uint64, 4096), make([]uint64, 4096)
		for i := range values {
			values[i] = rand.Uint64() & (1<<width - 1)
		}
		packed := make([]byte, 4096*width/8+8)
		packBits(values, width, packed)
		unpackBits(packed, width, back)
		for i := range values {
			if values[i] != back[i] {
				t.Fatalf("width %d, value %d", width, i)
			}
		}
	}
}

func TestScaleParts(t *testing.T) {
	for range 1000 {
		scale := rlwe.NewScale(math.Exp2(200*rand.Float64() - 50)).Div(rlwe.NewScale(rand.Uint64() | 1))
		high, low, exponent := scaleParts(scale)
		if back := must(scaleFrom(high, low, exponent)); back.Cmp(scale) != 0 {
			t.Fatalf("%v became %v", &scale.Value, &back.Value)
		}
	}
}

// TestConcurrency is for the race detector: one evaluator, everything at once.
func TestConcurrency(t *testing.T) {
	a := newParty(t, parameters(t, 12, []int{38, 28}, []int{38}, 28, "standard"), 1, 2)
	lt := must(NewLinearTransformation(a.p, 1, 2, [2]int{2, a.p.Slots()}, Int32, 0))
	if err := lt.Add([]int{0, 1, 2}, noise(3*16), 1); err != nil {
		t.Fatal(err)
	}
	ct := a.encrypt(noise(a.p.Slots()), 1)
	want := must(a.e.Rotate(ct, 1, nil))
	err := parallel(16, func(i int) error {
		switch i % 4 {
		case 0:
			if got := must(a.e.Rotate(ct, 1, nil)); !got.Equal(want.Ciphertext) {
				t.Error("a rotation differs")
			}
			must(a.e.Mul(ct, ct, true, nil))
		case 1:
			must(a.e.Transform([]*Ciphertext{ct}, []*LinearTransformation{lt}))
		case 2:
			request, mask, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 1, 0)
			if err != nil {
				return err
			}
			must(a.e.Unmask(must(a.sk.Refresh(request)), mask))
		case 3:
			must(a.e.Evaluate(ct, Chebyshev{[]float64{1, 2}, -1, 1, 4}))
			must(NewEvaluator(a.p, a.e.keys))
			return a.e.keys.Write(io.Discard)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestHelpersComeBack runs jobs from many callers, with errors, panics, more threads than
// cores and fewer again: nobody waits for ever, every job runs, and no helper is lost.
func TestHelpersComeBack(t *testing.T) {
	before := Threads()
	defer SetThreads(before)
	var ran atomic.Int64
	var group sync.WaitGroup
	for caller := range 16 {
		group.Add(1)
		go func() {
			defer group.Done()
			for round := range 200 {
				switch {
				case caller == 0:
					SetThreads(1 + round%5)
				case caller == 1:
					parallel(8, func(i int) error { return failure(Invalid, "no") })
				case caller == 2:
					protected(func() error { return parallel(8, func(int) error { panic("no") }) })
				default:
					parallel(4, func(int) error {
						return parallel(3, func(int) error { ran.Add(1); return nil })
					})
				}
			}
		}()
	}
	group.Wait()
	if ran.Load() != 13*200*12 {
		t.Errorf("%d jobs ran, not %d", ran.Load(), 13*200*12)
	}
	if busy := helpers.Load(); busy != 0 {
		t.Errorf("%d helpers are still at work", busy)
	}
}

// TestOffersAreWithdrawn keeps the only helper busy: who finds no help does all by itself.
func TestOffersAreWithdrawn(t *testing.T) {
	before := Threads()
	defer SetThreads(before)
	if err := SetThreads(2); err != nil {
		t.Fatal(err)
	}
	release, held := make(chan struct{}), make(chan struct{}, maxThreads)
	for range max(1, hired.Load()) { // all that there are
		offers <- func() { held <- struct{}{}; <-release }
	}
	for range hired.Load() {
		<-held
	}
	done := 0
	if err := parallel(4, func(int) error { done++; return nil }); err != nil || done != 4 {
		t.Errorf("%d of 4 jobs: %v", done, err)
	}
	if busy := helpers.Load(); busy != 0 {
		t.Errorf("%d helpers are taken for busy", busy)
	}
	close(release)
}

func TestAPanicInAJobIsAnError(t *testing.T) {
	before := Threads()
	t.Cleanup(func() { threads.Store(int64(before)) })
	for _, count := range []int{1, 4} {
		if err := SetThreads(count); err != nil {
			t.Fatal(err)
		}
		err := protected(func() error { return parallel(8, func(int) error { panic("no") }) })
		if err == nil {
			t.Error("the panic was lost")
		}
	}
}

// TestNestedJobs runs jobs that run jobs: no more goroutines than allowed, no deadlock.
func TestNestedJobs(t *testing.T) {
	before := Threads()
	t.Cleanup(func() { threads.Store(int64(before)) })
	if err := SetThreads(4); err != nil {
		t.Fatal(err)
	}
	var running, most, done atomic.Int64
	err := parallel(16, func(int) error {
		return parallel(16, func(int) error {
			now := running.Add(1)
			for seen := most.Load(); now > seen && !most.CompareAndSwap(seen, now); seen = most.Load() {
			}
			time.Sleep(100 * time.Microsecond)
			running.Add(-1)
			done.Add(1)
			return nil
		})
	})
	if err != nil || done.Load() != 256 {
		t.Errorf("%d jobs done, error %v", done.Load(), err)
	}
	if most.Load() < 2 || most.Load() > 4 {
		t.Errorf("%d jobs at once with 4 threads", most.Load())
	}
	if helpers.Load() != 0 {
		t.Errorf("%d helpers were not given back", helpers.Load())
	}
}
