package core

import (
	"cmp"
	"maps"
	"math/cmplx"
	"slices"
	"sync"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
)

// LinearTransformation is a matrix given by its diagonals: the output is the sum
// over k of diagonal[k] times the input rotated by k. It is evaluated by baby steps
// and giant steps (Halevi and Shoup, CRYPTO 2014 and 2018): k = giant + baby with
// baby below the giant step, so that the rotated inputs serve all giant steps, and
// all matrices that are applied to one input.
//
// Either may be made in two stages: a baby step of a multiple of babyStage and what is
// left, a giant step of a multiple of giantStage and what is left. There are as many
// rotations then, with far fewer keys: a + b of them for a times b steps.
type LinearTransformation struct {
	Params     *Parameters
	Level      int
	giant      int
	babyStage  int
	giantStage int
	storage    Storage
	scale      rlwe.Scale
	rescale    bool // the product
	lock       sync.Mutex
	rows       map[int][]*diagonal // by giant step
	taken      map[int]bool
}

// NewLinearTransformation makes an empty matrix for inputs at a level. With scale 0 the
// diagonals are encoded at the scale of the level's last prime, so that the product,
// rescaled, has the scale of the input: such a matrix takes one level. With another
// scale the product stays at the level of the input, and its scale is that of the
// input times this one: for a product that nothing follows. The stage of baby steps
// divides the giant step, and that of giant steps is a multiple of it; with the giant
// step and the number of slots, there is one stage of each.
func NewLinearTransformation(p *Parameters, level, giantStep int, stages [2]int, storage Storage, scale float64) (*LinearTransformation, error) {
	if err := p.checkLevel(level); err != nil {
		return nil, err
	}
	if !(scale >= 0 && scale < 0x1p61) {
		return nil, failure(Scale, "a matrix cannot have the scale %g", scale)
	}
	if level == 0 && scale == 0 {
		return nil, failure(Level, "a linear transformation that is rescaled takes one level: its input cannot be at level 0")
	}
	if giantStep < 1 || giantStep > p.Slots() || p.Slots()%giantStep != 0 {
		return nil, failure(Invalid, "the giant step must divide the %d slots, not %d", p.Slots(), giantStep)
	}
	babies, giants := stages[0], stages[1]
	if babies < 1 || giantStep%babies != 0 || giants < 1 || giants%giantStep != 0 || p.Slots()%giants != 0 {
		return nil, failure(Invalid, "stages of %d and %d do not go with a giant step of %d", babies, giants, giantStep)
	}
	if storage < Int16 || storage > Residues {
		return nil, failure(Invalid, "unknown storage %d", storage)
	}
	rescale := scale == 0
	if rescale {
		scale = float64(p.Q()[level])
	}
	return &LinearTransformation{
		Params: p, Level: level, giant: giantStep, babyStage: babies, giantStage: giants, storage: storage, scale: rlwe.NewScale(scale), rescale: rescale,
		rows: map[int][]*diagonal{}, taken: map[int]bool{},
	}, nil
}

// Add encodes diagonals, in parallel. Diagonal i belongs to rotations[i] and is
// the i-th run of length values, each repeated inner times, the whole repeated
// until the slots are full.
func (lt *LinearTransformation) Add(rotations []int, values []complex128, inner int) error {
	p := lt.Params
	if len(rotations) == 0 || len(values)%len(rotations) != 0 || inner < 1 {
		return failure(Invalid, "%d values do not make %d diagonals", len(values), len(rotations))
	}
	length := len(values) / len(rotations)
	period := length * inner
	if length == 0 || period > p.Slots() || p.Slots()%period != 0 {
		return failure(Invalid, "a diagonal of %d values, each %d times, does not divide the %d slots", length, inner, p.Slots())
	}
	encoded := make([]*diagonal, len(rotations))
	factor := lt.scale.Float64()
	// Below 16 values the library's small transforms are not worth their corner cases.
	full := max(period, 16)
	err := parallel(len(rotations), func(i int) (err error) {
		rotation := p.normal(rotations[i])
		giant := rotation - rotation%lt.giant
		expanded := make([]complex128, full)
		for slot := range expanded {
			// The giant rotation comes after the product: undo it on the diagonal.
			source := ((slot-giant)%period + period) % period
			expanded[slot] = values[i*length+source/inner]
			if cmplx.IsNaN(expanded[slot]) || cmplx.IsInf(expanded[slot]) {
				return failure(Invalid, "a diagonal with a value that is not finite")
			}
		}
		encoded[i], err = newDiagonal(p, expanded, factor, rotation%lt.giant, lt.Level, lt.storage)
		return err
	})
	if err != nil {
		return err
	}
	lt.lock.Lock()
	defer lt.lock.Unlock()
	for i, rotation := range rotations {
		rotation = p.normal(rotation)
		if lt.taken[rotation] {
			return failure(Invalid, "diagonal %d was given twice", rotation)
		}
		lt.taken[rotation] = true
		if encoded[i] != nil {
			giant := rotation - rotation%lt.giant
			lt.rows[giant] = append(lt.rows[giant], encoded[i])
		}
	}
	return nil
}

// Stored describes the diagonals that a matrix keeps as integers, for a file.
type Stored struct {
	Rotations, Multipliers []int64
	Narrow                 []int16 // of Int16, the coefficients of one diagonal after those of another
	Wide                   []int32 // of Int32
}

// Stored returns the diagonals in the order of their rotations.
func (lt *LinearTransformation) Stored() (stored Stored, err error) {
	for _, giant := range lt.Giants() {
		row := slices.SortedFunc(slices.Values(lt.rows[giant]), func(a, b *diagonal) int { return a.baby - b.baby })
		for _, d := range row {
			if d.gap != 1 || d.residues.Coeffs != nil {
				return stored, failure(Invalid, "only whole diagonals, kept as integers, can be stored")
			}
			stored.Rotations = append(stored.Rotations, int64(giant+d.baby))
			stored.Multipliers = append(stored.Multipliers, d.multiplier)
			stored.Narrow = append(stored.Narrow, d.narrow...)
			stored.Wide = append(stored.Wide, d.wide...)
		}
	}
	return stored, nil
}

// Restore takes diagonals as Stored returned them. Their coefficients stay where they
// are: in a file that is mapped into memory, for example.
func (lt *LinearTransformation) Restore(stored Stored) error {
	p, count := lt.Params, len(stored.Rotations)
	if lt.storage == Residues || len(lt.rows) > 0 || len(stored.Multipliers) != count {
		return failure(Invalid, "diagonals can be restored in an empty matrix of integers only")
	}
	if len(stored.Narrow)+len(stored.Wide) != count*p.N() || (lt.storage == Int16) != (len(stored.Wide) == 0) {
		return failure(Invalid, "%d diagonals do not have %d coefficients", count, len(stored.Narrow)+len(stored.Wide))
	}
	for i, at := range stored.Rotations {
		rotation, multiplier := int(at), stored.Multipliers[i]
		if rotation < 0 || rotation >= p.Slots() || lt.taken[rotation] || multiplier < 1 || multiplier > 1<<45 {
			return failure(Invalid, "diagonal %d, times %d, cannot be", rotation, multiplier)
		}
		lt.taken[rotation] = true
		d := &diagonal{baby: rotation % lt.giant, gap: 1, multiplier: multiplier}
		if lt.storage == Int16 {
			d.narrow = stored.Narrow[i*p.N() : (i+1)*p.N()]
		} else {
			d.wide = stored.Wide[i*p.N() : (i+1)*p.N()]
		}
		lt.rows[rotation-d.baby] = append(lt.rows[rotation-d.baby], d)
	}
	return nil
}

// Storage tells how the diagonals are kept.
func (lt *LinearTransformation) Storage() Storage { return lt.storage }

// Giants lists the giant steps.
func (lt *LinearTransformation) Giants() []int { return slices.Sorted(maps.Keys(lt.rows)) }

// Babies lists the baby steps.
func (lt *LinearTransformation) Babies() []int {
	babies := map[int]bool{}
	for _, row := range lt.rows {
		for _, d := range row {
			babies[d.baby] = true
		}
	}
	return slices.Sorted(maps.Keys(babies))
}

// Bytes is the memory that the diagonals take.
func (lt *LinearTransformation) Bytes() (total int) {
	for _, row := range lt.rows {
		for _, d := range row {
			total += d.Bytes()
		}
	}
	return total
}

// Diagonals counts the diagonals that are not zero.
func (lt *LinearTransformation) Diagonals() (total int) {
	for _, row := range lt.rows {
		total += len(row)
	}
	return total
}

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

// sumBabies computes the inner sums of every giant step. Its jobs go prime by
// prime, so that the rotated inputs modulo one prime stay in the cache that the
// cores share.
func (e *Evaluator) sumBabies(level int, steps []*step, rotated []map[int]*Ciphertext) error {
	p := e.Params
	widest := 0
	for _, s := range steps {
		widest = max(widest, len(s.row))
		s.sums = make([]*Ciphertext, len(rotated))
		for i := range s.sums {
			s.sums[i] = rotated[i][s.row[0].baby].like(1, level)
		}
	}
	type scratch struct {
		residues    [][]uint64
		terms       []term
		accumulator accumulator
	}
	workers := make([]*scratch, Threads())
	return parallelWorkers(len(workers), len(steps)*(level+1), func(worker, job int) error {
		if workers[worker] == nil {
			workers[worker] = &scratch{make([][]uint64, widest), make([]term, widest), accumulator{}}
		}
		own, limb, s := workers[worker], job/len(steps), steps[job%len(steps)]
		subring := p.RingQ().SubRings[limb]
		for i, d := range s.row {
			if own.residues[i] == nil && d.residues.Coeffs == nil {
				own.residues[i] = make([]uint64, p.N())
			}
			own.terms[i] = term{plain: d.at(p, limb, own.residues[i]), gap: d.gap}
		}
		terms := own.terms[:len(s.row)]
		for input, sum := range s.sums {
			for i, d := range s.row {
				copied := rotated[input][d.baby]
				terms[i].c0, terms[i].c1 = copied.Value[0].Coeffs[limb], copied.Value[1].Coeffs[limb]
			}
			own.accumulator.sum(terms, subring, false, sum.Value[0].Coeffs[limb], sum.Value[1].Coeffs[limb])
		}
		return nil
	})
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
