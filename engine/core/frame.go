package core

import (
	"bytes"
	"encoding/binary"
	"hash"
	"hash/crc32"
	"io"

	"golang.org/x/crypto/blake2b"
)

// Every object travels in a frame: a header of fixed size, a payload whose length
// the header tells, and a checksum of both. The checksum finds accidents; it does
// not authenticate, which is the transport's task.
//
//	magic "CLHE" | version u16 | type u16 | parameters [16] | key [16] | length u64 | zeros [16]
const (
	magic      = "CLHE"
	HeaderSize = 64
)

// Type says what a frame holds.
type Type uint16

// The types of frame.
const (
	TypeParameters Type = iota + 1
	TypeSecretKey
	TypePublicKey
	TypeEvaluationKeys
	TypePlaintext
	TypeCiphertext
	TypeRefreshRequest
	TypeRefreshReply
	TypeBootstrappingKeys
	typeEnd
)

// version is that of the type's format. Ciphertexts and replies have seeds that are expanded
// with AES, for each prime apart, since version 3, and a short checksum since version 4;
// refresh requests have rounded coefficients since version 2, and a short checksum since 3.
// Requests since version 4, and replies since version 5, have less of messages in subrings.
func (t Type) version() uint16 {
	switch t {
	case TypeRefreshReply:
		return 5
	case TypeCiphertext, TypeRefreshRequest:
		return 4
	}
	return 1
}

// checksum is what finds accidents in a frame. Ciphertexts are on their way for seconds, and
// somebody waits for them: they have a CRC-32. Keys lie in files for years.
func (t Type) checksum() hash.Hash {
	switch t {
	case TypeCiphertext, TypeRefreshRequest, TypeRefreshReply:
		return crc32.NewIEEE()
	}
	digest, err := blake2b.New256(nil)
	if err != nil {
		panic(err)
	}
	return digest
}

// Header is a frame's header.
type Header struct {
	Type   Type
	Params ID
	Key    ID
	Length uint64 // of the payload and the checksum
}

func (h Header) bytes() []byte {
	out := make([]byte, HeaderSize)
	copy(out, magic)
	binary.LittleEndian.PutUint16(out[4:], h.Type.version())
	binary.LittleEndian.PutUint16(out[6:], uint16(h.Type))
	copy(out[8:], h.Params[:])
	copy(out[24:], h.Key[:])
	binary.LittleEndian.PutUint64(out[40:], h.Length)
	return out
}

// ParseHeader checks a header: form and version, and against what is expected.
// Parameters may be nil for a frame that holds parameters.
func ParseHeader(data []byte, expected Type, p *Parameters) (Header, error) {
	var h Header
	if len(data) != HeaderSize || string(data[:4]) != magic {
		return h, failure(Corrupt, "not an object of this engine")
	}
	h.Type = Type(binary.LittleEndian.Uint16(data[6:]))
	if found := binary.LittleEndian.Uint16(data[4:]); found != h.Type.version() {
		return h, failure(Corrupt, "format version %d: this engine reads version %d of such objects", found, h.Type.version())
	}
	copy(h.Params[:], data[8:])
	copy(h.Key[:], data[24:])
	h.Length = binary.LittleEndian.Uint64(data[40:])
	if !bytes.Equal(data[48:], make([]byte, 16)) || h.Type == 0 || h.Type >= typeEnd {
		return h, failure(Corrupt, "a damaged header")
	}
	if h.Type != expected {
		return h, failure(Corrupt, "a frame of type %d where type %d is expected", h.Type, expected)
	}
	if p != nil && h.Params != p.ID {
		return h, failure(Parameter, "an object of other parameters: %s, not %s", h.Params, p.ID)
	}
	least := uint64(h.Type.checksum().Size())
	if limit := h.Type.limit(p) + least; h.Length < least || h.Length > limit {
		return h, failure(Corrupt, "a length of %d bytes: such an object has at most %d", h.Length, limit)
	}
	return h, nil
}

// encoder writes a payload and its checksum; the first error sticks.
type encoder struct {
	to   io.Writer
	hash hash.Hash
	err  error
	pack []byte
}

// decoder reads a payload and checks it; the first error sticks.
type decoder struct {
	from io.Reader
	hash hash.Hash
	left uint64 // bytes before the checksum
	err  error
	pack []byte
}

// writeFrame writes a header for a payload of known length, the payload and the checksum.
func writeFrame(to io.Writer, h Header, payload uint64, write func(*encoder)) error {
	out := &encoder{to: to, hash: h.Type.checksum()}
	h.Length = payload + uint64(out.hash.Size())
	if buffer, ok := to.(*bytes.Buffer); ok {
		buffer.Grow(HeaderSize + int(h.Length))
	}
	out.bytes(h.bytes())
	write(out)
	if out.err == nil {
		_, out.err = to.Write(out.hash.Sum(nil))
	}
	return out.err
}

// readFrame reads a payload of the header's length.
func readFrame(from io.Reader, header []byte, h Header, read func(*decoder) error) error {
	in := &decoder{from: from, hash: h.Type.checksum()}
	in.left = h.Length - uint64(in.hash.Size())
	in.hash.Write(header)
	if err := read(in); err != nil {
		return err
	}
	if in.err == nil && in.left != 0 {
		in.fail("%d bytes too many", in.left)
	}
	if in.err != nil {
		return in.err
	}
	digest := make([]byte, in.hash.Size())
	if _, err := io.ReadFull(from, digest); err != nil {
		return failure(Corrupt, "truncated: %v", err)
	}
	if !bytes.Equal(digest, in.hash.Sum(nil)) {
		return failure(Corrupt, "wrong checksum: the bytes were changed")
	}
	return nil
}

func (out *encoder) bytes(data []byte) {
	if out.err == nil {
		out.hash.Write(data)
		_, out.err = out.to.Write(data)
	}
}

func (out *encoder) u8(value int) { out.bytes([]byte{byte(value)}) }

func (out *encoder) u32(value uint32) {
	out.bytes(binary.LittleEndian.AppendUint32(nil, value))
}

func (out *encoder) u64(value uint64) {
	out.bytes(binary.LittleEndian.AppendUint64(nil, value))
}

func (in *decoder) fail(format string, arguments ...any) {
	if in.err == nil {
		in.err = failure(Corrupt, format, arguments...)
	}
}

// need fails unless so many bytes are left: the check before any allocation.
func (in *decoder) need(bytes uint64) bool {
	if in.err == nil && bytes > in.left {
		in.fail("truncated: %d bytes are missing", bytes-in.left)
	}
	return in.err == nil
}

func (in *decoder) bytes(data []byte) {
	if !in.need(uint64(len(data))) {
		clear(data)
		return
	}
	in.left -= uint64(len(data))
	if _, err := io.ReadFull(in.from, data); err != nil {
		clear(data)
		in.fail("truncated: %v", err)
		return
	}
	in.hash.Write(data)
}

func (in *decoder) u8() int {
	var data [1]byte
	in.bytes(data[:])
	return int(data[0])
}

func (in *decoder) u32() uint32 {
	var data [4]byte
	in.bytes(data[:])
	return binary.LittleEndian.Uint32(data[:])
}

func (in *decoder) u64() uint64 {
	var data [8]byte
	in.bytes(data[:])
	return binary.LittleEndian.Uint64(data[:])
}
