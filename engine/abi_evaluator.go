package main

/*
#include <stdint.h>
*/
import "C"

import (
	"unsafe"

	"cipherlm/engine/core"
)

// yield hands a result out: a new handle, or none where the result went to target.
func yield(out *C.uintptr_t, target C.uintptr_t, result *core.Ciphertext) {
	if target == 0 {
		put(out, result)
	}
}

func evaluate(evaluator, a, target C.uintptr_t, out *C.uintptr_t,
	apply func(e *core.Evaluator, a, out *core.Ciphertext) (*core.Ciphertext, error)) *C.char {
	return guard(func() {
		result, err := apply(get[*core.Evaluator](evaluator), get[*core.Ciphertext](a), optional[*core.Ciphertext](target))
		yield(out, target, must(result, err))
	})
}

//export cl_evaluator_new
func cl_evaluator_new(parameters, keys C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		put(out, must(core.NewEvaluator(get[*core.Parameters](parameters), optional[*core.EvaluationKeys](keys))))
	})
}

// cl_ciphertext_info gives level, degree, bytes in memory and whether it is seeded.
//
//export cl_ciphertext_info
func cl_ciphertext_info(ciphertext C.uintptr_t, info *C.int64_t, scale *C.double) *C.char {
	return guard(func() {
		ct, fields := get[*core.Ciphertext](ciphertext), slice[C.int64_t](unsafe.Pointer(info), 4)
		fields[0], fields[1], fields[2], fields[3] = C.int64_t(ct.Level()), C.int64_t(ct.Degree()), C.int64_t(ct.Bytes()), 0
		if ct.Seed != nil {
			fields[3] = 1
		}
		*scale = C.double(ct.Scale.Float64())
	})
}

//export cl_round
func cl_round(ciphertext C.uintptr_t, first, second C.int64_t) *C.char {
	return guard(func() { check(get[*core.Ciphertext](ciphertext).Round(int(first), int(second))) })
}

//export cl_copy
func cl_copy(ciphertext C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, get[*core.Ciphertext](ciphertext).Copy()) })
}

//export cl_set_scale
func cl_set_scale(a C.uintptr_t, scale C.double, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		result, err := get[*core.Ciphertext](a).SetScale(must(core.NewScale(float64(scale))), optional[*core.Ciphertext](target))
		yield(out, target, must(result, err))
	})
}

//export cl_drop_level
func cl_drop_level(a C.uintptr_t, level C.int64_t, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		result, err := get[*core.Ciphertext](a).DropLevel(int(level), optional[*core.Ciphertext](target))
		yield(out, target, must(result, err))
	})
}

//export cl_add
func cl_add(evaluator, a, b, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.Add(x, get[*core.Ciphertext](b), into)
	})
}

//export cl_subtract
func cl_subtract(evaluator, a, b, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.Sub(x, get[*core.Ciphertext](b), into)
	})
}

//export cl_add_plain
func cl_add_plain(evaluator, a, b, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.AddPlain(x, get[*core.Plaintext](b), into)
	})
}

//export cl_subtract_plain
func cl_subtract_plain(evaluator, a, b, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.SubPlain(x, get[*core.Plaintext](b), into)
	})
}

//export cl_multiply_plain
func cl_multiply_plain(evaluator, a, b, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.MulPlain(x, get[*core.Plaintext](b), into)
	})
}

//export cl_multiply
func cl_multiply(evaluator, a, b C.uintptr_t, relinearize C.int64_t, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.Mul(x, get[*core.Ciphertext](b), relinearize != 0, into)
	})
}

//export cl_add_constant
func cl_add_constant(evaluator, a C.uintptr_t, real, imag C.double, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.AddConstant(x, complex(float64(real), float64(imag)), into)
	})
}

//export cl_multiply_constant
func cl_multiply_constant(evaluator, a C.uintptr_t, real, imag C.double, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.MulConstant(x, complex(float64(real), float64(imag)), into)
	})
}

//export cl_relinearize
func cl_relinearize(evaluator, a, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, (*core.Evaluator).Relinearize)
}

//export cl_rescale
func cl_rescale(evaluator, a, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, (*core.Evaluator).Rescale)
}

//export cl_adjust_scale
func cl_adjust_scale(evaluator, a C.uintptr_t, scale C.double, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.AdjustScale(x, must(core.NewScale(float64(scale))), into)
	})
}

//export cl_rotate
func cl_rotate(evaluator, a C.uintptr_t, rotation C.int64_t, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.Rotate(x, int(rotation), into)
	})
}

//export cl_conjugate
func cl_conjugate(evaluator, a, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, (*core.Evaluator).Conjugate)
}

//export cl_inner_sum
func cl_inner_sum(evaluator, a C.uintptr_t, step, count C.int64_t, target C.uintptr_t, out *C.uintptr_t) *C.char {
	return evaluate(evaluator, a, target, out, func(e *core.Evaluator, x, into *core.Ciphertext) (*core.Ciphertext, error) {
		return e.InnerSum(x, int(step), int(count), into)
	})
}

// cl_inner_sum_rotations writes the rotations that an inner sum needs and their
// number, at most 64.
//
//export cl_inner_sum_rotations
func cl_inner_sum_rotations(step, count C.int64_t, rotations, number *C.int64_t) *C.char {
	return guard(func() {
		target := slice[C.int64_t](unsafe.Pointer(rotations), 64)
		list := core.InnerSumRotations(int(step), int(count))
		for i, rotation := range list {
			target[i] = C.int64_t(rotation)
		}
		*number = C.int64_t(len(list))
	})
}

//export cl_rotate_hoisted
func cl_rotate_hoisted(evaluator, a C.uintptr_t, rotations *C.int64_t, count C.int64_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		putAll(out, must(get[*core.Evaluator](evaluator).RotateHoisted(get[*core.Ciphertext](a), ints(rotations, count))))
	})
}

//export cl_dot
func cl_dot(evaluator C.uintptr_t, a, b *C.uintptr_t, count C.int64_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		put(out, must(get[*core.Evaluator](evaluator).Dot(all[*core.Ciphertext](a, count), all[*core.Ciphertext](b, count))))
	})
}

//export cl_dot_plain
func cl_dot_plain(evaluator C.uintptr_t, a, b *C.uintptr_t, count C.int64_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		put(out, must(get[*core.Evaluator](evaluator).DotPlain(all[*core.Ciphertext](a, count), all[*core.Plaintext](b, count))))
	})
}
