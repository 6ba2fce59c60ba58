package core

import (
	"bytes"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestGridsRoundToTheNearest compares digits with rounded integers, near zero and Q above all,
// and what they are turned back to with the multiples that they stand for.
func TestGridsRoundToTheNearest(t *testing.T) {
	widest := parameters(t, 14, []int{60, 60}, []int{60}, 40, "standard")
	for name, p := range map[string]*Parameters{"small": small(t), "large": large(t), "widest": widest} {
		for level := range 2 {
			modulus := p.RingQ().ModulusAtLevel[level]
			for _, dropped := range []uint8{0, 1, 6, 14, 20, 43, 60} {
				if int(dropped) > modulus.BitLen()-2 {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d/%d", name, level, dropped), func(t *testing.T) {
					checkGrid(t, p, level, dropped)
				})
			}
		}
	}
}

func checkGrid(t *testing.T, p *Parameters, level int, dropped uint8) {
	ringQ, g := p.RingQ().AtLevel(level), newGrid(p, level, dropped)
	modulus := p.RingQ().ModulusAtLevel[level]
	step := new(big.Int).Lsh(big.NewInt(1), uint(dropped))
	half := new(big.Int).Rsh(step, 1)
	greatest := new(big.Int).Rsh(new(big.Int).Sub(modulus, big.NewInt(1)), uint(dropped))
	values := make([]*big.Int, p.N())
	for i := range values {
		values[i] = new(big.Int).Mod(new(big.Int).Lsh(new(big.Int).SetUint64(rand.Uint64()), 63), modulus)
		values[i].Xor(values[i], new(big.Int).SetUint64(rand.Uint64())).Mod(values[i], modulus)
	}
	edges := []*big.Int{big.NewInt(0), half, step, new(big.Int).Mul(greatest, step)}
	for i, edge := range edges {
		for j := range 3 {
			near := new(big.Int).Add(edge, big.NewInt(int64(j-1)))
			values[6*i+j] = near.Mod(near, modulus)
			near = new(big.Int).Sub(modulus, values[6*i+j])
			values[6*i+j+3] = near.Mod(near, modulus)
		}
	}
	poly := ringQ.NewPoly()
	ringQ.SetCoefficientsBigint(values, poly)
	digits := poly.CopyNew().Coeffs
	g.round(digits)

	var wire bytes.Buffer
	out := &encoder{to: &wire, hash: TypeRefreshRequest.checksum()}
	out.digits(g, digits)
	width := uint64(greatest.BitLen())
	if size := uint64(p.N()) * width / 8; out.err != nil || uint64(wire.Len()) != size || g.size(p.N()) != size {
		t.Fatalf("%d bytes written and %d announced, not %d of %d bits each: %v", wire.Len(), g.size(p.N()), size, width, out.err)
	}
	in := &decoder{from: bytes.NewReader(wire.Bytes()), hash: TypeRefreshRequest.checksum(), left: uint64(wire.Len())}
	read := ringQ.NewPoly().Coeffs
	in.digits(g, read)
	if in.err != nil || !slices.EqualFunc(read, digits, slices.Equal[[]uint64]) {
		t.Fatalf("digits changed on the way: %v", in.err)
	}
	residues := ringQ.NewPoly()
	for limb := range residues.Coeffs {
		g.residues(digits, limb, residues.Coeffs[limb])
	}
	found := make([]*big.Int, p.N())
	for i := range found {
		found[i] = new(big.Int)
	}
	ringQ.PolyToBigint(residues, 1, found)
	for i, value := range values {
		want := new(big.Int).Add(value, half)
		if want.Rsh(want, uint(dropped)).Cmp(greatest) > 0 {
			want.SetUint64(0)
		}
		if want.Lsh(want, uint(dropped)).Cmp(found[i]) != 0 {
			t.Fatalf("%v was rounded to %v, not to %v", value, found[i], want)
		}
	}
}

// TestDigitsAtOrAboveTheModulusAreRefused reads the least multiple that is too large, and the
// greatest that there is.
func TestDigitsAtOrAboveTheModulusAreRefused(t *testing.T) {
	p := large(t)
	for level := range 2 {
		for _, dropped := range []uint8{0, 6, 20} {
			g := newGrid(p, level, dropped)
			for _, more := range []uint64{0, 1} {
				digits := p.RingQ().AtLevel(level).NewPoly().Coeffs
				for i := range digits {
					digits[i][17] = g.greatest[i]
				}
				digits[0][17] += more
				var wire bytes.Buffer
				out := &encoder{to: &wire, hash: TypeRefreshRequest.checksum()}
				out.digits(g, digits)
				in := &decoder{from: &wire, hash: TypeRefreshRequest.checksum(), left: g.size(p.N())}
				in.digits(g, p.RingQ().AtLevel(level).NewPoly().Coeffs)
				if (in.err != nil) != (more > 0) {
					t.Errorf("level %d, %d bits dropped, %d above the greatest: %v", level, dropped, more, in.err)
				}
			}
		}
	}
}

// TestRefreshNoise holds what docs/engine.md says of the error of rounded requests, with the key:
// after the division it is less than 0.3 times the error of a rescaling. The noise of two
// rescaled ciphertexts, each times half of 2^shift, refreshed as one, is less than 10 % above
// what it is without rounding.
func TestRefreshNoise(t *testing.T) {
	for name, p := range map[string]*Parameters{
		"2^12": parameters(t, 12, []int{38, 28}, []int{38}, 28, "standard"),
		"2^13": small(t),
		"2^14": large(t),
		"real": parameters(t, 13, []int{45, 33, 33, 33}, []int{45}, 33, "conjugate_invariant"),
	} {
		a := newParty(t, p)
		for level := range min(2, p.MaxLevel()) {
			const count = 6
			var rescaled []*Ciphertext
			for range 2 * count {
				zero := a.encrypt(make([]complex128, p.Slots()), level+1)
				zero.Scale = zero.Scale.Mul(primeScale(p, level+1))
				rescaled = append(rescaled, must(a.e.Rescale(zero, nil)))
			}
			rescaling := deviation(a.integers(rescaled, 0))
			for _, shift := range []uint{8, 16} {
				var sent, pairs []*Ciphertext
				factor := math.Exp2(float64(shift))
				for i, ct := range rescaled[:count] {
					sent = append(sent, must(a.e.MulConstant(ct, complex(factor, 0), nil)))
					if !p.Real() {
						real := must(a.e.MulConstant(ct, complex(factor/2, 0), nil))
						imaginary := must(a.e.MulConstant(rescaled[count+i], complex(0, factor/2), nil))
						pairs = append(pairs, must(a.e.Add(real, imaginary, nil)))
					}
				}
				modulus, _ := new(big.Float).SetInt(p.RingQ().ModulusAtLevel[level]).Float64()
				before, after := a.integers(sent, shift), a.integers(a.refreshed(sent, level, shift), 0)
				for i := range after {
					// Modulo Q, for at level 0 the one or the other sum with a mask wraps around.
					after[i] = math.Remainder(after[i]-before[i], modulus/factor)
				}
				// An encryption has an error of its own, and a mask is rounded as the number is.
				added := math.Sqrt(math.Pow(deviation(after), 2) - math.Pow(p.NoiseFreshSK(), 2) - 1.0/6)
				t.Logf("%s, level %d, shift %d: rescaling %.2f, rounding %.2f", name, level, shift, rescaling, added)
				if added > 0.3*rescaling {
					t.Errorf("%s, level %d, shift %d: rounding makes an error of %.2f, a rescaling of %.2f", name, level, shift, added, rescaling)
				}
				if len(pairs) == 0 {
					continue
				}
				without := math.Hypot(deviation(a.integers(pairs, shift)), p.NoiseFreshSK())
				refreshed := a.integers(a.refreshed(pairs, level, shift), 0)
				for i := range refreshed {
					refreshed[i] = math.Remainder(refreshed[i], modulus/factor)
				}
				with := deviation(refreshed)
				t.Logf("pairs: noise of %.2f without rounding, of %.2f with it", without, with)
				if with > 1.1*without {
					t.Errorf("%s, level %d, shift %d: noise of %.2f without rounding, of %.2f with it", name, level, shift, without, with)
				}
			}
		}
	}
}

func (a party) refreshed(sent []*Ciphertext, level int, shift uint) []*Ciphertext {
	request, mask, err := a.e.Mask(sent, a.pk, level, a.p.MaxLevel(), shift)
	if err != nil {
		panic(err)
	}
	return must(a.e.Unmask(must(a.sk.Refresh(request)), mask))
}

// integers are the coefficients that ciphertexts decrypt to, divided by 2^shift.
func (a party) integers(ciphertexts []*Ciphertext, shift uint) (all []float64) {
	for _, ct := range ciphertexts {
		plaintext := must(a.sk.Decrypt(ct))
		ringQ := a.p.RingQ().AtLevel(ct.Level())
		ringQ.INTT(plaintext.Value, plaintext.Value)
		coefficients := make([]*big.Int, a.p.N())
		for i := range coefficients {
			coefficients[i] = new(big.Int)
		}
		ringQ.PolyToBigintCentered(plaintext.Value, 1, coefficients)
		for _, coefficient := range coefficients {
			value, _ := new(big.Float).SetInt(coefficient).Float64()
			all = append(all, math.Ldexp(value, -int(shift)))
		}
	}
	return all
}

// deviation is the standard deviation of numbers of mean zero.
func deviation(values []float64) float64 {
	sum := 0.0
	for _, value := range values {
		sum += value * value
	}
	return math.Sqrt(sum / float64(len(values)))
}

// TestARequestIsWhatTheReaderGets refreshes a request as it is in memory and as it was sent.
func TestARequestIsWhatTheReaderGets(t *testing.T) {
	a := newParty(t, large(t))
	ct := a.encrypt(noise(a.p.Slots()), 2)
	for _, shift := range []uint{0, 1, 2, 8, 16, maxShift} {
		for level := range 3 {
			request, _, err := a.e.Mask([]*Ciphertext{ct}, a.pk, level, 1, shift)
			if err != nil {
				t.Fatal(err)
			}
			var wire bytes.Buffer
			if err := request.Write(&wire); err != nil {
				t.Fatal(err)
			}
			data := wire.Bytes()
			read := must(Read(bytes.NewReader(data[HeaderSize:]), data[:HeaderSize], must(ParseHeader(data[:HeaderSize], TypeRefreshRequest, a.p)), a.p)).(*RefreshRequest)
			for i, polynomial := range read.Masked[0] {
				if !slices.EqualFunc(polynomial.Coeffs, request.Masked[0][i].Coeffs, slices.Equal[[]uint64]) {
					t.Errorf("level %d, shift %d: component %d changed on the way", level, shift, i)
				}
			}
			if rounded := request.grids() != nil; rounded != (level < 2 && shift > 1) {
				t.Errorf("level %d, shift %d: rounded %v", level, shift, rounded)
			}
		}
	}
}
