package core

import (
	"syscall"
	"testing"
)

// BenchmarkBinding runs the loops that `cipherlm bench engine` runs from Python, in
// Go: the difference between the two is what the binding costs.
func BenchmarkBinding(b *testing.B) {
	if err := SetThreads(1); err != nil {
		b.Fatal(err)
	}
	a := newParty(b, large(b), 1)
	x := a.encrypt(noise(a.p.Slots()), a.p.MaxLevel())
	plain := must(a.p.Encode(noise(a.p.Slots()), a.p.MaxLevel(), primeScale(a.p, a.p.MaxLevel())))
	for name, operation := range map[string]func() (*Ciphertext, error){
		"rotation": func() (*Ciphertext, error) { return a.e.Rotate(x, 1, nil) },
		"multiplication": func() (*Ciphertext, error) {
			product := must(a.e.Mul(x, x, true, nil))
			return a.e.Rescale(product, product)
		},
		"plaintext_multiplication": func() (*Ciphertext, error) {
			product := must(a.e.MulPlain(x, plain, nil))
			return a.e.Rescale(product, product)
		},
		"addition": func() (*Ciphertext, error) { return a.e.Add(x, x, nil) },
	} {
		b.Run(name, func(b *testing.B) {
			start := processorTime(b)
			for b.Loop() {
				must(operation())
			}
			b.ReportMetric(float64(processorTime(b)-start)/float64(b.N), "cpu-ns/op")
		})
	}
}

// processorTime is what all threads have used, in nanoseconds: steadier than the
// clock where other processes run.
func processorTime(b *testing.B) int64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return usage.Utime.Nano() + usage.Stime.Nano()
}

// BenchmarkDiagonal times what a linear transformation does with one diagonal and
// one prime.
func BenchmarkDiagonal(b *testing.B) {
	p := large(b)
	subring := p.RingQ().SubRings[1]
	residues := make([]uint64, p.N())
	for name, values := range map[string][]complex128{"full": noise(p.Slots()), "periodic": noise(p.Slots() / 8)} {
		for kind, storage := range map[string]Storage{"int16": Int16, "int32": Int32} {
			d := must(newDiagonal(p, append([]complex128{}, values...), p.DefaultScale().Float64(), 0, 1, storage))
			b.Run("transform/"+name+"/"+kind, func(b *testing.B) {
				for b.Loop() {
					d.at(p, 1, residues)
				}
			})
		}
	}
	const count = 32
	terms := make([]term, count)
	for i := range terms {
		terms[i] = term{make([]uint64, p.N()), 1, make([]uint64, p.N()), make([]uint64, p.N())}
	}
	out0, out1 := make([]uint64, p.N()), make([]uint64, p.N())
	var sum accumulator
	for name, gap := range map[string]int{"full": 1, "periodic": 8} {
		for i := range terms {
			terms[i].gap = gap
		}
		b.Run("accumulate32/"+name, func(b *testing.B) {
			for b.Loop() {
				sum.sum(terms, subring, false, out0, out1)
			}
		})
	}
}
