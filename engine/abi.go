// Command engine, built with -buildmode=c-shared, is the C ABI over package core.
//
// Conventions. Every function returns NULL or an error: a string whose first byte
// is its kind (core.Kind), to be freed with cl_free_string. Objects are handles
// (runtime/cgo.Handle), made by a function's last argument and freed with cl_free;
// a handle is never reused for another type without a check. A panic never leaves
// a function. Arrays belong to the caller and are not kept. Complex numbers are
// pairs of doubles.
package main

/*
#include <stdint.h>
#include <stdlib.h>
*/
import "C"

import (
	"fmt"
	"runtime/cgo"
	"unsafe"

	"cipherlm/engine/core"
)

func main() {}

// guard runs a body and turns its panic into an error for the caller.
func guard(body func()) (message *C.char) {
	defer func() {
		if cause := recover(); cause != nil {
			message = describe(core.Recovered(cause))
		}
	}()
	body()
	return nil
}

func describe(err error) *C.char {
	kind := core.Internal
	if known, ok := err.(*core.Error); ok {
		kind = known.Kind
	}
	return C.CString(string(rune(kind)) + err.Error())
}

// check panics with an error, to be caught by guard.
func check(err error) {
	if err == nil {
		return
	}
	if _, ok := err.(*core.Error); !ok {
		err = &core.Error{Kind: core.Internal, Message: err.Error()}
	}
	panic(err)
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

// get returns the object of a handle, of the type that is expected.
func get[T any](handle C.uintptr_t) T {
	value, ok := cgo.Handle(handle).Value().(T)
	if !ok {
		panic(&core.Error{Kind: core.Invalid, Message: fmt.Sprintf("not a %T", value)})
	}
	return value
}

// optional is get for a handle that may be 0.
func optional[T any](handle C.uintptr_t) (value T) {
	if handle == 0 {
		return value
	}
	return get[T](handle)
}

func all[T any](handles *C.uintptr_t, count C.int64_t) []T {
	values := make([]T, count)
	for i, handle := range slice[C.uintptr_t](unsafe.Pointer(handles), count) {
		values[i] = get[T](handle)
	}
	return values
}

func put(out *C.uintptr_t, value any) { *out = C.uintptr_t(cgo.NewHandle(value)) }

func putAll[T any](out *C.uintptr_t, values []T) {
	target := slice[C.uintptr_t](unsafe.Pointer(out), C.int64_t(len(values)))
	for i, value := range values {
		target[i] = C.uintptr_t(cgo.NewHandle(value))
	}
}

// slice is a view of the caller's array.
func slice[T any](pointer unsafe.Pointer, count C.int64_t) []T {
	if count == 0 {
		return nil
	}
	if count < 0 || pointer == nil {
		panic(&core.Error{Kind: core.Invalid, Message: "a missing array"})
	}
	return unsafe.Slice((*T)(pointer), count)
}

func ints(values *C.int64_t, count C.int64_t) []int {
	converted := make([]int, count)
	for i, value := range slice[C.int64_t](unsafe.Pointer(values), count) {
		converted[i] = int(value)
	}
	return converted
}

func complexes(values *C.double, count C.int64_t) []complex128 {
	return slice[complex128](unsafe.Pointer(values), count)
}

//export cl_free_string
func cl_free_string(text *C.char) { C.free(unsafe.Pointer(text)) }

//export cl_free
func cl_free(handle C.uintptr_t) *C.char {
	return guard(func() {
		if closer, ok := cgo.Handle(handle).Value().(interface{ Close() }); ok {
			closer.Close()
		}
		cgo.Handle(handle).Delete()
	})
}
