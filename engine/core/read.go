package core

import (
	"bytes"
	"encoding/json"
	"io"
)

// Read reads the object whose header was parsed. header is the header's bytes.
func Read(from io.Reader, header []byte, h Header, p *Parameters) (object any, err error) {
	readers := map[Type]func(*decoder, *Parameters, Header) (any, error){
		TypeParameters:     readParameters,
		TypeSecretKey:      readSecretKey,
		TypePublicKey:      readPublicKey,
		TypeEvaluationKeys: readEvaluationKeys,
		TypePlaintext:      readPlaintext,
		TypeCiphertext:     readCiphertext,
		TypeRefreshRequest: readRefreshRequest,
		TypeRefreshReply:   readRefreshReply,

		TypeBootstrappingKeys: readBootstrappingKeys,
	}
	read, ok := readers[h.Type]
	if !ok || (p == nil) != (h.Type == TypeParameters) {
		return nil, failure(Corrupt, "a frame of type %d cannot be read here", h.Type)
	}
	err = readFrame(from, header, h, func(in *decoder) error {
		object, err = read(in, p, h)
		return err
	})
	if err != nil {
		return nil, err
	}
	return object, nil
}

func readParameters(in *decoder, _ *Parameters, h Header) (any, error) {
	text := make([]byte, in.left)
	in.bytes(text)
	if in.err != nil {
		return nil, in.err
	}
	// The description has more fields than the literal: what follows from it.
	var literal Literal
	if err := json.Unmarshal(text, &literal); err != nil {
		return nil, failure(Corrupt, "parameters: %v", err)
	}
	p, err := literal.Check()
	if err != nil {
		return nil, err
	}
	if p.ID != h.Params || !bytes.Equal(p.Describe(), text) {
		return nil, failure(Corrupt, "parameters with a wrong fingerprint")
	}
	return p, nil
}
