package core

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
)

// step is one giant step of one matrix.
type step struct {
	matrix, giant int
	row           []*diagonal
	sums          []*Ciphertext // of baby steps, one for each input
}

// Transform applies matrices to inputs and returns results[matrix][input]. The baby
// steps of an input are computed once for all matrices, and a diagonal is transformed
// once for all inputs.
func (e *Evaluator) Transform(inputs []*Ciphertext, matrices []*LinearTransformation) ([][]*Ciphertext, error) {
	level, steps, babies, err := e.plan(inputs, matrices)
	if err != nil {
		return nil, err
	}
	rotated := make([]map[int]*Ciphertext, len(inputs))
	for i, input := range inputs {
		if rotated[i], err = e.babySteps(input, babies, matrices[0].babyStage, level); err != nil {
			return nil, err
		}
	}
	if err := e.sumBabies(level, steps, rotated); err != nil {
		return nil, err
	}
	return e.sumGiants(level, inputs, matrices, steps)
}

// babySteps returns rotations of an input by what they rotate by, in two stages where
// they are not all below one.
func (e *Evaluator) babySteps(input *Ciphertext, babies []int, stage, level int) (map[int]*Ciphertext, error) {
	rotated := make(map[int]*Ciphertext, len(babies))
	fine := map[int][]int{}
	for _, baby := range babies {
		coarse := baby - baby%stage
		fine[coarse] = append(fine[coarse], baby%stage)
	}
	coarse := slices.Sorted(maps.Keys(fine))
	starts := []*Ciphertext{input}
	if len(coarse) > 1 || coarse[0] != 0 {
		var err error
		if starts, err = e.rotations(input, coarse, level); err != nil {
			return nil, err
		}
	}
	for i, at := range coarse {
		copies, err := e.rotations(starts[i], fine[at], level)
		if err != nil {
			return nil, err
		}
		for j, baby := range fine[at] {
			rotated[at+baby] = copies[j]
		}
	}
	return rotated, nil
}

// plan checks levels and keys and lists the giant steps of all matrices.
func (e *Evaluator) plan(inputs []*Ciphertext, matrices []*LinearTransformation) (int, []*step, []int, error) {
	if len(inputs) == 0 || len(matrices) == 0 {
		return 0, nil, nil, failure(Invalid, "no inputs or no matrices")
	}
	if err := e.own(true, inputs...); err != nil {
		return 0, nil, nil, err
	}
	level, stage := matrices[0].Level, matrices[0].babyStage
	var steps []*step
	union := map[int]bool{}
	for i, matrix := range matrices {
		if err := e.Params.same(matrix.Params); err != nil {
			return 0, nil, nil, err
		}
		if matrix.Level != level || matrix.babyStage != stage {
			return 0, nil, nil, failure(Level, "matrices for levels %d and %d, with stages of %d and %d, on one input", level, matrix.Level, stage, matrix.babyStage)
		}
		for _, baby := range matrix.Babies() {
			union[baby] = true
		}
		for _, giant := range matrix.Giants() {
			steps = append(steps, &step{matrix: i, giant: giant, row: matrix.rows[giant]})
			for _, part := range []int{giant % matrix.giantStage, giant - giant%matrix.giantStage} {
				if err := e.checkRotation(e.Params.RotationElement(part), level, "giant step", part); err != nil {
					return 0, nil, nil, err
				}
			}
		}
	}
	for _, input := range inputs {
		if input.Level() < level {
			return 0, nil, nil, failure(Level, "an input at level %d for a matrix made for level %d", input.Level(), level)
		}
		if err := inputs[0].compatible(input); err != nil {
			return 0, nil, nil, err
		}
	}
	return level, steps, slices.Sorted(maps.Keys(union)), nil
}

// stepsAtOnce is how many giant steps a thread works on at a time, where there are several
// inputs: a block of coefficients of their diagonals, and of the rotations of one input,
// which all of them take, fits a core's cache.
const stepsAtOnce = 4

// sumBabies computes the inner sums of every giant step. Its jobs go prime by
// prime, so that the rotated inputs modulo one prime stay in the cache that the
// cores share.
func (e *Evaluator) sumBabies(level int, steps []*step, rotated []map[int]*Ciphertext) error {
	for _, s := range steps {
		s.sums = make([]*Ciphertext, len(rotated))
		for i := range s.sums {
			s.sums[i] = rotated[i][s.row[0].baby].like(1, level)
		}
	}
	each := 1
	if len(rotated) > 1 {
		each = stepsAtOnce
	}
	groups := slices.Collect(slices.Chunk(steps, each))
	return parallel(len(groups)*(level+1), func(job int) error {
		own := summations.Get().(*summation)
		defer own.release()
		own.run(e.Params, job/len(groups), groups[job%len(groups)], rotated)
		return nil
	})
}

// summation is what a thread needs for inner sums.
type summation struct {
	residues    [][]uint64
	terms       []term
	accumulator accumulator
}

var summations = sync.Pool{New: func() any { return &summation{} }}

// run computes the inner sums of giant steps modulo one prime.
func (own *summation) run(p *Parameters, limb int, steps []*step, rotated []map[int]*Ciphertext) {
	own.terms = own.terms[:0]
	for _, s := range steps {
		for _, d := range s.row {
			var residues []uint64
			if d.residues.Coeffs == nil {
				residues = own.scratch(len(own.terms), p.N())
			}
			own.terms = append(own.terms, term{plain: d.at(p, limb, residues), gap: d.gap})
		}
	}
	diagonals := len(own.terms)
	for _, copies := range rotated {
		for _, s := range steps {
			for _, d := range s.row {
				copied, known := copies[d.baby], own.terms[len(own.terms)%diagonals]
				c0, c1 := copied.Value[0].Coeffs[limb], copied.Value[1].Coeffs[limb]
				own.terms = append(own.terms, term{known.plain, known.gap, c0, c1})
			}
		}
	}
	own.accumulator.prepare(p.RingQ().SubRings[limb], false)
	for start := 0; start < p.N(); start += block {
		rest := own.terms[diagonals:]
		for input := range rotated {
			for _, s := range steps {
				sum := s.sums[input]
				own.accumulator.sumBlock(rest[:len(s.row)], start, sum.Value[0].Coeffs[limb], sum.Value[1].Coeffs[limb])
				rest = rest[len(s.row):]
			}
		}
	}
}

// release keeps the memory for another thread, and no ciphertexts.
func (own *summation) release() {
	clear(own.terms)
	summations.Put(own)
}

// scratch returns memory for the residues of a diagonal.
func (own *summation) scratch(index, size int) []uint64 {
	for index >= len(own.residues) {
		own.residues = append(own.residues, nil)
	}
	if len(own.residues[index]) < size {
		own.residues[index] = make([]uint64, size)
	}
	return own.residues[index]
}

// sumGiants rotates the inner sums and adds them up, in one or two stages.
func (e *Evaluator) sumGiants(level int, inputs []*Ciphertext, matrices []*LinearTransformation, steps []*step) ([][]*Ciphertext, error) {
	// An output is one of a matrix and an input; before the second stage there is one for each multiple of it.
	type part struct{ output, coarse int }
	first := map[part][]turned{}
	for _, s := range steps {
		coarse := s.giant - s.giant%matrices[s.matrix].giantStage
		for input, sum := range s.sums {
			at := part{s.matrix*len(inputs) + input, coarse}
			first[at] = append(first[at], turned{sum, s.giant - coarse})
		}
	}
	parts := slices.SortedFunc(maps.Keys(first), func(a, b part) int {
		return cmp.Or(cmp.Compare(a.output, b.output), cmp.Compare(a.coarse, b.coarse))
	})
	sums := make([][]turned, len(parts))
	for i, at := range parts {
		sums[i] = first[at]
	}
	inner, err := e.sumTurned(level, sums)
	if err != nil {
		return nil, err
	}
	second := make([][]turned, len(matrices)*len(inputs))
	for i, at := range parts {
		second[at.output] = append(second[at.output], turned{inner[i], at.coarse})
	}
	outer, err := e.sumTurned(level, second)
	if err != nil {
		return nil, err
	}
	results := make([][]*Ciphertext, len(matrices))
	for matrix := range results {
		results[matrix] = make([]*Ciphertext, len(inputs))
	}
	return results, parallel(len(outer), func(output int) (err error) {
		matrix, input := output/len(inputs), output%len(inputs)
		result := outer[output]
		if result == nil { // a matrix without diagonals
			result = inputs[input].like(1, level)
		}
		result.Scale = inputs[input].Scale.Mul(matrices[matrix].scale)
		if matrices[matrix].rescale {
			result, err = e.Rescale(result, result)
		}
		results[matrix][input] = result
		return err
	})
}

// turned is a ciphertext that is still to be rotated.
type turned struct {
	ciphertext *Ciphertext
	rotation   int
}

// sumTurned returns the sum of each group, nil for an empty one. Key switches are summed
// modulo QP and divided by P once (Bossuat et al., EUROCRYPT 2021). One ciphertext that
// is not rotated is returned as it is.
func (e *Evaluator) sumTurned(level int, groups [][]turned) ([]*Ciphertext, error) {
	p := e.Params
	extended := p.RingQP().AtLevel(level, p.MaxLevelP())
	add := func(sum, more pair) {
		for i := range sum {
			extended.Add(sum[i], more[i], sum[i])
		}
		e.switcher.releasePair(more, level)
	}
	type job struct {
		turned
		group int
	}
	var jobs []job
	for i, group := range groups {
		for _, one := range group {
			if one.rotation != 0 {
				jobs = append(jobs, job{one, i})
			}
		}
	}
	partial := make([][]*pair, Threads())
	err := parallelWorkers(len(partial), len(jobs), func(worker, i int) error {
		if partial[worker] == nil {
			partial[worker] = make([]*pair, len(groups))
		}
		rotated, err := e.rotateExtended(jobs[i].ciphertext, jobs[i].rotation, level)
		if err != nil {
			return err
		}
		sum := &partial[worker][jobs[i].group]
		if *sum == nil {
			*sum = &rotated
		} else {
			add(**sum, rotated)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	results := make([]*Ciphertext, len(groups))
	return results, parallel(len(groups), func(group int) error {
		if len(groups[group]) == 0 {
			return nil
		}
		if only := groups[group][0]; len(groups[group]) == 1 && only.rotation == 0 {
			results[group] = only.ciphertext
			return nil
		}
		result := groups[group][0].ciphertext.like(1, level)
		var total *pair
		for _, sums := range partial {
			switch {
			case sums == nil || sums[group] == nil:
			case total == nil:
				total = sums[group]
			default:
				add(*total, *sums[group])
			}
		}
		if total != nil {
			defer e.switcher.releasePair(*total, level)
			err := e.switcher.divide(*total, level, func(component, prime int, quotient []uint64) {
				copy(result.Value[component].Coeffs[prime], quotient)
			})
			if err != nil {
				return err
			}
		}
		for _, one := range groups[group] {
			if one.rotation == 0 {
				ringQ := p.RingQ().AtLevel(level)
				ringQ.Add(result.Value[0], one.ciphertext.Value[0], result.Value[0])
				ringQ.Add(result.Value[1], one.ciphertext.Value[1], result.Value[1])
			}
		}
		results[group] = result
		return nil
	})
}

// rotateExtended rotates and leaves the result modulo QP, times P.
func (e *Evaluator) rotateExtended(ct *Ciphertext, rotation, level int) (result pair, err error) {
	p := e.Params
	element := p.RotationElement(rotation)
	key, err := e.ckks.CheckAndGetGaloisKey(element)
	if err != nil {
		return result, err
	}
	digits, err := e.switcher.decompose(ct.Value[1], level, false)
	if err != nil {
		return result, err
	}
	defer digits.release()
	return e.sumRotations(ct, digits, []*rlwe.GaloisKey{key})
}
