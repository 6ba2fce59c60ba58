package core

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/utils/sampling"
)

// automorphisms are the Galois elements that leave a subring as it is.
func (s Subring) automorphisms(p *Parameters) (elements []uint64) {
	for i := range 1 << s.LogCopies {
		element := p.RotationElement(i * p.Slots() >> s.LogCopies)
		elements = append(elements, element)
		if s.Real {
			elements = append(elements, element*must(p.ConjugationElement())%p.RingQ().NthRoot())
		}
	}
	return elements
}

var subrings = []Subring{{0, true}, {1, false}, {1, true}, {3, false}, {3, true}}

// TestATraceIsASumOfAutomorphisms compares with the library's automorphisms, in both forms.
func TestATraceIsASumOfAutomorphisms(t *testing.T) {
	p := small(t)
	r, prime := p.RingQ().AtLevel(0), p.Q()[0]
	for _, s := range subrings {
		input := r.NewPoly()
		ring.NewUniformSampler(must(sampling.NewPRNG()), r).Read(input)
		coefficients, sum, image := r.NewPoly(), r.NewPoly(), r.NewPoly()
		r.INTT(input, coefficients)
		for _, element := range s.automorphisms(p) {
			r.AutomorphismNTT(input, element, image)
			r.Add(sum, image, sum)
		}
		spread := r.NewPoly()
		s.addSpread(s.trace(input.Coeffs[0], prime), prime, spread.Coeffs[0])
		if !slices.Equal(spread.Coeffs[0], sum.Coeffs[0]) {
			t.Errorf("%+v: not the sum over automorphisms", s)
		}
		embedded := r.NewPoly()
		s.embed(s.project(coefficients.Coeffs[0], prime), prime, embedded.Coeffs[0])
		factor := uint64(1) << (uint(s.logOrder()) - s.growth() + uint(s.logOrder())) // of project, to the trace
		r.MulScalar(embedded, factor, embedded)
		r.INTT(sum, sum)
		if !slices.Equal(embedded.Coeffs[0], sum.Coeffs[0]) {
			t.Errorf("%+v: coefficients are not those of the sum", s)
		}
		if size := len(s.project(coefficients.Coeffs[0], prime)); size != s.size(p) || size != p.N()/len(s.automorphisms(p)) {
			t.Errorf("%+v: %d coefficients", s, size)
		}
	}
}

// subringParty has the keys for all subrings with up to 8 copies.
func subringParty(t *testing.T, p *Parameters) party {
	a := newParty(t, p)
	var requests []KeyRequest
	for copies := 2; copies <= 8; copies *= 2 {
		requests = append(requests, KeyRequest{p.RotationElement(p.Slots() / copies), p.MaxLevel()})
	}
	requests = append(requests, KeyRequest{must(p.ConjugationElement()), p.MaxLevel()})
	a.e = must(NewEvaluator(p, must(a.sk.NewEvaluationKeys(requests, p.MaxLevel()))))
	return a
}

// repeated returns numbers that repeat, real ones where the subring says so.
func (s Subring) repeated(p *Parameters) []complex128 {
	values := noise(p.Slots() >> s.LogCopies)
	if s.Real {
		for i := range values {
			values[i] = complex(real(values[i]), 0)
		}
	}
	return slices.Repeat(values, 1<<s.LogCopies)
}

// sent returns what the other side reads.
func sent[T Object](t *testing.T, p *Parameters, kind Type, object T) (T, int) {
	t.Helper()
	var wire bytes.Buffer
	if err := object.Write(&wire); err != nil {
		t.Fatal(err)
	}
	data := wire.Bytes()
	rest := bytes.NewReader(data[HeaderSize:])
	read := must(Read(rest, data[:HeaderSize], must(ParseHeader(data[:HeaderSize], kind, p)), p))
	if rest.Len() > 0 {
		t.Fatalf("%d bytes are left of a frame", rest.Len())
	}
	return read.(T), len(data)
}

// TestRefreshInSubrings refreshes, through frames, messages of several subrings in one request.
func TestRefreshInSubrings(t *testing.T) {
	a := subringParty(t, large(t))
	p := a.p
	of := []Held{{{}}, {{0, true}, {0, true}}, {{0, true}, {3, true}}, {{2, true}, {1, true}}}
	for _, s := range subrings {
		of = append(of, Held{s})
	}
	for _, shift := range []uint{0, 8, 16} {
		for _, level := range []int{1, 2} {
			var values [][]complex128
			var inputs []*Ciphertext
			for _, held := range of {
				var slots []complex128
				for _, s := range held {
					values = append(values, s.repeated(p))
					if slots == nil {
						slots = slices.Clone(values[len(values)-1])
						continue
					}
					for i, value := range values[len(values)-1] {
						slots[i] += value * 1i
					}
				}
				input := a.encrypt(slots, level)
				inputs = append(inputs, must(a.e.MulConstant(input, complex(math.Exp2(float64(shift)), 0), nil)))
			}
			request, mask, err := a.e.Mask(inputs, a.pk, level, 4, shift, of...)
			if err != nil {
				t.Fatal(err)
			}
			request, _ = sent(t, p, TypeRefreshRequest, request)
			reply, size := sent(t, p, TypeRefreshReply, must(a.sk.Refresh(request)))
			if announced := int(request.ReplyBytes()); size < announced || size > announced+HeaderSize+16 {
				t.Errorf("a reply of %d bytes, announced as %d", size, announced)
			}
			flat := slices.Concat(of...)
			for i, output := range must(a.e.Unmask(reply, mask)) {
				output.Scale = output.Scale.Mul(must(NewScale(math.Exp2(float64(shift)))))
				output = must(output.SetScale(inputs[0].Scale, nil))
				if output.Level() != 4 {
					t.Errorf("%+v: level %d", flat[i], output.Level())
				}
				if d := distance(values[i], a.decrypt(output)); d > 2e-6 {
					t.Errorf("%+v, level %d, shift %d: error %g", flat[i], level, shift, d)
				}
			}
		}
	}
}

// TestARealRefreshDropsWhatIsImaginary has an imaginary part as large as the real one.
func TestARealRefreshDropsWhatIsImaginary(t *testing.T) {
	a := subringParty(t, large(t))
	values := slices.Repeat(noise(a.p.Slots()/2), 2)
	ct := a.encrypt(values, 1)
	request, mask, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 3, 0, Held{{1, true}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range values {
		values[i] = complex(real(values[i]), 0)
	}
	if d := distance(values, a.decrypt(must(a.e.Unmask(must(a.sk.Refresh(request)), mask))[0])); d > 2e-6 {
		t.Errorf("error %g", d)
	}
}

// TestCompactRepliesHaveTheirErrors looks, with the key, at the error of replies to requests
// that decrypt to zero: it is the trace of a fresh one.
func TestCompactRepliesHaveTheirErrors(t *testing.T) {
	a := subringParty(t, large(t))
	p := a.p
	for _, s := range append([]Subring{{}}, subrings...) {
		const count = 8
		request := &RefreshRequest{Params: p, Key: a.sk.ID, Level: 1, To: 2, Shift: 8}
		for range count {
			request.Held = append(request.Held, Held{s})
			request.Masked = append(request.Masked, [2]ring.Poly{ring.NewPoly(s.size(p), 1), ring.NewPoly(p.N(), 1)})
		}
		var errors []float64
		for _, fresh := range must(a.sk.Refresh(request)).Fresh {
			r, prime := p.RingQ().SubRings[0], p.Q()[0]
			second := p.RingQ().AtLevel(0).NewPoly()
			if err := expandSeed(p, fresh.Seed, second); err != nil {
				t.Fatal(err)
			}
			r.MulCoeffsMontgomery(second.Coeffs[0], a.sk.Value.Q.Coeffs[0], second.Coeffs[0])
			whole := make([]uint64, p.N())
			s.addSpread(fresh.First.Coeffs[0], prime, whole)
			s.addSpread(s.trace(second.Coeffs[0], prime), prime, whole)
			p.backward(0, whole)
			for i, residue := range whole {
				value := float64(residue)
				if residue > prime/2 {
					value = -float64(prime - residue)
				}
				// Half of the polynomial's coefficients mirror the others.
				if i%(1<<s.LogCopies) != 0 || s.Real && 2*i == p.N() {
					if value != 0 {
						t.Fatalf("%+v: coefficient %d is not of the subring", s, i)
					}
				} else if !s.Real || 2*i < p.N() && i > 0 {
					errors = append(errors, value)
				}
			}
		}
		// Rotations multiply an error in the subring by the copies, and take away all others;
		// conjugation adds the error of another coefficient.
		wanted := p.Xe().(ring.DiscreteGaussian).Sigma * math.Exp2(float64(s.LogCopies))
		if s.Real {
			wanted *= math.Sqrt2
		}
		if found := deviation(errors); math.Abs(found/wanted-1) > 0.1 {
			t.Errorf("%+v: errors of %.2f, not %.2f", s, found, wanted)
		}
	}
}

// TestSubringsAreChecked gives wrong ones to a server, and to a reader.
func TestSubringsAreChecked(t *testing.T) {
	a := subringParty(t, large(t))
	p, ct := a.p, a.encrypt(noise(a.p.Slots()), 1)
	for _, wrong := range []Subring{{40, false}, {127, true}, {uint8(p.LogN()) - 5, false}, {uint8(p.LogN()) - 6, true}} {
		if _, _, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 1, 0, Held{wrong}); err == nil {
			t.Errorf("%+v is taken", wrong)
		}
	}
	for _, wrong := range []Held{{}, {{}, {}}, {{0, true}, {}}, {{0, true}, {0, true}, {0, true}}} {
		if _, _, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 1, 0, wrong); err == nil {
			t.Errorf("%+v is taken", wrong)
		}
	}
	if _, _, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 1, maxShift, Held{{0, true}}); err == nil {
		t.Error("a division by too much")
	}
	if _, _, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 1, 0, Held{{}}, Held{{}}); err == nil {
		t.Error("more subrings than ciphertexts")
	}
	request, mask, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 1, 0, Held{{1, false}})
	if err != nil {
		t.Fatal(err)
	}
	other := must(a.sk.Refresh(request))
	other.Fresh[0].Subring = Subring{0, true} // of the same size
	if _, err := a.e.Unmask(other, mask); err == nil {
		t.Error("a reply of another subring")
	}
	if _, err := must(NewEvaluator(p, nil)).Unmask(must(a.sk.Refresh(request)), mask); err == nil {
		t.Error("a trace without keys")
	}
	for _, copies := range []int{-2, 0, 3, 1 << 40} {
		if _, err := NewSubring(p, copies, false); err == nil {
			t.Errorf("%d copies", copies)
		}
	}
	real := must(NewSubring(p, 4, true))
	if fmt.Sprint(parseSubring(real.code())) != fmt.Sprint(real) {
		t.Errorf("%+v became %+v", real, parseSubring(real.code()))
	}
}
