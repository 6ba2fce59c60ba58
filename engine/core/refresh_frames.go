package core

import (
	"io"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// Write writes what the client must know and the masked ciphertexts. How they are rounded
// follows from level and shift.
func (r *RefreshRequest) Write(to io.Writer) error {
	rings, grids := r.Params.RingQ().SubRings[:r.Level+1], r.grids()
	size := uint64(8)
	for _, held := range r.Held {
		size += uint64(1+len(held)) + held.sent().maskedSize(r.Params, rings, grids)
	}
	h := Header{Type: TypeRefreshRequest, Params: r.Params.ID, Key: r.Key}
	return writeFrame(to, h, size, func(out *encoder) {
		out.bytes([]byte{byte(r.Level), byte(r.To), byte(r.Shift), 0})
		out.u32(uint32(len(r.Masked)))
		for i, masked := range r.Masked {
			out.bytes([]byte{byte(len(r.Held[i]))})
			for _, s := range r.Held[i] {
				out.bytes([]byte{s.code()})
			}
			for component, polynomial := range masked {
				if grids == nil {
					out.limbs(rings, polynomial.Coeffs)
				} else {
					out.digits(grids[component], polynomial.Coeffs)
				}
			}
		}
	})
}

// maskedSize is the bytes of a masked ciphertext.
func (s Subring) maskedSize(p *Parameters, rings []*ring.SubRing, grids []*grid) uint64 {
	if grids == nil {
		return residuesSize(rings, s.size(p)) + packedSize(rings)
	}
	return grids[0].size(s.size(p)) + grids[1].size(p.N())
}

// compactSize is the bytes of a fresh ciphertext.
func (s Subring) compactSize(p *Parameters, level int) uint64 {
	return 1 + seedSize + residuesSize(p.RingQ().SubRings[:level+1], s.size(p))
}

// held reads what a ciphertext holds, which is divided by 2^shift.
func (in *decoder) held(p *Parameters, shift uint) Held {
	held := make(Held, min(in.u8(), 3))
	for i := range held {
		held[i] = in.subring(p)
		if in.err == nil && held[i].checkShift(shift) != nil {
			in.fail("a division by 2^%d", shift)
		}
	}
	if in.err == nil && held.check(p) != nil {
		in.fail("a ciphertext of %d messages", len(held))
	}
	return held
}

// subring reads what is known of a message.
func (in *decoder) subring(p *Parameters) Subring {
	s := parseSubring(byte(in.u8()))
	if in.err == nil && s.check(p) != nil {
		in.fail("a subring that there is none of")
	}
	return s
}

func readRefreshRequest(in *decoder, p *Parameters, h Header) (any, error) {
	level, to, shift, padding, count := in.u8(), in.u8(), in.u8(), in.u8(), in.u32()
	if level > p.MaxLevel() || to > p.MaxLevel() || shift > maxShift || padding != 0 || count > maxBatch {
		in.fail("a refresh of %d ciphertexts from level %d to %d, divided by 2^%d", count, level, to, shift)
	}
	if in.err != nil {
		return nil, in.err
	}
	request := &RefreshRequest{Params: p, Key: h.Key, Level: level, To: to, Shift: uint(shift)}
	rings, grids := p.RingQ().SubRings[:level+1], request.grids()
	if !in.need(uint64(count)) {
		return nil, in.err
	}
	request.Held, request.Masked = make([]Held, count), make([][2]ring.Poly, count)
	for i := range request.Masked {
		request.Held[i] = in.held(p, request.Shift)
		if in.err != nil {
			return nil, in.err
		}
		s := request.Held[i].sent()
		if !in.need(s.maskedSize(p, rings, grids)) {
			return nil, in.err
		}
		for component, size := range [2]int{s.size(p), p.N()} {
			polynomial := ring.NewPoly(size, level)
			request.Masked[i][component] = polynomial
			if grids == nil {
				in.limbs(rings, polynomial.Coeffs)
			} else {
				in.digits(grids[component], polynomial.Coeffs)
			}
		}
	}
	return request, in.err
}

// Write writes the fresh ciphertexts, each as a seed and one component.
func (r *RefreshReply) Write(to io.Writer) error {
	rings := r.Params.RingQ().SubRings[:r.Level+1]
	size := uint64(8)
	for _, fresh := range r.Fresh {
		size += fresh.Subring.compactSize(r.Params, r.Level)
	}
	h := Header{Type: TypeRefreshReply, Params: r.Params.ID, Key: r.Key}
	return writeFrame(to, h, size, func(out *encoder) {
		out.u32(uint32(r.Level))
		out.u32(uint32(len(r.Fresh)))
		for _, fresh := range r.Fresh {
			out.bytes([]byte{fresh.Subring.code()})
			out.bytes(fresh.Seed[:])
			out.limbs(rings, fresh.First.Coeffs)
		}
	})
}

func readRefreshReply(in *decoder, p *Parameters, h Header) (any, error) {
	level, count := in.u32(), in.u32()
	if level > uint32(p.MaxLevel()) || count > 2*maxBatch {
		in.fail("a refresh reply of %d ciphertexts at level %d", count, level)
	}
	if in.err != nil {
		return nil, in.err
	}
	if !in.need(uint64(count)) {
		return nil, in.err
	}
	reply := &RefreshReply{p, h.Key, int(level), make([]*Compact, count)}
	rings := p.RingQ().SubRings[:level+1]
	for i := range reply.Fresh {
		s := in.subring(p)
		if in.err != nil || !in.need(s.compactSize(p, int(level))-1) {
			return nil, in.err
		}
		reply.Fresh[i] = &Compact{Subring: s, First: ring.NewPoly(s.size(p), int(level))}
		in.bytes(reply.Fresh[i].Seed[:])
		in.limbs(rings, reply.Fresh[i].First.Coeffs)
	}
	return reply, in.err
}
