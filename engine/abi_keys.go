package main

/*
#include <stdint.h>
*/
import "C"

import (
	"encoding/json"
	"unsafe"

	"cipherlm/engine/core"
)

//export cl_parameters_new
func cl_parameters_new(text *C.char, size C.int64_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(core.NewParameters(slice[byte](unsafe.Pointer(text), size)))) })
}

//export cl_parameters_describe
func cl_parameters_describe(parameters C.uintptr_t, out **C.char) *C.char {
	return guard(func() { *out = C.CString(string(get[*core.Parameters](parameters).Describe())) })
}

//export cl_rotation_elements
func cl_rotation_elements(parameters C.uintptr_t, rotations *C.int64_t, count C.int64_t, out *C.uint64_t) *C.char {
	return guard(func() {
		p, elements := get[*core.Parameters](parameters), slice[C.uint64_t](unsafe.Pointer(out), count)
		for i, rotation := range ints(rotations, count) {
			elements[i] = C.uint64_t(p.RotationElement(rotation))
		}
	})
}

//export cl_conjugation_element
func cl_conjugation_element(parameters C.uintptr_t, out *C.uint64_t) *C.char {
	return guard(func() { *out = C.uint64_t(must(get[*core.Parameters](parameters).ConjugationElement())) })
}

//export cl_secret_key_new
func cl_secret_key_new(parameters C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(core.NewSecretKey(get[*core.Parameters](parameters)))) })
}

//export cl_public_key_new
func cl_public_key_new(secret C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(get[*core.SecretKey](secret).PublicKey())) })
}

//export cl_evaluation_keys_new
func cl_evaluation_keys_new(secret C.uintptr_t, elements *C.uint64_t, levels *C.int64_t, count, relin C.int64_t, out *C.uintptr_t) *C.char {
	return guard(func() {
		requests := make([]core.KeyRequest, count)
		at := ints(levels, count)
		for i, element := range slice[C.uint64_t](unsafe.Pointer(elements), count) {
			requests[i] = core.KeyRequest{Element: uint64(element), Level: at[i]}
		}
		put(out, must(get[*core.SecretKey](secret).NewEvaluationKeys(requests, int(relin))))
	})
}

// cl_evaluation_keys_describe gives levels and bytes, as JSON.
//
//export cl_evaluation_keys_describe
func cl_evaluation_keys_describe(keys C.uintptr_t, out **C.char) *C.char {
	return guard(func() {
		k := get[*core.EvaluationKeys](keys)
		relin, galois := k.Levels()
		text := must(json.Marshal(map[string]any{"relinearization": relin, "galois": galois, "nbytes": k.Bytes()}))
		*out = C.CString(string(text))
	})
}

//export cl_evaluation_keys_expand
func cl_evaluation_keys_expand(keys C.uintptr_t) *C.char {
	return guard(func() { check(get[*core.EvaluationKeys](keys).Expand()) })
}

// cl_key_id gives the name of the key that an object belongs to, 16 bytes.
//
//export cl_key_id
func cl_key_id(object C.uintptr_t, out *C.char) *C.char {
	return guard(func() { *(*core.ID)(unsafe.Pointer(out)) = get[interface{ KeyID() core.ID }](object).KeyID() })
}

//export cl_encode
func cl_encode(parameters C.uintptr_t, values *C.double, count, level C.int64_t, scale C.double, out *C.uintptr_t) *C.char {
	return guard(func() {
		put(out, must(get[*core.Parameters](parameters).Encode(complexes(values, count), int(level), must(core.NewScale(float64(scale))))))
	})
}

//export cl_decode
func cl_decode(plaintext C.uintptr_t, precision C.double, out *C.double, count C.int64_t) *C.char {
	return guard(func() {
		copy(complexes(out, count), must(get[*core.Plaintext](plaintext).Decode(float64(precision))))
	})
}

//export cl_plaintext_info
func cl_plaintext_info(plaintext C.uintptr_t, info *C.int64_t, scale *C.double) *C.char {
	return guard(func() {
		pt, fields := get[*core.Plaintext](plaintext), slice[C.int64_t](unsafe.Pointer(info), 2)
		fields[0], fields[1] = C.int64_t(pt.Level()), C.int64_t(pt.Bytes())
		*scale = C.double(pt.Scale.Float64())
	})
}

//export cl_plaintext_greatest
func cl_plaintext_greatest(plaintext C.uintptr_t, out *C.double) *C.char {
	return guard(func() { *out = C.double(must(get[*core.Plaintext](plaintext).Greatest())) })
}

//export cl_encrypt_secret
func cl_encrypt_secret(secret, plaintext C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(get[*core.SecretKey](secret).Encrypt(get[*core.Plaintext](plaintext)))) })
}

//export cl_encrypt_public
func cl_encrypt_public(public, plaintext C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(get[*core.PublicKey](public).Encrypt(get[*core.Plaintext](plaintext)))) })
}

//export cl_decrypt
func cl_decrypt(secret, ciphertext C.uintptr_t, out *C.uintptr_t) *C.char {
	return guard(func() { put(out, must(get[*core.SecretKey](secret).Decrypt(get[*core.Ciphertext](ciphertext)))) })
}
