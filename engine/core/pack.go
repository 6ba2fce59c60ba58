package core

import (
	"encoding/binary"
	"math/bits"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// packedSize is the bytes of a polynomial with residues of exactly as many bits as
// their primes have.
func packedSize(rings []*ring.SubRing) (total uint64) {
	for _, r := range rings {
		total += limbSize(r)
	}
	return total
}

func limbSize(r *ring.SubRing) uint64 { return uint64(r.N*bits.Len64(r.Modulus)) / 8 }

// limbVisitor writes or reads the residues of a polynomial.
type limbVisitor func(rings []*ring.SubRing, coefficients [][]uint64)

// limbs writes residues, packed.
func (out *encoder) limbs(rings []*ring.SubRing, coefficients [][]uint64) {
	if out.err != nil {
		return
	}
	size := packedSize(rings)
	out.pack = grow(out.pack, size)
	out.err = parallel(len(rings), func(i int) error {
		r := rings[i]
		packBits(coefficients[i], bits.Len64(r.Modulus), out.pack[packedSize(rings[:i]):][:limbSize(r)])
		return nil
	})
	out.bytes(out.pack[:size])
}

// limbs reads residues and checks that each is below its prime.
func (in *decoder) limbs(rings []*ring.SubRing, coefficients [][]uint64) {
	size := packedSize(rings)
	in.pack = grow(in.pack, size+8)
	in.bytes(in.pack[:size])
	if in.err != nil {
		return
	}
	in.err = parallel(len(rings), func(i int) error {
		r := rings[i]
		if unpackBits(in.pack[packedSize(rings[:i]):], bits.Len64(r.Modulus), coefficients[i]) >= r.Modulus {
			return failure(Corrupt, "a coefficient that is not below its modulus")
		}
		return nil
	})
}

func grow(buffer []byte, size uint64) []byte {
	if uint64(cap(buffer)) < size {
		return make([]byte, size)
	}
	return buffer[:size]
}

// packBits writes values of width bits one after the other, little-endian. The number of
// values is a multiple of 64, as every ring's degree is.
func packBits(values []uint64, width int, out []byte) {
	word, filled, at := uint64(0), 0, 0
	for _, value := range values {
		word |= value << filled
		if filled+width >= 64 {
			binary.LittleEndian.PutUint64(out[at:], word)
			at += 8
			word = value >> (64 - filled) // 0 where filled is 0: a shift by 64
			filled += width - 64
		} else {
			filled += width
		}
	}
}

// unpackBits is the inverse of packBits; it returns the greatest value. The input
// has 8 bytes more than the packed values.
func unpackBits(in []byte, width int, values []uint64) (greatest uint64) {
	mask := uint64(1)<<width - 1
	for i := range values {
		bit := i * width
		at, shift := bit/8, bit%8
		value := binary.LittleEndian.Uint64(in[at:]) >> shift
		if shift+width > 64 {
			value |= uint64(in[at+8]) << (64 - shift)
		}
		value &= mask
		values[i] = value
		greatest = max(greatest, value)
	}
	return greatest
}
