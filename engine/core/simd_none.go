//go:build !cgo

package core

import "github.com/tuneinsight/lattigo/v6/ring"

// Without cgo, as in WebAssembly, there is no vector code: all arithmetic is Go's.

var simd = false

type wideRoots struct{}

func vectorised(*ring.SubRing) bool { return false }

func simdTransform(*wideRoots, *ring.SubRing, []uint64) { panic("no vector code") }

func simdInverse(*wideRoots, *ring.SubRing, []uint64) { panic("no vector code") }

func simdLift16([]int16, int64, uint64, []uint64) { panic("no vector code") }

func simdLift32([]int32, int64, uint64, []uint64) { panic("no vector code") }

func simdRecenter([]uint64, uint64, uint64, uint64, uint64, []uint64) { panic("no vector code") }

func simdSubtractMultiply([]uint64, []uint64, uint64, uint64, []uint64) { panic("no vector code") }

func simdMultiplyAdd([]uint64, uint64, uint64, []uint64) { panic("no vector code") }

func simdAdd([]uint64, []uint64, uint64, []uint64) { panic("no vector code") }

func simdPermute([]uint64, []uint64, []uint64) { panic("no vector code") }

func simdAddPermuted([]uint64, []uint64, uint64, []uint64) { panic("no vector code") }

func simdTensor(_ *ring.SubRing, _, _, _, _, _, _, _ []uint64) { panic("no vector code") }

func simdProduct(*ring.SubRing, []term, []uint64, []uint64) { panic("no vector code") }

func simdSplit([]uint64, []uint64, *[8]uint64) { panic("no vector code") }

func simdExtend([]uint64, []uint64, *[7]uint64, uint64, []uint64) { panic("no vector code") }

func (a *accumulator) addVector([]term, int) { panic("no vector code") }

func (a *accumulator) reduceVector(_, _ []uint64) { panic("no vector code") }
