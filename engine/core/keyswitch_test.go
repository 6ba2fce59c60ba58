package core

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/tuneinsight/lattigo/v6/circuits/ckks/polynomial"
	"github.com/tuneinsight/lattigo/v6/core/rlwe"
	"github.com/tuneinsight/lattigo/v6/ring"
	"github.com/tuneinsight/lattigo/v6/utils/bignum"
)

// TestTransforms holds the vector code equal to the library's, there and back.
func TestTransforms(t *testing.T) {
	for name, p := range map[string]*Parameters{"complex": large(t), "real": product(t)} {
		for prime := range p.QCount() + p.PCount() {
			r := p.subring(prime)
			values := make([]uint64, p.N())
			for i := range values {
				values[i] = r.Modulus - 1 - rand.Uint64N(1<<rand.Uint64N(30))
			}
			want, got := make([]uint64, p.N()), slices.Clone(values)
			r.NTT(values, want)
			p.forward(prime, got)
			if !slices.Equal(got, want) {
				t.Fatalf("%s, prime %d: the transforms differ", name, prime)
			}
			r.INTT(values, want)
			copy(got, values)
			p.backward(prime, got)
			if !slices.Equal(got, want) {
				t.Fatalf("%s, prime %d: the inverse transforms differ", name, prime)
			}
		}
	}
}

// TestKeySwitches holds what is built on key switches equal to the library's, bit for
// bit, with and without the vector code, in and out of place.
func TestKeySwitches(t *testing.T) {
	supported := simd
	defer func() { simd = supported }()
	for name, p := range map[string]*Parameters{
		"one special prime": small(t), "two": large(t),
		"real": parameters(t, 12, []int{38, 28}, []int{38}, 28, "conjugate_invariant"),
	} {
		a := newParty(t, p, 1, 5)
		element := p.RotationElement(5)
		for level := 1; level <= p.MaxLevel(); level++ {
			x, y := a.encrypt(noise(p.Slots()), level), a.encrypt(noise(p.Slots()), p.MaxLevel())
			rotated, product := x.Copy(), must(a.e.ckks.MulNew(x.Ciphertext, y.Ciphertext))
			if err := a.e.ckks.Automorphism(x.Ciphertext, element, rotated.Ciphertext); err != nil {
				t.Fatal(err)
			}
			linear := must(a.e.ckks.MulRelinNew(x.Ciphertext, y.Ciphertext))
			square := must(a.e.ckks.MulRelinNew(x.Ciphertext, x.Ciphertext))
			rescaled := product.CopyNew()
			if err := a.e.ckks.Rescale(rescaled, rescaled); err != nil {
				t.Fatal(err)
			}
			for _, vector := range []bool{true, false} {
				simd = vector && supported
				same := func(what string, got *Ciphertext, want *rlwe.Ciphertext) {
					t.Helper()
					if !got.Equal(want) {
						t.Errorf("%s, level %d, vector %v: %s differs", name, level, vector, what)
					}
				}
				same("rotation", must(a.e.Rotate(x, 5, nil)), rotated.Ciphertext)
				in := x.Copy()
				same("rotation in place", must(a.e.Rotate(in, 5, in)), rotated.Ciphertext)
				same("hoisted rotation", must(a.e.RotateHoisted(x, []int{1, 5}))[1], rotated.Ciphertext)
				quadratic := must(a.e.Mul(x, y, false, nil))
				same("product", quadratic, product)
				in = y.Copy()
				same("product in place", must(a.e.Mul(in, x, false, in)), must(a.e.ckks.MulNew(y.Ciphertext, x.Ciphertext)))
				same("rescaled product", must(a.e.Rescale(quadratic, nil)), rescaled)
				same("linear product", must(a.e.Mul(x, y, true, nil)), linear)
				in = y.Copy()
				same("linear product in place", must(a.e.Mul(in, x, true, in)), linear)
				in = x.Copy()
				same("square in place", must(a.e.Mul(in, in, true, in)), square)
				same("relinearised product", must(a.e.Relinearize(quadratic, nil)), linear)
				same("relinearised product in place", must(a.e.Relinearize(quadratic, quadratic)), linear)
				same("sum", must(a.e.Add(x, y, nil)), must(a.e.ckks.AddNew(x.Ciphertext, y.Ciphertext)))
				same("difference", must(a.e.Sub(x, y, nil)), must(a.e.ckks.SubNew(x.Ciphertext, y.Ciphertext)))
				in = y.Copy()
				same("difference in place", must(a.e.Sub(in, x, in)), must(a.e.ckks.SubNew(y.Ciphertext, x.Ciphertext)))
			}
		}
	}
}

// TestPolynomials holds polynomials equal to those that the library evaluates by itself, bit
// for bit: even and odd ones, too, whose powers have other scales.
func TestPolynomials(t *testing.T) {
	p := large(t)
	a := newParty(t, p)
	x := a.encrypt(noise(p.Slots()), p.MaxLevel())
	before := x.Copy()
	for _, degree := range []int{1, 2, 3, 7, 12, 15, 31, 63} {
		for _, step := range []int{1, 2} {
			c := Chebyshev{Coefficients: make([]float64, degree+1), From: -1, To: 1, Drift: 4}
			for i := degree % step; i <= degree; i += step {
				c.Coefficients[i] = rand.Float64() - 0.5
			}
			basis := bignum.NewPolynomial(bignum.Chebyshev, c.Coefficients, [2]float64{-1, 1})
			library := polynomial.NewEvaluator(p.Parameters, a.e.ckks)
			want := must(library.Evaluate(x.Ciphertext, polynomial.NewPolynomial(basis), p.DefaultScale()))
			if got := must(a.e.Evaluate(x, c)); !got.Equal(want) {
				t.Errorf("degree %d, step %d: polynomials differ", degree, step)
			}
		}
	}
	if !x.Equal(before.Ciphertext) {
		t.Error("the input has changed")
	}
}

// TestInnerSum sums with the keys of the binary method, and with those of steps of four.
func TestInnerSum(t *testing.T) {
	p := small(t)
	values := noise(p.Slots())
	for _, count := range []int{1, 2, 3, 4, 7, 8, 12, 16, 64, 100} {
		want := make([]complex128, len(values))
		for i := range want {
			for j := range count {
				want[i] += values[(i+5*j)%len(values)]
			}
		}
		keys := InnerSumRotations(5, count)
		for _, more := range [][]int{nil, {15, 60, 240}} {
			a := newParty(t, p, append(more, keys...)...)
			x := a.encrypt(values, 2)
			if d := distance(want, a.decrypt(must(a.e.InnerSum(x, 5, count, nil)))); d > 1e-4 {
				t.Errorf("%d terms, %d more keys: error %g", count, len(more), d)
			}
			must(a.e.InnerSum(x, 5, count, x))
			if d := distance(want, a.decrypt(x)); d > 1e-4 {
				t.Errorf("%d terms in place, %d more keys: error %g", count, len(more), d)
			}
		}
	}
}

// TestConversions holds the vector code's conversions between moduli equal to the
// library's, also for numbers beside which the library's floating-point sum may round up.
func TestConversions(t *testing.T) {
	if !simd {
		t.Skip("no AVX-512 IFMA here")
	}
	p := large(t)
	s := must(NewEvaluator(p, nil)).switcher
	level, top := p.MaxLevel(), p.MaxLevelP()
	// fill writes numbers modulo the product of two primes: random ones, and such near its
	// multiples and halves.
	fill := func(first, second []uint64, firstPrime, secondPrime uint64) {
		one, two := new(big.Int).SetUint64(firstPrime), new(big.Int).SetUint64(secondPrime)
		product := new(big.Int).Mul(one, two)
		for i := range first {
			number := new(big.Int).SetUint64(rand.Uint64N(firstPrime))
			number.Mul(number, two).Add(number, new(big.Int).SetUint64(rand.Uint64N(secondPrime)))
			if i%2 == 0 {
				number.Mul(product, big.NewInt(int64(i/2%3)))
				number.Rsh(number, 1).Add(number, big.NewInt(rand.Int64N(1<<rand.UintN(20)+1)-int64(i/6%64)))
			}
			first[i] = new(big.Int).Mod(number, one).Uint64()
			second[i] = new(big.Int).Mod(number, two).Uint64()
		}
	}
	same := func(c *pairing, prime int, x, y, want []uint64, what string) {
		t.Helper()
		got, r := make([]uint64, p.N()), p.subring(prime)
		c.to(p, prime, x, y, got)
		for i := range got {
			if got[i] >= 4*r.Modulus || got[i]%r.Modulus != want[i]%r.Modulus {
				t.Fatalf("%s, to prime %d: %d is %d, not %d", what, prime, i, got[i], want[i]%r.Modulus)
			}
		}
	}
	special, want := p.RingP().NewPoly(), p.RingQ().NewPoly()
	fill(special.Coeffs[0], special.Coeffs[1], p.P()[0], p.P()[1])
	s.extender.ModUpPtoQ(top, level, special, want)
	simdSplit(special.Coeffs[0], special.Coeffs[1], &s.remainder.split)
	for prime := range level + 1 {
		same(s.remainder, prime, special.Coeffs[0], special.Coeffs[1], want.Coeffs[prime], "P")
	}
	for digit, c := range s.digits {
		poly, wantP := p.RingQ().NewPoly(), p.RingP().NewPoly()
		x, y := poly.Coeffs[2*digit], poly.Coeffs[2*digit+1]
		fill(x, y, p.Q()[2*digit], p.Q()[2*digit+1])
		s.decomposer.DecomposeAndSplit(level, top, top+1, digit, poly, want, wantP)
		simdSplit(x, y, &c.split)
		for prime := range level + 1 {
			if prime/2 != digit {
				same(c, prime, x, y, want.Coeffs[prime], fmt.Sprint("digit ", digit))
			}
		}
		for i := range wantP.Coeffs {
			same(c, p.QCount()+i, x, y, wantP.Coeffs[i], fmt.Sprint("digit ", digit))
		}
	}
}

// TestPermutations holds automorphisms in the vector code equal to their index tables.
func TestPermutations(t *testing.T) {
	if !simd {
		t.Skip("no AVX-512 IFMA here")
	}
	p := large(t)
	e, r := must(NewEvaluator(p, nil)), p.subring(0)
	elements := []uint64{must(p.ConjugationElement()), 1, 3, uint64(2*p.N() - 3)}
	for range 20 {
		elements = append(elements, p.RotationElement(rand.IntN(p.Slots())), rand.Uint64N(uint64(p.N()))*2+1)
	}
	in, out := make([]uint64, p.N()), make([]uint64, p.N())
	for i := range in {
		in[i] = r.Modulus - 1 - uint64(i)
	}
	for _, element := range elements {
		index, err := ring.AutomorphismNTTIndex(p.N(), r.NthRoot, element)
		if err != nil {
			t.Fatal(err)
		}
		clear(out)
		e.Params.permute(0, in, index, out)
		e.Params.addPermuted(0, in, index, out)
		for i, from := range index {
			if want := ring.CRed(2*in[from], r.Modulus); out[i] != want {
				t.Fatalf("element %d: number %d is %d, not %d", element, i, out[i], want)
			}
		}
	}
}
