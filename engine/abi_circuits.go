package main

/*
#include <stdint.h>
*/
import "C"

import (
	"slices"
	"unsafe"

	"cipherlm/engine/core"
)

//export cl_lintrans_new
func cl_lintrans_new(parameters C.uintptr_t, level, giant, babies, giants, storage C.int64_t, scale C.double, out *C.uintptr_t) *C.char {
	return guard(func() {
		p := get[*core.Parameters](parameters)
		put(out, must(core.NewLinearTransformation(p, int(level), int(giant), [2]int{int(babies), int(giants)}, core.Storage(storage), float64(scale))))
	})
}

// cl_lintrans_stored copies rotations, multipliers and coefficients (int16 or int32),
// each as many as there are diagonals; coefficients may be NULL.
//
//export cl_lintrans_stored
func cl_lintrans_stored(lintrans C.uintptr_t, rotations, multipliers *C.int64_t, coefficients unsafe.Pointer) *C.char {
	return guard(func() {
		lt := get[*core.LinearTransformation](lintrans)
		stored, count := must(lt.Stored()), lt.Diagonals()
		copy(slice[int64](unsafe.Pointer(rotations), C.int64_t(count)), stored.Rotations)
		copy(slice[int64](unsafe.Pointer(multipliers), C.int64_t(count)), stored.Multipliers)
		copy(slice[int16](coefficients, C.int64_t(len(stored.Narrow))), stored.Narrow)
		copy(slice[int32](coefficients, C.int64_t(len(stored.Wide))), stored.Wide)
	})
}

// cl_lintrans_restore gives a matrix diagonals whose coefficients stay where they are:
// the caller keeps them as long as the matrix lives.
//
//export cl_lintrans_restore
func cl_lintrans_restore(lintrans C.uintptr_t, rotations, multipliers *C.int64_t, count C.int64_t, coefficients unsafe.Pointer) *C.char {
	return guard(func() {
		lt := get[*core.LinearTransformation](lintrans)
		stored := core.Stored{
			Rotations:   slices.Clone(slice[int64](unsafe.Pointer(rotations), count)),
			Multipliers: slices.Clone(slice[int64](unsafe.Pointer(multipliers), count)),
		}
		if lt.Storage() == core.Int16 {
			stored.Narrow = slice[int16](coefficients, count*C.int64_t(lt.Params.N()))
		} else {
			stored.Wide = slice[int32](coefficients, count*C.int64_t(lt.Params.N()))
		}
		check(lt.Restore(stored))
	})
}

//export cl_lintrans_add
func cl_lintrans_add(lintrans C.uintptr_t, rotations *C.int64_t, count C.int64_t, values *C.double, length, inner C.int64_t) *C.char {
	return guard(func() {
		check(get[*core.LinearTransformation](lintrans).Add(ints(rotations, count), complexes(values, count*length), int(inner)))
	})
}

// cl_lintrans_info gives the bytes in memory and the number of diagonals.
//
//export cl_lintrans_info
func cl_lintrans_info(lintrans C.uintptr_t, info *C.int64_t) *C.char {
	return guard(func() {
		lt, fields := get[*core.LinearTransformation](lintrans), slice[C.int64_t](unsafe.Pointer(info), 2)
		fields[0], fields[1] = C.int64_t(lt.Bytes()), C.int64_t(lt.Diagonals())
	})
}

// cl_lintrans_apply writes the results matrix after matrix, each for all inputs.
//
//export cl_lintrans_apply
func cl_lintrans_apply(evaluator C.uintptr_t, inputs *C.uintptr_t, inputCount C.int64_t, matrices *C.uintptr_t, matrixCount C.int64_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		results := must(get[*core.Evaluator](evaluator).Transform(
			all[*core.Ciphertext](inputs, inputCount), all[*core.LinearTransformation](matrices, matrixCount)))
		var flat []*core.Ciphertext
		for _, row := range results {
			flat = append(flat, row...)
		}
		putAll(out, flat)
	})
}

func chebyshev(coefficients *C.double, count C.int64_t, from, to, drift C.double) core.Chebyshev {
	return core.Chebyshev{
		Coefficients: append([]float64{}, slice[float64](unsafe.Pointer(coefficients), count)...),
		From:         float64(from), To: float64(to), Drift: float64(drift),
	}
}

//export cl_polynomial
func cl_polynomial(evaluator, a C.uintptr_t, coefficients *C.double, count C.int64_t, from, to, drift C.double, out *C.uintptr_t) *C.char {
	return guard(func() {
		put(out, must(get[*core.Evaluator](evaluator).Evaluate(get[*core.Ciphertext](a), chebyshev(coefficients, count, from, to, drift))))
	})
}

//export cl_polynomial_levels
func cl_polynomial_levels(parameters C.uintptr_t, coefficients *C.double, count C.int64_t, from, to, drift, scale C.double, out *C.int64_t) *C.char {
	return guard(func() {
		*out = C.int64_t(must(chebyshev(coefficients, count, from, to, drift).Levels(get[*core.Parameters](parameters), float64(scale))))
	})
}

// cl_refresh_mask takes three numbers for each ciphertext: how often its slots repeat, 1 where
// they are real or else 0, and, where these are the real parts of slots, how often the
// imaginary ones repeat, or else 0.
//
//export cl_refresh_mask
func cl_refresh_mask(evaluator C.uintptr_t, inputs *C.uintptr_t, held *C.int64_t, count C.int64_t, public C.uintptr_t, level, to, shift C.int64_t, request, mask *C.uintptr_t) *C.char {
	return guard(func() {
		if shift < 0 {
			check(&core.Error{Kind: core.Invalid, Message: "a refresh cannot divide by less than 1"})
		}
		e, known := get[*core.Evaluator](evaluator), make([]core.Held, count)
		for i, numbers := 0, ints(held, 3*count); i < len(known); i++ {
			known[i] = core.Held{must(core.NewSubring(e.Params, numbers[3*i], numbers[3*i+1] != 0))}
			if imaginary := numbers[3*i+2]; imaginary != 0 {
				known[i] = append(known[i], must(core.NewSubring(e.Params, imaginary, true)))
			}
		}
		r, m, err := e.Mask(all[*core.Ciphertext](inputs, count),
			get[*core.PublicKey](public), int(level), int(to), uint(shift), known...)
		check(err)
		put(request, r)
		put(mask, m)
	})
}

//export cl_refresh_client
func cl_refresh_client(secret, request C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(get[*core.SecretKey](secret).Refresh(get[*core.RefreshRequest](request)))) })
}

//export cl_refresh_unmask
func cl_refresh_unmask(evaluator, reply, mask C.uintptr_t, out *C.uintptr_t, count C.int64_t) *C.char {
	return guard(func() {
		m := get[*core.RefreshMask](mask)
		if m.Count() != int(count) {
			check(&core.Error{Kind: core.Invalid, Message: "a mask of another refresh"})
		}
		putAll(out, must(get[*core.Evaluator](evaluator).Unmask(get[*core.RefreshReply](reply), m)))
	})
}

// cl_refresh_info gives level, target level and shift of a request, how many ciphertexts it
// has, and the bytes of those in its reply.
//
//export cl_refresh_info
func cl_refresh_info(request C.uintptr_t, info *C.int64_t) *C.char {
	return guard(func() {
		r, fields := get[*core.RefreshRequest](request), slice[C.int64_t](unsafe.Pointer(info), 5)
		fields[0], fields[1], fields[2], fields[3] = C.int64_t(r.Level), C.int64_t(r.To), C.int64_t(r.Shift), C.int64_t(len(r.Masked))
		fields[4] = C.int64_t(r.ReplyBytes())
	})
}

// cl_refresh_reply_count gives the number of ciphertexts in a reply.
//
//export cl_refresh_reply_count
func cl_refresh_reply_count(reply C.uintptr_t, count *C.int64_t) *C.char {
	return guard(func() { *count = C.int64_t(len(get[*core.RefreshReply](reply).Fresh)) })
}

//export cl_rerandomize
func cl_rerandomize(evaluator, a, public C.uintptr_t, flood C.int64_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		put(out, must(get[*core.Evaluator](evaluator).Rerandomize(get[*core.Ciphertext](a), get[*core.PublicKey](public), int(flood))))
	})
}

//export cl_bootstrapping_keys_new
func cl_bootstrapping_keys_new(secret C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(get[*core.SecretKey](secret).BootstrappingKeys())) })
}

//export cl_bootstrapping_keys_bytes
func cl_bootstrapping_keys_bytes(keys C.uintptr_t, bytes *C.int64_t) *C.char {
	return guard(func() { *bytes = C.int64_t(get[*core.BootstrappingKeys](keys).Bytes()) })
}

//export cl_bootstrapper_new
func cl_bootstrapper_new(keys C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(core.NewBootstrapper(get[*core.BootstrappingKeys](keys)))) })
}

//export cl_bootstrap
func cl_bootstrap(bootstrapper, ciphertext C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		put(out, must(get[*core.Bootstrapper](bootstrapper).Bootstrap(get[*core.Ciphertext](ciphertext))))
	})
}
