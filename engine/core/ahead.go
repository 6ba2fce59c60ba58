package core

import (
	"runtime"
	"sync"
)

// mostAhead is how many items are made ahead of time: as many as a refresh usually carries.
const mostAhead = 4

// stock is what one party makes ahead of time, while it waits for the other: randomness that
// does not depend on what it will hide. Each item serves once.
type stock[T any] struct {
	lock    sync.Mutex
	items   []T
	filling bool
}

// take returns an item that nothing else gets, if there is one.
func (s *stock[T]) take() (item T, ok bool) {
	s.lock.Lock()
	defer s.lock.Unlock()
	last := len(s.items) - 1
	if last < 0 {
		return item, false
	}
	item, ok = s.items[last], true
	clear(s.items[last:])
	s.items = s.items[:last]
	return item, ok
}

// fill makes items in the background until there are so many, or mostAhead. An item that
// cannot be made is not missed: who finds none makes one, and sees why it fails. In
// WebAssembly there is no background: it would delay the answer.
func (s *stock[T]) fill(count int, item func() (T, error)) {
	count = min(count, mostAhead)
	s.lock.Lock()
	defer s.lock.Unlock()
	if s.filling || len(s.items) >= count || runtime.GOARCH == "wasm" {
		return
	}
	s.filling = true
	go func() {
		protected(func() error {
			for s.lacks(count) {
				made, err := item()
				if err != nil {
					return err
				}
				s.lock.Lock()
				s.items = append(s.items, made)
				s.lock.Unlock()
			}
			return nil
		})
		s.lock.Lock()
		s.filling = false
		s.lock.Unlock()
	}()
}

func (s *stock[T]) lacks(count int) bool {
	s.lock.Lock()
	defer s.lock.Unlock()
	return len(s.items) < count
}
