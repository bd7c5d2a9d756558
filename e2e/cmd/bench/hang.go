package main

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/e2e/kube"
	"stoop/e2e/program"
)

// hanging are the destinations that never answer: a webhook, and a request to the
// API server that waits for an admission webhook.
type hanging struct {
	rules string
	pods  []*corev1.Pod // to label one of these hangs
	done  chan struct{}
}

// hangRate is how often a second an alert has a step for each of them.
const hangRate = 10

// newHanging makes both. The rules are to be added to those of the stage, so it is
// made before that.
func (b *bench) newHanging(node string) *hanging {
	h := &hanging{done: make(chan struct{})}
	never := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-h.done:
		case <-r.Context().Done():
		}
	})
	webhook, admission := httptest.NewServer(never), httptest.NewTLSServer(never)
	b.Cleanup(func() {
		close(h.done)
		webhook.Close()
		admission.Close()
	})
	h.rules = fmt.Sprintf(`
  - name: hanging-webhook
    match: {rule: Test hanging webhook}
    actions:
      - webhook: {url: %q}
  - name: hanging-request
    match: {rule: Test hanging request}
    actions:
      - label-pod: {labels: {suspect: "yes"}}
`, webhook.URL)

	ns := b.cluster.Namespace(b, kube.Name("hang"))
	h.pods = b.cluster.Pods(b, ns, "pod", node, 50)
	configs := b.cluster.Client.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	name := kube.Name("hang")
	_, err := configs.Create(b.Context(), &admissionv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Webhooks: []admissionv1.ValidatingWebhook{{
			Name: "hang.stoop.invalid", SideEffects: new(admissionv1.SideEffectClassNone), AdmissionReviewVersions: []string{"v1"},
			TimeoutSeconds: new(int32(30)), FailurePolicy: new(admissionv1.Fail),
			ClientConfig: admissionv1.WebhookClientConfig{
				URL:      new(admission.URL),
				CABundle: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: admission.Certificate().Raw}),
			},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: ns}},
			Rules: []admissionv1.RuleWithOperations{{
				Operations: []admissionv1.OperationType{admissionv1.Update},
				Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		b.Fatalf("make an admission webhook that hangs: %v", err)
	}
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), 10*time.Second)
		defer cancel()
		if err := configs.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			b.Logf("delete the admission webhook: %v", err)
		}
	})
	return h
}

// run writes alerts whose steps hang, until stop is closed, and returns how many.
func (h *hanging) run(s *stage, stop <-chan struct{}) (int, error) {
	tick := time.NewTicker(time.Second / hangRate)
	defer tick.Stop()
	for n := 0; ; n++ {
		select {
		case <-stop:
			return n, nil
		case <-tick.C:
		}
		for _, rule := range []string{"Test hanging webhook", "Test hanging request"} {
			a := program.Critical(rule, h.pods[n%len(h.pods)])
			a.Priority = "Warning"
			if err := s.stoop.TryWrite(a.Line()); err != nil {
				return n, err
			}
		}
	}
}

// finished is how many of these steps did not hang: it should be 0.
func (h *hanging) finished(s *stage) int {
	n := 0
	for _, o := range s.stoop.History() {
		if strings.HasPrefix(o.Rule, "hanging-") && o.Status == broker.Done {
			n++
		}
	}
	return n
}
