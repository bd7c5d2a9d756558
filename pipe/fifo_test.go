//go:build linux

package pipe

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

type counter struct{ n atomic.Int64 }

func (c *counter) Store(_ context.Context, batch []Arrival) (int, error) {
	c.n.Add(int64(len(batch)))
	return len(batch), nil
}

const benchLine = `{"hostname":"node-a","output":"10:21:03.120000001: Notice A shell was spawned in a container with an attached terminal (evt_type=execve user=root user_uid=0 user_loginuid=-1 process=sh proc_exepath=/bin/busybox parent=runc command=sh terminal=34816 exe_flags=EXE_WRITABLE|EXE_LOWER_LAYER container_id=3f1d5e6a7b8c container_name=web k8s_ns=shop k8s_pod=web-5f6d8c9b7-x2x4p)","output_fields":{"container.id":"3f1d5e6a7b8c","container.image.repository":"docker.io/library/alpine","container.image.tag":"3.20","container.name":"web","evt.arg.flags":"EXE_WRITABLE|EXE_LOWER_LAYER","evt.time":1760000000123456789,"evt.type":"execve","k8s.ns.name":"shop","k8s.pod.name":"web-5f6d8c9b7-x2x4p","proc.cmdline":"sh","proc.exepath":"/bin/busybox","proc.name":"sh","proc.pname":"runc","proc.tty":34816,"user.loginuid":-1,"user.name":"root","user.uid":0},"priority":"Notice","rule":"Terminal shell in container","source":"syscall","tags":["T1059","container","maturity_stable","mitre_execution","shell"],"time":"2025-10-09T08:53:20.123456789Z"}` + "\n"

func BenchmarkFIFO(b *testing.B) {
	path := filepath.Join(b.TempDir(), "falco.pipe")
	fifo, err := OpenFIFO(path)
	if err != nil {
		b.Fatal(err)
	}
	store := &counter{}
	in := NewIntake(Options{Store: store})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- fifo.Run(ctx, in) }()
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(benchLine)))
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if _, err := w.WriteString(benchLine); err != nil {
			b.Fatal(err)
		}
	}
	for deadline := time.Now().Add(time.Minute); store.n.Load() < int64(b.N); {
		if time.Now().After(deadline) {
			b.Fatalf("%d of %d", store.n.Load(), b.N)
		}
		time.Sleep(20 * time.Microsecond)
	}
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lines/s")
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	if err := in.Close(context.Background()); err != nil {
		b.Fatal(err)
	}
}
