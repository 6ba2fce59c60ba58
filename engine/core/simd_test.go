package core

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestVectorCode holds the vector code equal to the library's, bit for bit.
func TestVectorCode(t *testing.T) {
	if !simd {
		t.Skip("no AVX-512 IFMA here")
	}
	defer func() { simd = true }()
	for name, p := range map[string]*Parameters{"complex": large(t), "real": product(t)} {
		t.Run(name, func(t *testing.T) { testVectorCode(t, p) })
	}
}

func testVectorCode(t *testing.T, p *Parameters) {
	values := noise(p.Slots())
	for _, length := range []int{p.Slots(), p.Slots() / 8, 16} {
		for _, storage := range []Storage{Int16, Int32, Residues} {
			for _, size := range []float64{1, 1e-6, 1e5} {
				scaled := make([]complex128, length)
				for i := range scaled {
					scaled[i] = complex(size, 0) * values[i]
				}
				d := must(newDiagonal(p, scaled, 0x1p36, 0, p.MaxLevel(), storage))
				for limb := range p.MaxLevel() + 1 {
					simd = true
					fast := slices.Clone(d.at(p, limb, make([]uint64, p.N())))
					simd = false
					slow := d.at(p, limb, make([]uint64, p.N()))
					if !slices.Equal(fast, slow) {
						t.Fatalf("length %d, storage %d, size %g, prime %d: the transforms differ", length, storage, size, limb)
					}
				}
			}
		}
	}
	for limb, subring := range p.RingQ().SubRings {
		for _, count := range []int{1, 3, 4, 33} {
			for _, gap := range []int{1, 8, 1024} {
				terms := make([]term, count)
				random := func(n int) []uint64 {
					residues := make([]uint64, n)
					for i := range residues {
						residues[i] = subring.Modulus - 1 - rand.Uint64N(1<<rand.Uint64N(30))
					}
					return residues
				}
				for i := range terms {
					terms[i] = term{random(p.N() / gap), gap, random(p.N()), random(p.N())}
				}
				var outputs [2][2][]uint64
				for i := range outputs {
					simd = i == 0
					outputs[i] = [2][]uint64{make([]uint64, p.N()), make([]uint64, p.N())}
					new(accumulator).sum(terms, subring, false, outputs[i][0], outputs[i][1])
				}
				if !slices.Equal(outputs[0][0], outputs[1][0]) || !slices.Equal(outputs[0][1], outputs[1][1]) {
					t.Fatalf("prime %d, %d terms, gap %d: the sums differ", limb, count, gap)
				}
			}
		}
	}
}

// TestPointwise holds arithmetic number by number equal to the library's.
func TestPointwise(t *testing.T) {
	if !simd {
		t.Skip("no AVX-512 IFMA here")
	}
	defer func() { simd = true }()
	for _, p := range []*Parameters{large(t), product(t)} {
		for prime, r := range slices.Concat(p.RingQ().SubRings, p.RingP().SubRings) {
			var values [5][]uint64
			for i := range values {
				values[i] = make([]uint64, p.N())
				for j := range values[i] {
					values[i][j] = rand.Uint64N(r.Modulus)
					if j%3 > 0 { // the greatest, or nearly
						values[i][j] = r.Modulus - 1 - uint64(j%3-1)*rand.Uint64N(1<<rand.Uint64N(20))
					}
				}
			}
			factor := r.Modulus - 1 - rand.Uint64N(3)
			for name, operation := range map[string]func(out []uint64){
				"sum":             func(out []uint64) { p.add(prime, values[0], values[1], out) },
				"sum of products": func(out []uint64) { copy(out, values[0]); p.multiplyAdd(prime, values[1], factor, out) },
				"difference":      func(out []uint64) { p.subtractMultiply(prime, values[0], values[1], factor, out) },
			} {
				var outputs [2][]uint64
				for i := range outputs {
					simd = i == 0
					outputs[i] = make([]uint64, p.N())
					operation(outputs[i])
				}
				if !slices.Equal(outputs[0], outputs[1]) {
					t.Errorf("prime %d: a %s differs", prime, name)
				}
			}
			if simd = true; !vectorised(r) {
				continue
			}
			for _, count := range []int{1, 8} {
				var outputs [2][2][]uint64
				for i := range outputs {
					outputs[i] = [2][]uint64{make([]uint64, p.N()), make([]uint64, p.N())}
				}
				terms := slices.Repeat([]term{{values[0], 1, values[1], values[2]}}, count)
				simdProduct(r, terms, outputs[0][0], outputs[0][1])
				simd = false
				new(accumulator).sum(terms, r, true, outputs[1][0], outputs[1][1])
				simd = true
				if !slices.Equal(outputs[0][0], outputs[1][0]) || !slices.Equal(outputs[0][1], outputs[1][1]) {
					t.Errorf("prime %d, %d terms: a product differs", prime, count)
				}
			}
		}
	}
}
