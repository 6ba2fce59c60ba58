package core

import (
	"bufio"
	"bytes"
	"io"
)

const streamBuffer = 1 << 18

// Writer turns an object into bytes, read in pieces of any size. Ciphertexts and what carries
// them are written whole, all else while it is read.
type Writer struct {
	from io.Reader
	size int // of what is written whole
}

// NewWriter starts to write an object.
func NewWriter(object Object) (*Writer, error) {
	switch object.(type) {
	case *Ciphertext, *RefreshRequest, *RefreshReply:
		whole := new(bytes.Buffer)
		if err := object.Write(whole); err != nil {
			return nil, err
		}
		return &Writer{whole, whole.Len()}, nil
	}
	reader, writer := io.Pipe()
	go func() {
		writer.CloseWithError(protected(func() error {
			buffered := bufio.NewWriterSize(writer, streamBuffer)
			if err := object.Write(buffered); err != nil {
				return err
			}
			return buffered.Flush()
		}))
	}()
	return &Writer{from: reader}, nil
}

// Size is how many bytes an object has that is written whole, and 0 for others.
func (w *Writer) Size() int { return w.size }

// protected runs a function in a goroutine of its own, where no caller could
// recover its panic.
func protected(run func() error) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = Recovered(cause)
		}
	}()
	return run()
}

// Read fills the buffer; it returns 0 at the end.
func (w *Writer) Read(buffer []byte) (int, error) {
	n, err := io.ReadFull(w.from, buffer)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return n, nil
	}
	return n, err
}

// Close ends writing before the end.
func (w *Writer) Close() {
	if pipe, ok := w.from.(*io.PipeReader); ok {
		pipe.Close()
	}
}

// Reader makes an object from bytes that come in pieces.
type Reader struct {
	params *Parameters
	header []byte
	about  Header
	pipe   *io.PipeWriter // from the first piece on, unless that is all
	object any
	err    error
	done   chan struct{}
}

// NewReader checks a header and waits for the rest.
func NewReader(header []byte, kind Type, p *Parameters) (*Reader, Header, error) {
	header = append([]byte{}, header...)
	h, err := ParseHeader(header, kind, p)
	if err != nil {
		return nil, h, err
	}
	return &Reader{params: p, header: header, about: h, done: make(chan struct{})}, h, nil
}

func (r *Reader) start() {
	var from *io.PipeReader
	from, r.pipe = io.Pipe()
	go func() {
		defer close(r.done)
		r.err = protected(func() (err error) {
			r.object, err = Read(bufio.NewReaderSize(from, streamBuffer), r.header, r.about, r.params)
			return err
		})
		from.CloseWithError(errFinished)
	}()
}

// whole reads what came in one piece.
func (r *Reader) whole(piece []byte) error {
	r.object, r.err = Read(bytes.NewReader(piece), r.header, r.about, r.params)
	close(r.done)
	return r.err
}

var errFinished = failure(Corrupt, "bytes after the end of an object")

// Write takes a piece. An error may come later than the piece that causes it.
func (r *Reader) Write(piece []byte) error {
	if r.pipe == nil {
		if r.finished() {
			return errFinished
		}
		if uint64(len(piece)) == r.about.Length {
			return r.whole(piece)
		}
		r.start()
	}
	if _, err := r.pipe.Write(piece); err != nil {
		<-r.done
		if r.err != nil {
			return r.err
		}
		return err
	}
	return nil
}

func (r *Reader) finished() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// Finish returns the object.
func (r *Reader) Finish() (any, error) {
	r.end(nil)
	return r.object, r.err
}

// Close ends reading before the end.
func (r *Reader) Close() { r.end(failure(Corrupt, "reading was given up")) }

func (r *Reader) end(err error) {
	if r.pipe == nil && !r.finished() {
		r.start() // nothing came
	}
	if r.pipe != nil {
		r.pipe.CloseWithError(err)
	}
	<-r.done
}
