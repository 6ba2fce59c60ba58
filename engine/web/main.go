//go:build js && wasm

// Command web is the client's half of the engine for JavaScript, built with GOOS=js
// GOARCH=wasm: keys, encryption, decryption and the client's half of a refresh. Nothing
// of the server's is reachable from it, so that the linker leaves it out.
//
// It sets globalThis.cipherlmEngine to an object with one function, open(parameters,
// secret), which returns a party (see party in party.go). Functions return what they
// promise, or {error, kind} where kind is a core.Kind. Bytes are Uint8Array in both
// directions, real slots are Float64Array.
package main

import (
	"fmt"
	"syscall/js"

	"cipherlm/engine/core"
)

func main() {
	js.Global().Set("cipherlmEngine", js.ValueOf(map[string]any{"open": function(2, open)}))
	select {}
}

// function makes a function of JavaScript that never throws and never ends the program.
func function(arguments int, body func(arguments []js.Value) any) js.Func {
	return js.FuncOf(func(_ js.Value, given []js.Value) (result any) {
		defer func() {
			if cause := recover(); cause != nil {
				result = failed(core.Recovered(cause))
			}
		}()
		if len(given) != arguments {
			panic(invalid("%d arguments, not %d", len(given), arguments))
		}
		return body(given)
	})
}

func failed(err error) any {
	kind := core.Internal
	if known, ok := err.(*core.Error); ok {
		kind = known.Kind
	}
	return map[string]any{"error": err.Error(), "kind": string(rune(kind))}
}

func invalid(format string, arguments ...any) error {
	return &core.Error{Kind: core.Invalid, Message: fmt.Sprintf(format, arguments...)}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}

// check panics with an error, to be caught by function.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

func bytesOf(value js.Value) []byte {
	if !value.InstanceOf(js.Global().Get("Uint8Array")) {
		panic(invalid("bytes are a Uint8Array"))
	}
	data := make([]byte, value.Length())
	js.CopyBytesToGo(data, value)
	return data
}

func arrayOf(data []byte) js.Value {
	array := js.Global().Get("Uint8Array").New(len(data))
	js.CopyBytesToJS(array, data)
	return array
}
