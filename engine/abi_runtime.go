package main

/*
#include <stdint.h>
*/
import "C"

import (
	"runtime"
	"runtime/debug"

	"cipherlm/engine/core"
)

//export cl_nothing
func cl_nothing() *C.char { return guard(func() {}) }

//export cl_set_threads
func cl_set_threads(count C.int64_t) *C.char {
	return guard(func() { check(core.SetThreads(int(count))) })
}

//export cl_threads
func cl_threads() C.int64_t { return C.int64_t(core.Threads()) }

// cl_set_gc_percent sets how much the heap may grow, in percent of what is alive,
// before it is collected, and returns the former value.
//
//export cl_set_gc_percent
func cl_set_gc_percent(percent C.int64_t) C.int64_t {
	return C.int64_t(debug.SetGCPercent(int(percent)))
}

// cl_collect collects the heap and returns free memory to the system.
//
//export cl_collect
func cl_collect() *C.char { return guard(debug.FreeOSMemory) }

// cl_memory gives the bytes of live and dead objects, and of all memory held.
//
//export cl_memory
func cl_memory(heap, held *C.int64_t) *C.char {
	return guard(func() {
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		*heap, *held = C.int64_t(stats.HeapAlloc), C.int64_t(stats.Sys-stats.HeapReleased)
	})
}
