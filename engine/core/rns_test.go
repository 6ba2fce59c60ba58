package core

import (
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// TestCentred compares with integers of any size: numbers at random, and such near the
// points where the sign and the rounding turn.
func TestCentred(t *testing.T) {
	p := small(t)
	for _, from := range []int{0, 1, 2} {
		for _, shift := range []uint{0, 1, 7, 33, maxShift} {
			to := p.MaxLevel()
			modulus := p.RingQ().ModulusAtLevel[from]
			in, out := p.RingQ().AtLevel(from).NewPoly(), p.RingQ().AtLevel(to).NewPoly()
			numbers := make([]*big.Int, p.N())
			for i := range numbers {
				near := new(big.Int).Mul(big.NewInt(int64(i%8)-4), new(big.Int).Lsh(big.NewInt(1), shift))
				switch i % 3 {
				case 0:
					near.SetUint64(rand.Uint64()).Mul(near, new(big.Int).SetUint64(rand.Uint64()))
				case 1:
					near.Rsh(near, 1)
				default:
					near.Rsh(modulus, 1)
				}
				numbers[i] = near.Add(near, big.NewInt(rand.Int64N(7)-3)).Mod(near, modulus)
				for limb := range in.Coeffs {
					prime := new(big.Int).SetUint64(p.Q()[limb])
					in.Coeffs[limb][i] = new(big.Int).Mod(numbers[i], prime).Uint64()
				}
			}
			if err := newCentred(p.RingQ(), from, to, shift).convert(in, out); err != nil {
				t.Fatal(err)
			}
			checkCentred(t, p, modulus, shift, numbers, out)
		}
	}
}

func checkCentred(t *testing.T, p *Parameters, modulus *big.Int, shift uint, numbers []*big.Int, out ring.Poly) {
	t.Helper()
	half := new(big.Int).Rsh(modulus, 1)
	rounding := new(big.Int).Rsh(new(big.Int).Lsh(big.NewInt(1), shift), 1)
	for i, number := range numbers {
		value := new(big.Int).Set(number)
		if value.Cmp(half) > 0 {
			value.Sub(value, modulus)
		}
		value.Rsh(value.Add(value, rounding), shift) // rounds down, below zero too
		for limb := range out.Coeffs {
			want := new(big.Int).Mod(value, new(big.Int).SetUint64(p.Q()[limb])).Uint64()
			if got := out.Coeffs[limb][i]; got != want {
				t.Fatalf("modulo %v, divided by 2^%d: %v is %d modulo prime %d, not %d", modulus, shift, number, got, limb, want)
			}
		}
	}
}
