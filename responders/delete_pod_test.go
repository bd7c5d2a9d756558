package responders_test

import (
	"errors"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/responders"
)

func TestDeletePod(t *testing.T) {
	t.Run("grace", func(t *testing.T) {
		a := newActor(t, "delete-pod", nil)
		a.act("s1", "force: true")
		now, err := a.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
		if err != nil || now.DeletionGracePeriodSeconds == nil || *now.DeletionGracePeriodSeconds != 1 {
			t.Errorf("the default grace period: %+v, error %v", now.ObjectMeta, err)
		}
	})
	t.Run("on its way already", func(t *testing.T) {
		a := newActor(t, "delete-pod", nil)
		a.act("s1", "{gracePeriod: 5s, force: true}")
		now, err := a.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		a.pod = now
		if res := a.act("s2", "{gracePeriod: 10s, force: true}"); !res.Nothing {
			t.Errorf("a longer one: %+v", res)
		}
		if res := a.act("s3", "{gracePeriod: 1s, force: true}"); res.Nothing {
			t.Errorf("a shorter one: %+v", res)
		}
		if now, err = a.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{}); err != nil || *now.DeletionGracePeriodSeconds != 1 {
			t.Errorf("the shorter one did not hold: %+v, %v", now.ObjectMeta, err)
		}
	})
	t.Run("resumed, and gone", func(t *testing.T) {
		a := newActor(t, "delete-pod", nil)
		if err := a.admin.CoreV1().Pods("shop").Delete(t.Context(), "web-0", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
			t.Fatal(err)
		}
		r := a.request("s1", "force: true")
		r.Resumed = true
		if _, err := a.Act(t.Context(), r); !errors.Is(err, responders.ErrGone) {
			t.Errorf("error %v", err)
		}
	})
	for params, want := range map[string]string{
		"gracePeriod: 1500ms": "whole number of seconds",
		"gracePeriod: 2h":     "1h",
		"gracePeriod: 0s":     "",
		"gracePeriod: 1m":     "",
	} {
		if got := problems(t, entryOf(t, "delete-pod"), params); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(got[0], want) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}
