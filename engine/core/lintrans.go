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
