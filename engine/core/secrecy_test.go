package core

import (
	"reflect"
	"testing"
	"unsafe"

	"github.com/tuneinsight/lattigo/v6/core/rlwe"
)

// TestNoServerObjectReachesTheSecretKey follows every pointer, exported or not, from
// what a server holds: none leads to a secret key, to its polynomials or to a decryptor.
func TestNoServerObjectReachesTheSecretKey(t *testing.T) {
	a := newParty(t, small(t), 1, 2)
	ct := a.encrypt(noise(a.p.Slots()), 2)
	request, mask, err := a.e.Mask([]*Ciphertext{ct}, a.pk, 1, 2, 0)
	if err != nil {
		t.Fatal(err)
	}
	reply := must(a.sk.Refresh(request))
	secret := map[unsafe.Pointer]bool{}
	for _, limb := range append(append([][]uint64{}, a.sk.Value.Q.Coeffs...), a.sk.Value.P.Coeffs...) {
		secret[unsafe.Pointer(&limb[0])] = true
	}
	if !reaches(reflect.ValueOf(a.sk), secret) || !reaches(reflect.ValueOf(a.sk.SecretKey.Value), secret) {
		t.Fatal("the search does not find the key where it is")
	}
	for _, object := range []any{a.p, a.e, a.e.keys, a.pk, ct, request, mask, reply, must(a.sk.Encrypt(must(a.p.Encode(noise(4), 1, a.p.DefaultScale()))))} {
		if reaches(reflect.ValueOf(object), secret) {
			t.Errorf("a %T leads to the secret key", object)
		}
	}
}

func reaches(root reflect.Value, secret map[unsafe.Pointer]bool) bool {
	forbidden := map[reflect.Type]bool{
		reflect.TypeFor[rlwe.SecretKey](): true, reflect.TypeFor[rlwe.Decryptor](): true, reflect.TypeFor[SecretKey](): true,
	}
	type visit struct {
		at   unsafe.Pointer
		kind reflect.Type
	}
	seen := map[visit]bool{}
	var walk func(v reflect.Value) bool
	walk = func(v reflect.Value) bool {
		if !v.IsValid() {
			return false
		}
		if forbidden[v.Type()] {
			return true
		}
		switch v.Kind() {
		case reflect.Pointer, reflect.Map, reflect.Slice:
			if v.IsNil() {
				return false
			}
			at := v.UnsafePointer()
			if secret[at] {
				return true
			}
			// Slices of one array may differ in length: those are walked again.
			if key := (visit{at, v.Type()}); v.Kind() != reflect.Slice {
				if seen[key] {
					return false
				}
				seen[key] = true
			}
		}
		switch v.Kind() {
		case reflect.Pointer, reflect.Interface:
			return walk(v.Elem())
		case reflect.Map:
			for entries := v.MapRange(); entries.Next(); {
				if walk(entries.Key()) || walk(entries.Value()) {
					return true
				}
			}
		case reflect.Slice, reflect.Array:
			switch v.Type().Elem().Kind() {
			case reflect.Pointer, reflect.Interface, reflect.Map, reflect.Slice, reflect.Array, reflect.Struct:
				for i := range v.Len() {
					if walk(v.Index(i)) {
						return true
					}
				}
			}
		case reflect.Struct:
			for i := range v.NumField() {
				if walk(v.Field(i)) {
					return true
				}
			}
		}
		return false
	}
	return walk(root)
}
