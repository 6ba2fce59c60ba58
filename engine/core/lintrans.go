package core

import (
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
type LinearTransformation struct {
	Params  *Parameters
	Level   int
	giant   int
	storage Storage
	scale   rlwe.Scale
	rescale bool // the product
	lock    sync.Mutex
	rows    map[int][]*diagonal // by giant step
	taken   map[int]bool
}

// NewLinearTransformation makes an empty matrix for inputs at a level. With scale 0 the
// diagonals are encoded at the scale of the level's last prime, so that the product,
// rescaled, has the scale of the input: such a matrix takes one level. With another
// scale the product stays at the level of the input, and its scale is that of the
// input times this one: for a product that nothing follows.
func NewLinearTransformation(p *Parameters, level, giantStep int, storage Storage, scale float64) (*LinearTransformation, error) {
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
	if storage < Int16 || storage > Residues {
		return nil, failure(Invalid, "unknown storage %d", storage)
	}
	rescale := scale == 0
	if rescale {
		scale = float64(p.Q()[level])
	}
	return &LinearTransformation{
		Params: p, Level: level, giant: giantStep, storage: storage, scale: rlwe.NewScale(scale), rescale: rescale,
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

// Transform applies matrices to inputs and returns results[matrix][input]. The baby steps of an input are computed once for all matrices, and a
// diagonal is transformed once for all inputs.
func (e *Evaluator) Transform(inputs []*Ciphertext, matrices []*LinearTransformation) ([][]*Ciphertext, error) {
	level, steps, babies, err := e.plan(inputs, matrices)
	if err != nil {
		return nil, err
	}
	rotated := make([]map[int]*Ciphertext, len(inputs))
	for i, input := range inputs {
		copies, err := e.rotations(input, babies, level)
		if err != nil {
			return nil, err
		}
		rotated[i] = map[int]*Ciphertext{}
		for j, baby := range babies {
			rotated[i][baby] = copies[j]
		}
	}
	if err := e.sumBabies(level, steps, rotated); err != nil {
		return nil, err
	}
	return e.sumGiants(level, inputs, matrices, steps)
}

// plan checks levels and keys and lists the giant steps of all matrices.
func (e *Evaluator) plan(inputs []*Ciphertext, matrices []*LinearTransformation) (int, []*step, []int, error) {
	if len(inputs) == 0 || len(matrices) == 0 {
		return 0, nil, nil, failure(Invalid, "no inputs or no matrices")
	}
	if err := e.own(true, inputs...); err != nil {
		return 0, nil, nil, err
	}
	level := matrices[0].Level
	var steps []*step
	union := map[int]bool{}
	for i, matrix := range matrices {
		if err := e.Params.same(matrix.Params); err != nil {
			return 0, nil, nil, err
		}
		if matrix.Level != level {
			return 0, nil, nil, failure(Level, "matrices for levels %d and %d on one input", level, matrix.Level)
		}
		for _, baby := range matrix.Babies() {
			union[baby] = true
		}
		for _, giant := range matrix.Giants() {
			steps = append(steps, &step{matrix: i, giant: giant, row: matrix.rows[giant]})
			if err := e.checkRotation(e.Params.RotationElement(giant), level, "giant step", giant); err != nil {
				return 0, nil, nil, err
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

// sumGiants rotates the inner sums and adds them up. The key switches are summed
// modulo QP and divided by P once (Bossuat et al., EUROCRYPT 2021).
func (e *Evaluator) sumGiants(level int, inputs []*Ciphertext, matrices []*LinearTransformation, steps []*step) ([][]*Ciphertext, error) {
	p, outputs := e.Params, len(matrices)*len(inputs)
	extended := p.RingQP().AtLevel(level, p.MaxLevelP())
	add := func(sum, more pair) {
		for i := range sum {
			extended.Add(sum[i], more[i], sum[i])
		}
		e.switcher.releasePair(more, level)
	}
	partial := make([][]*pair, Threads())
	err := parallelWorkers(len(partial), len(steps)*len(inputs), func(worker, job int) error {
		s, input := steps[job/len(inputs)], job%len(inputs)
		if s.giant == 0 {
			return nil
		}
		if partial[worker] == nil {
			partial[worker] = make([]*pair, outputs)
		}
		rotated, err := e.rotateExtended(s.sums[input], s.giant, level)
		if err != nil {
			return err
		}
		sum := &partial[worker][s.matrix*len(inputs)+input]
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
	results := make([][]*Ciphertext, len(matrices))
	for matrix := range results {
		results[matrix] = make([]*Ciphertext, len(inputs))
	}
	return results, parallel(outputs, func(output int) (err error) {
		matrix, input := output/len(inputs), output%len(inputs)
		result := inputs[input].like(1, level)
		var total *pair
		for _, sums := range partial {
			switch {
			case sums == nil || sums[output] == nil:
			case total == nil:
				total = sums[output]
			default:
				add(*total, *sums[output])
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
		for _, s := range steps {
			if s.matrix == matrix && s.giant == 0 {
				ringQ := p.RingQ().AtLevel(level)
				ringQ.Add(result.Value[0], s.sums[input].Value[0], result.Value[0])
				ringQ.Add(result.Value[1], s.sums[input].Value[1], result.Value[1])
			}
		}
		result.Scale = inputs[input].Scale.Mul(matrices[matrix].scale)
		if matrices[matrix].rescale {
			result, err = e.Rescale(result, result)
		}
		results[matrix][input] = result
		return err
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
