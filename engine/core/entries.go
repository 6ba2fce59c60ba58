package core

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// Evaluation keys can be made one by one, each by another process, and put together to
// the bytes that EvaluationKeys.Write writes, without ever being in memory together.

// EvaluationKeyEntry makes one evaluation key and returns its part of the bytes. Element 0
// stands for the relinearisation key.
func (sk *SecretKey) EvaluationKeyEntry(request KeyRequest) ([]byte, error) {
	p, requests, relin := sk.Params, []KeyRequest{request}, -1
	if request.Element == 0 {
		requests, relin = nil, request.Level
	}
	if err := p.checkRequests([]KeyRequest{request}); err != nil {
		return nil, err
	}
	keys, err := sk.NewEvaluationKeys(requests, relin)
	if err != nil {
		return nil, err
	}
	key := keys.list()[0]
	var entry bytes.Buffer
	entry.Grow(int(16 + evaluationKeySize(p, request.Level)))
	out := &encoder{to: &entry, hash: TypeEvaluationKeys.checksum()}
	out.entry(p, request.Element, key)
	return entry.Bytes(), out.err
}

// EntryOrder is the order in which the entries of requests are written: by element.
func EntryOrder(requests []KeyRequest) []KeyRequest {
	return slices.SortedFunc(slices.Values(requests), func(a, b KeyRequest) int {
		if a.Element < b.Element {
			return -1
		}
		return 1
	})
}

// Assembly puts entries together.
type Assembly struct {
	params   *Parameters
	requests []KeyRequest
	out      *encoder
	sink     bytes.Buffer
}

// NewAssembly begins, and returns the bytes before the entries. The entries come in the
// order of EntryOrder.
func NewAssembly(p *Parameters, key ID, requests []KeyRequest) (*Assembly, []byte, error) {
	if err := p.checkRequests(requests); err != nil {
		return nil, nil, err
	}
	a := &Assembly{params: p, requests: EntryOrder(requests)}
	a.out = &encoder{to: &a.sink, hash: TypeEvaluationKeys.checksum()}
	size := uint64(8)
	for _, request := range requests {
		size += 16 + evaluationKeySize(p, request.Level)
	}
	a.out.bytes(Header{Type: TypeEvaluationKeys, Params: p.ID, Key: key, Length: size + uint64(a.out.hash.Size())}.bytes())
	a.out.u32(uint32(len(requests)))
	a.out.u32(0)
	head := bytes.Clone(a.sink.Bytes())
	return a, head, a.out.err
}

// Add takes the next entry.
func (a *Assembly) Add(entry []byte) error {
	if len(a.requests) == 0 {
		return failure(Invalid, "more evaluation keys than were announced")
	}
	next := a.requests[0]
	if len(entry) < 16 || uint64(len(entry)) != 16+evaluationKeySize(a.params, next.Level) ||
		binary.LittleEndian.Uint64(entry) != next.Element || binary.LittleEndian.Uint64(entry[8:]) != uint64(next.Level) {
		return failure(Corrupt, "another evaluation key than the next, of element %d and level %d", next.Element, next.Level)
	}
	a.requests = a.requests[1:]
	a.out.hash.Write(entry)
	return nil
}

// Finish returns the bytes behind the entries.
func (a *Assembly) Finish() ([]byte, error) {
	if len(a.requests) > 0 {
		return nil, failure(Invalid, "%d evaluation keys are missing", len(a.requests))
	}
	return a.out.hash.Sum(nil), nil
}

// checkRequests checks what keys are asked for: each once, of a Galois element or 0, at a
// level that there is.
func (p *Parameters) checkRequests(requests []KeyRequest) error {
	seen := map[uint64]bool{}
	for _, request := range requests {
		if err := p.checkLevel(request.Level); err != nil {
			return err
		}
		element := request.Element
		if element != 0 && (element%2 == 0 || element == 1 || element >= p.RingQ().NthRoot()) || seen[element] {
			return failure(Invalid, "an evaluation key of element %d, asked for twice or impossible", element)
		}
		seen[element] = true
	}
	return nil
}

// ReplyBytes is what the ciphertexts of the reply take: for each a seed, and residues packed
// to bits.
func (r *RefreshRequest) ReplyBytes() (total uint64) {
	for _, held := range r.Held {
		for _, s := range held {
			total += s.compactSize(r.Params, r.To)
		}
	}
	return total
}
