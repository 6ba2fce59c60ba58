package core

import (
	"encoding/binary"
	"math/bits"

	"github.com/tuneinsight/lattigo/v6/ring"
)

// packedSize is the bytes of a polynomial with residues of exactly as many bits as
// their primes have.
func packedSize(rings []*ring.SubRing) uint64 { return residuesSize(rings, rings[0].N) }

// residuesSize is the bytes of so many residues for each prime.
func residuesSize(rings []*ring.SubRing, count int) (total uint64) {
	for _, r := range rings {
		total += bitsSize(count, bits.Len64(r.Modulus))
	}
	return total
}

// bitsSize is the bytes of so many numbers, a multiple of 64, of so many bits.
func bitsSize(count, width int) uint64 { return uint64(count*width) / 8 }

// limbVisitor writes or reads the residues of a polynomial.
type limbVisitor func(rings []*ring.SubRing, coefficients [][]uint64)

// limbs writes residues, packed, as many for each prime as there are.
func (out *encoder) limbs(rings []*ring.SubRing, coefficients [][]uint64) {
	if out.err != nil {
		return
	}
	count := len(coefficients[0])
	size := residuesSize(rings, count)
	out.pack = grow(out.pack, size)
	out.err = parallel(len(rings), func(i int) error {
		width := bits.Len64(rings[i].Modulus)
		packBits(coefficients[i], width, out.pack[residuesSize(rings[:i], count):][:bitsSize(count, width)])
		return nil
	})
	out.bytes(out.pack[:size])
}

// limbs reads residues and checks that each is below its prime.
func (in *decoder) limbs(rings []*ring.SubRing, coefficients [][]uint64) {
	count := len(coefficients[0])
	size := residuesSize(rings, count)
	in.pack = grow(in.pack, size+8)
	in.bytes(in.pack[:size])
	if in.err != nil {
		return
	}
	in.err = parallel(len(rings), func(i int) error {
		r := rings[i]
		if unpackBits(in.pack[residuesSize(rings[:i], count):], bits.Len64(r.Modulus), coefficients[i]) >= r.Modulus {
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
