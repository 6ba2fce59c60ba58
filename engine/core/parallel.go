package core

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxThreads = 1024

	// patience is how long a core spins for what comes next before it sleeps. To wake it
	// takes as long, in a virtual machine, and what calls do in parallel is hardly longer.
	patience = 100 * time.Microsecond
)

var (
	threads atomic.Int64
	helpers atomic.Int64 // goroutines that help their callers now
	hired   atomic.Int64 // goroutines that help or wait to
	offers  = make(chan func(), maxThreads)
)

func init() { threads.Store(int64(runtime.NumCPU())) }

// SetThreads sets how many goroutines one call may use.
func SetThreads(n int) error {
	if n < 1 || n > maxThreads {
		return failure(Invalid, "the number of threads must be between 1 and %d, not %d", maxThreads, n)
	}
	threads.Store(int64(n))
	return nil
}

// Threads returns how many goroutines one call may use.
func Threads() int { return int(threads.Load()) }

// help takes up to so many helpers from those that all calls share, and never waits
// for one: jobs may themselves run jobs in parallel.
func help(wanted int) int {
	for {
		busy := helpers.Load()
		taken := min(int64(wanted), threads.Load()-1-busy)
		if taken <= 0 {
			return 0
		}
		if helpers.CompareAndSwap(busy, busy+taken) {
			for n := hired.Load(); n < busy+taken; n = hired.Load() {
				if hired.CompareAndSwap(n, n+1) {
					go assist()
				}
			}
			return int(taken)
		}
	}
}

// assist accepts offers of work for ever.
func assist() {
	for {
		accept()()
	}
}

func accept() func() {
	for start := time.Now(); time.Since(start) < patience; runtime.Gosched() {
		select {
		case offer := <-offers:
			return offer
		default:
		}
	}
	return <-offers
}

// await spins until none is left or patience is at an end. It does not yield: most callers
// are threads of another language, which the scheduler cannot exchange cheaply.
func await(left *atomic.Int64) {
	for start := time.Now(); left.Load() > 0 && time.Since(start) < patience; {
	}
}

// parallel runs job(0) ... job(n-1) on the calling goroutine and on helpers, where
// there are idle ones, and returns the first error. Jobs are handed out in order, one
// at a time. A panic in a job becomes an error where there are helpers, so that it
// cannot end the process.
func parallel(n int, job func(index int) error) error {
	return parallelWorkers(Threads(), n, func(_, index int) error { return job(index) })
}

// parallelWorkers is parallel on at most so many workers, with the number of the
// worker for jobs that keep scratch memory for each: SetThreads may come in between.
func parallelWorkers(workers, n int, job func(worker, index int) error) error {
	extra := help(min(workers, n) - 1)
	if extra == 0 {
		for index := range n {
			if err := job(0, index); err != nil {
				return err
			}
		}
		return nil
	}
	var (
		next   atomic.Int64
		left   atomic.Int64
		group  sync.WaitGroup
		once   sync.Once
		first  error
		failed atomic.Bool
	)
	fail := func(err error) {
		once.Do(func() { first = err })
		failed.Store(true)
	}
	work := func(worker int) {
		defer func() {
			if cause := recover(); cause != nil {
				fail(Recovered(cause))
			}
		}()
		for !failed.Load() {
			index := int(next.Add(1)) - 1
			if index >= n {
				return
			}
			if err := job(worker, index); err != nil {
				fail(err)
			}
		}
	}
	group.Add(extra)
	left.Store(int64(extra))
	done := func() {
		helpers.Add(-1)
		group.Done()
		left.Add(-1)
	}
	taken := make([]atomic.Bool, extra)
	for worker := range extra {
		select {
		case offers <- func() {
			if !taken[worker].Swap(true) {
				work(worker + 1)
				done()
			}
		}:
		default: // full of offers that nobody has the time for
		}
	}
	work(0)
	for i := range taken { // offers that nobody took are withdrawn
		if !taken[i].Swap(true) {
			done()
		}
	}
	await(&left)
	group.Wait()
	return first
}

// Recovered turns the value of a recovered panic into an error.
func Recovered(cause any) error {
	if err, ok := cause.(error); ok {
		if _, ok := err.(*Error); ok {
			return err
		}
	}
	return &Error{Internal, fmt.Sprint(cause)}
}
