package alert

import (
	"testing"
)

const example = `{"hostname":"node-a","output":"10:21:03.120000001: Notice A shell was spawned in a container with an attached terminal (evt_type=execve user=root user_uid=0 user_loginuid=-1 process=sh proc_exepath=/bin/busybox parent=runc command=sh terminal=34816 exe_flags=EXE_WRITABLE|EXE_LOWER_LAYER container_id=3f1d5e6a7b8c container_image=docker.io/library/alpine container_image_tag=3.20 container_name=web k8s_ns=shop k8s_pod=web-5f6d8c9b7-x2x4p)","output_fields":{"container.id":"3f1d5e6a7b8c","container.image.repository":"docker.io/library/alpine","container.image.tag":"3.20","container.name":"web","evt.arg.flags":"EXE_WRITABLE|EXE_LOWER_LAYER","evt.time":1760000000123456789,"evt.type":"execve","k8s.ns.name":"shop","k8s.pod.name":"web-5f6d8c9b7-x2x4p","proc.cmdline":"sh","proc.exepath":"/bin/busybox","proc.name":"sh","proc.pname":"runc","proc.tty":34816,"user.loginuid":-1,"user.name":"root","user.uid":0},"priority":"Notice","rule":"Terminal shell in container","source":"syscall","tags":["T1059","container","maturity_stable","mitre_execution","shell"],"time":"2025-10-09T08:53:20.123456789Z"}`

func BenchmarkParse(b *testing.B) {
	line := []byte(example)
	b.SetBytes(int64(len(line)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(line); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFields(b *testing.B) {
	line := []byte(example)
	for b.Loop() {
		a, err := Parse(line)
		if err != nil {
			b.Fatal(err)
		}
		if a.Fields() == nil {
			b.Fatal("no fields")
		}
	}
}
