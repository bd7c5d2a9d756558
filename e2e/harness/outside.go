package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// Outside runs do with a [T] outside of any test: its log goes to w, Fatalf
// ends do, and what do registered is cleaned up, the last first. The error is
// what Fatalf said.
func Outside(ctx context.Context, w io.Writer, do func(T)) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	o := &outside{ctx: ctx, w: w}
	defer func() {
		cancel()
		if p := recover(); p != nil {
			fatal, ok := p.(fatalError)
			if !ok {
				o.cleanUp()
				panic(p)
			}
			err = fatal.error
			o.failed = true
		}
		err = errors.Join(err, o.cleanUp())
	}()
	do(o)
	return nil
}

type outside struct {
	ctx      context.Context
	w        io.Writer
	cleanups []func()
	failed   bool
}

type fatalError struct{ error }

func (o *outside) Helper()                         {}
func (o *outside) Logf(format string, args ...any) { fmt.Fprintf(o.w, format+"\n", args...) }
func (o *outside) Fatalf(format string, args ...any) {
	panic(fatalError{fmt.Errorf(format, args...)})
}
func (o *outside) Cleanup(f func())         { o.cleanups = append(o.cleanups, f) }
func (o *outside) Context() context.Context { return o.ctx }
func (o *outside) Failed() bool             { return o.failed }

func (o *outside) TempDir() string {
	dir, err := os.MkdirTemp("", "stoop-e2e-")
	if err != nil {
		o.Fatalf("make a temporary folder: %v", err)
	}
	o.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			o.Logf("remove a temporary folder: %v", err)
		}
	})
	return dir
}

func (o *outside) cleanUp() error {
	for _, f := range slices.Backward(o.cleanups) {
		f()
	}
	return nil
}
