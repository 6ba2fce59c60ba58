//go:build js && wasm

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"syscall/js"

	"cipherlm/engine/core"
)

// party is who holds a secret key.
type party struct {
	params *core.Parameters
	secret *core.SecretKey
}

// open(parameters, secret) makes a party: parameters as JSON, and the bytes of a secret
// key, or null for a new one.
func open(arguments []js.Value) any {
	params := must(core.NewParameters([]byte(arguments[0].String())))
	p := &party{params: params}
	if arguments[1].IsNull() {
		p.secret = must(core.NewSecretKey(params))
	} else {
		p.secret = read[*core.SecretKey](p, core.TypeSecretKey, bytesOf(arguments[1]))
	}
	return map[string]any{
		"parameters": string(params.Describe()),
		"key":        p.secret.ID.String(),
		"secret":     function(0, func([]js.Value) any { return written(p.secret) }),
		"publicKey":  function(0, func([]js.Value) any { return written(must(p.secret.PublicKey())) }),
		"entry":      function(2, p.entry),
		"assemble":   function(1, p.assemble),
		"encrypt":    function(2, p.encrypt),
		"decrypt":    function(1, p.decrypt),
		"refresh":    function(2, p.refresh),
	}
}

// entry(element, level) makes one evaluation key: see core.EvaluationKeyEntry.
func (p *party) entry(arguments []js.Value) any {
	request := core.KeyRequest{Element: uint64(arguments[0].Int()), Level: arguments[1].Int()}
	return arrayOf(must(p.secret.EvaluationKeyEntry(request)))
}

// assemble(requests) begins to put entries together: requests are [[element, level], ...]
// as JSON. It returns {head, order, add(entry), finish()}, where finish returns the bytes
// behind the entries and the SHA-256 of everything: {tail, sha256}.
func (p *party) assemble(arguments []js.Value) any {
	var pairs [][2]uint64
	check(json.Unmarshal([]byte(arguments[0].String()), &pairs))
	requests := make([]core.KeyRequest, len(pairs))
	for i, pair := range pairs {
		requests[i] = core.KeyRequest{Element: pair[0], Level: int(min(pair[1], math.MaxInt32))}
	}
	assembly, head, err := core.NewAssembly(p.params, p.secret.ID, requests)
	check(err)
	digest := sha256.New()
	digest.Write(head)
	for i, request := range core.EntryOrder(requests) {
		pairs[i] = [2]uint64{request.Element, uint64(request.Level)}
	}
	return map[string]any{
		"head":  arrayOf(head),
		"order": string(must(json.Marshal(pairs))),
		"add": function(1, func(arguments []js.Value) any {
			entry := bytesOf(arguments[0])
			check(assembly.Add(entry))
			digest.Write(entry)
			return true
		}),
		"finish": function(0, func([]js.Value) any {
			tail := must(assembly.Finish())
			digest.Write(tail)
			return map[string]any{"tail": arrayOf(tail), "sha256": hex.EncodeToString(digest.Sum(nil))}
		}),
	}
}

// encrypt(values, level) encrypts real slots, given as the bytes of 64-bit floating-point
// numbers, at the scale of the parameters.
func (p *party) encrypt(arguments []js.Value) any {
	data := bytesOf(arguments[0])
	values := make([]complex128, len(data)/8)
	for i := range values {
		values[i] = complex(math.Float64frombits(binary.LittleEndian.Uint64(data[8*i:])), 0)
	}
	plaintext := must(p.params.Encode(values, arguments[1].Int(), p.params.DefaultScale()))
	return written(must(p.secret.Encrypt(plaintext)))
}

// decrypt(ciphertext) returns the real parts of the slots, as encrypt takes them.
func (p *party) decrypt(arguments []js.Value) any {
	ciphertext := read[*core.Ciphertext](p, core.TypeCiphertext, bytesOf(arguments[0]))
	values := must(must(p.secret.Decrypt(ciphertext)).Decode(0))
	data := make([]byte, 0, 8*len(values))
	for _, value := range values {
		data = binary.LittleEndian.AppendUint64(data, math.Float64bits(real(value)))
	}
	return arrayOf(data)
}

// refresh(request, bytes) answers a request for a refresh, unless its reply would take
// more than so many bytes.
func (p *party) refresh(arguments []js.Value) any {
	request := read[*core.RefreshRequest](p, core.TypeRefreshRequest, bytesOf(arguments[0]))
	if size := request.ReplyBytes(); float64(size) > arguments[1].Float() {
		panic(invalid("%d fresh ciphertexts at level %d are more than a message holds", len(request.Masked), request.To))
	}
	return written(must(p.secret.Refresh(request)))
}

func written(object core.Object) js.Value {
	var frame bytes.Buffer
	check(object.Write(&frame))
	return arrayOf(frame.Bytes())
}

// read returns the object of all of the bytes.
func read[T any](p *party, kind core.Type, data []byte) T {
	size := min(core.HeaderSize, len(data))
	header := must(core.ParseHeader(data[:size], kind, p.params))
	rest := bytes.NewReader(data[size:])
	object := must(core.Read(rest, data[:size], header, p.params))
	if rest.Len() > 0 {
		panic(&core.Error{Kind: core.Corrupt, Message: "bytes after the end of an object"})
	}
	return object.(T)
}
