package core

import (
	"bufio"
	"io"
)

const streamBuffer = 1 << 18

// Writer turns an object into bytes, read in pieces of any size.
type Writer struct{ pipe *io.PipeReader }

// NewWriter starts to write an object.
func NewWriter(object Object) *Writer {
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
	return &Writer{reader}
}

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
	n, err := io.ReadFull(w.pipe, buffer)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return n, nil
	}
	return n, err
}

// Close ends writing before the end.
func (w *Writer) Close() { w.pipe.Close() }

// Reader makes an object from bytes that come in pieces.
type Reader struct {
	pipe   *io.PipeWriter
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
	from, to := io.Pipe()
	r := &Reader{pipe: to, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.err = protected(func() (err error) {
			r.object, err = Read(bufio.NewReaderSize(from, streamBuffer), header, h, p)
			return err
		})
		from.CloseWithError(errFinished)
	}()
	return r, h, nil
}

var errFinished = failure(Corrupt, "bytes after the end of an object")

// Write takes a piece. An error may come later than the piece that causes it.
func (r *Reader) Write(piece []byte) error {
	if _, err := r.pipe.Write(piece); err != nil {
		<-r.done
		if r.err != nil {
			return r.err
		}
		return err
	}
	return nil
}

// Finish returns the object.
func (r *Reader) Finish() (any, error) {
	r.pipe.Close()
	<-r.done
	return r.object, r.err
}

// Close ends reading before the end.
func (r *Reader) Close() {
	r.pipe.CloseWithError(failure(Corrupt, "reading was given up"))
	<-r.done
}
