package responders_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

func (a *actor) events() []corev1.Event {
	a.t.Helper()
	list, err := a.admin.CoreV1().Events("shop").List(a.t.Context(), metav1.ListOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	return list.Items
}

func TestEvent(t *testing.T) {
	a := newActor(t, "event", nil)
	r := a.request("s1", `{reason: Intruder}`)
	r.Step.Received = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r.Step.Found = []broker.Finding{{Responder: "freeze-container", Status: broker.Done}, {Responder: "delete-pod", Status: broker.Failed}}
	r.Alert.Rule = "Terminal shell"
	r.Alert.Output = "shell \x1b[2J\nforged\r\n\u202egnp.exe\u2028 " + strings.Repeat("ü", 3000)
	if res, err := a.Act(t.Context(), r); err != nil || res.Found["event"] != "stoop-s1" {
		t.Fatalf("%+v, %v", res, err)
	}
	all := a.events()
	if len(all) != 1 {
		t.Fatalf("there are %d events", len(all))
	}
	e := all[0]
	if e.Name != "stoop-s1" || e.Reason != "Intruder" || e.Type != "Warning" || !e.LastTimestamp.Time.Equal(r.Step.Received) || e.Count != 1 ||
		e.InvolvedObject.UID != a.pod.UID || e.InvolvedObject.Kind != "Pod" || e.InvolvedObject.APIVersion != "v1" || e.ReportingController != "stoop" || e.Source.Host != testNode {
		t.Errorf("the event is %+v", e)
	}
	if len(e.Message) > 1024 || len(e.Message) < 1000 || !utf8.ValidString(e.Message) || strings.ContainsAny(e.Message, "\x1b\n\r\u202e\u2028") {
		t.Errorf("the message has %d bytes: %q", len(e.Message), e.Message)
	}
	// What an attacker writes comes last, however long it is.
	if i, j := strings.Index(e.Message, "; freeze-container: done; delete-pod: failed"), strings.Index(e.Message, "shell [2J forged gnp.exe"); i < 0 || j < i || !strings.Contains(e.Message, "Terminal shell (stoop's rule r)") {
		t.Errorf("the message is %q", e.Message)
	}
	// A second run of the step makes no second one.
	if res, err := a.Act(t.Context(), r); err != nil || !res.Nothing || len(a.events()) != 1 {
		t.Errorf("%+v, %v, %d events", res, err, len(a.events()))
	}
}

// A pod that raises alerts without end takes neither the API server's time nor
// everybody else's.
func TestEventsOfOnePodAreFew(t *testing.T) {
	a := newActor(t, "event", nil)
	written, nothing := 0, 0
	for i := range 40 {
		res, err := a.Act(t.Context(), a.request("s"+string(rune('a'+i)), ""))
		_, again, _, reason := responders.Classify(err)
		switch {
		case again:
			t.Fatalf("a single pod is enough for %s", reason)
		case err != nil:
			t.Fatal(err)
		case res.Nothing:
			nothing++
		default:
			written++
		}
	}
	if written != 10 || nothing != 30 || len(a.events()) != 10 {
		t.Errorf("%d were written, of %d it is said that there were enough", written, nothing)
	}
	// Those of all pods wait, and are not lost.
	other, err := a.admin.CoreV1().Pods("shop").Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web-1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	a.pod = other
	waits := 0
	for i := range 6 {
		_, err := a.Act(t.Context(), a.request("t"+string(rune('a'+i)), ""))
		if _, again, after, _ := responders.Classify(err); again && after == time.Second {
			waits++
		}
	}
	if waits == 0 {
		t.Error("there is no limit to the events of all pods")
	}
}

func TestEventOfAPodThatIsGone(t *testing.T) {
	a := newActor(t, "event", nil)
	if err := a.admin.CoreV1().Pods("shop").Delete(t.Context(), a.pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Act(t.Context(), a.request("s1", "")); !errors.Is(err, responders.ErrGone) || len(a.events()) != 0 {
		t.Errorf("%v, %d events", err, len(a.events()))
	}
}

func TestEventParameters(t *testing.T) {
	for reason, right := range map[string]bool{"StoopAlert": true, "A1": true, `""`: false, `"a b"`: false, `"1a"`: false, strings.Repeat("a", 129): false, `"a\n"`: false} {
		if got := problems(t, entryOf(t, "event"), "reason: "+reason); right != (len(got) == 0) || !right && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, "reason") }) {
			t.Errorf("%s: problems %q", reason, got)
		}
	}
}
