package e2e

import (
	"bytes"
	"testing"

	"stoop/broker"
	"stoop/e2e/program"
)

// Whatever is written to the FIFO, the good alert after it deletes its pod.
func TestRoughWriters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := program.New(t, w.options(deleteRule))
	s.Hold()
	s.Start()

	wantDeleted := func(t *testing.T, a program.Alert, id string) {
		t.Helper()
		o := s.WaitOutcome(id, "delete-pod", soon)
		wantStatus(t, o, broker.Done)
		if want := a.Fields["k8s.pod.name"]; o.Target.Pod != want {
			t.Errorf("the outcome is about the pod %s, want %s", o.Target.Pod, want)
		}
	}
	good := func(t *testing.T, name string) {
		t.Helper()
		a := program.Critical("Test critical", w.pod(t, name))
		wantDeleted(t, a, s.Send(a))
	}

	t.Run("byte by byte", func(t *testing.T) {
		a := program.Critical("Test critical", w.pod(t, "bytes"))
		line := a.Line()
		for i := range line {
			s.Write(line[i : i+1])
		}
		wantDeleted(t, a, program.ID(line))
	})
	t.Run("dies in mid-line", func(t *testing.T) {
		pod := w.pod(t, "torn")
		torn := program.Critical("Test critical", pod).Line()
		s.Write(torn[:len(torn)/2])
		s.CloseFIFO()
		// The writer can't be seen to go: the torn line ends with the next
		// newline.
		s.Write([]byte("\n"))
		good(t, "after-torn")
		wantAlive(t, w.Cluster, pod)
	})
	t.Run("10 MB without a newline", func(t *testing.T) {
		s.Write(bytes.Repeat([]byte("x"), 10_000_000))
		s.Write([]byte("\n"))
		good(t, "after-long")
	})
	t.Run("no alerts at all", func(t *testing.T) {
		s.Write([]byte("\n\n{}\n[]\nnull\n{\"priority\":\"Critical\"\n\x00\xff\xfe\nEvents detected: 7\n"))
		good(t, "after-nonsense")
	})
	t.Run("two alerts on one line", func(t *testing.T) {
		one := program.Critical("Test critical", w.pod(t, "glued-1")).Line()
		two := program.Critical("Test critical", w.pod(t, "glued-2")).Line()
		s.Write(append(bytes.TrimSpace(one), two...))
		good(t, "after-glued")
	})
}
