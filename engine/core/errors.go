// Package core is the engine without its C ABI: CKKS objects that know their
// parameters and their key, and the operations on them, on top of Lattigo.
//
// Everything cryptographic (rings, samplers, encryption, key switching,
// bootstrapping) is Lattigo's. What this package adds is checking (an operation
// that would go silently wrong is an error), batching and parallel execution,
// compact storage, a wire format and the two halves of the masked refresh.
package core

import "fmt"

// Kind classes an error for the caller on the other side of the ABI.
type Kind byte

// The kinds of error, each an exception class in Python.
const (
	Invalid   Kind = 'V' // an argument that makes no sense
	Insecure  Kind = 'S' // parameters below the security target
	Parameter Kind = 'P' // malformed parameters, or objects of different ones
	Key       Kind = 'K' // a missing key, one at too low a level, or a foreign one
	Level     Kind = 'L' // not enough levels left
	Scale     Kind = 'C' // scales that do not match
	Corrupt   Kind = 'D' // bytes that are not a valid object
	Internal  Kind = 'I' // a panic of the native side
)

// Error is an error with its kind.
type Error struct {
	Kind    Kind
	Message string
}

func (e *Error) Error() string { return e.Message }

func failure(kind Kind, format string, arguments ...any) error {
	return &Error{kind, fmt.Sprintf(format, arguments...)}
}
