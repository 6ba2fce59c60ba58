package main

/*
#include <stdint.h>
*/
import "C"

import (
	"unsafe"

	"cipherlm/engine/core"
)

// Objects are written and read piece by piece: the caller pulls bytes out of a
// writer until there are none, or pushes bytes into a reader, as many as the header
// tells, and takes the object.

// cl_writer_new also tells how many bytes there are, or 0 if that is not known.
//
//export cl_writer_new
func cl_writer_new(object C.uintptr_t, out *C.uintptr_t, size *C.int64_t) *C.char {
	return guard(func() {
		writer := must(core.NewWriter(get[core.Object](object)))
		put(out, writer)
		*size = C.int64_t(writer.Size())
	})
}

// cl_writer_read fills the buffer and tells how many bytes it wrote, 0 at the end.
//
//export cl_writer_read
func cl_writer_read(writer C.uintptr_t, buffer *C.char, size C.int64_t, written *C.int64_t) *C.char {
	return guard(func() {
		*written = C.int64_t(must(get[*core.Writer](writer).Read(slice[byte](unsafe.Pointer(buffer), size))))
	})
}

// cl_reader_new checks a header and tells how many bytes follow it.
//
//export cl_reader_new
func cl_reader_new(parameters C.uintptr_t, kind C.int64_t, header *C.char, size C.int64_t, out *C.uintptr_t, length *C.uint64_t) *C.char {
	return guard(func() {
		reader, h, err := core.NewReader(slice[byte](unsafe.Pointer(header), size), core.Type(kind), optional[*core.Parameters](parameters))
		check(err)
		put(out, reader)
		*length = C.uint64_t(h.Length)
	})
}

//export cl_reader_write
func cl_reader_write(reader C.uintptr_t, buffer *C.char, size C.int64_t) *C.char {
	return guard(func() { check(get[*core.Reader](reader).Write(slice[byte](unsafe.Pointer(buffer), size))) })
}

//export cl_reader_finish
func cl_reader_finish(reader C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(get[*core.Reader](reader).Finish())) })
}
