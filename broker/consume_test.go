package broker_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"stoop/broker"
	"stoop/broker/brokertest"
)

// What no rule names has no connection; one is made with the first step, and
// nothing waits for it that an earlier process left.
func TestAConsumerConnectsWhenThereIsSomethingToConsume(t *testing.T) {
	b := brokertest.New(t)
	connections := func() int { return b.Connections() }
	for _, r := range []string{"idle", "expected", "stepped"} {
		if err := b.OpenSteps(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	before := connections()
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan string, 10)
	var all sync.WaitGroup
	for _, r := range []string{"idle", "expected", "stepped"} {
		all.Go(func() {
			if err := b.ConsumeSteps(ctx, r, 1, func(_ context.Context, d *broker.Delivery) {
				got <- d.Step.Responder
				if err := d.Ack(); err != nil {
					t.Error(err)
				}
			}); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(all.Wait)
	t.Cleanup(cancel)
	b.Expect("expected")
	eventually(t, "a connection of what is expected", func() bool { return connections() == before+1 })
	s := &broker.Step{ID: "one", Action: broker.Action{Responder: "stepped"}}
	if _, err := b.PublishStep(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if r := <-got; r != "stepped" {
		t.Errorf("a step for %s", r)
	}
	if n := connections(); n != before+2 {
		t.Errorf("%d connections more, want 2", n-before)
	}
}

// A step whose responder has no consumer yet, since the store failed right after it,
// is taken along to the next store.
func TestUnfinishedStepsOfAResponderWithoutAConsumer(t *testing.T) {
	b := brokertest.New(t)
	if err := b.OpenSteps(t.Context(), "new"); err != nil {
		t.Fatal(err)
	}
	s := &broker.Step{ID: "one", Action: broker.Action{Responder: "new"}}
	if _, err := b.PublishStep(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	steps, err := b.UnfinishedSteps(t.Context())
	if err != nil || len(steps) != 1 || steps[0].ID != "one" {
		t.Errorf("%v, %v", steps, err)
	}
}

// The process is killed between a responder's first step and its consumer: the next
// one finds the step.
func TestAStepWhoseConsumerWasNeverMade(t *testing.T) {
	dir := t.TempDir()
	b := brokertest.Open(t, broker.Config{Dir: dir})
	if err := b.OpenSteps(t.Context(), "new"); err != nil {
		t.Fatal(err)
	}
	s := &broker.Step{ID: "one", Action: broker.Action{Responder: "new"}}
	if _, err := b.PublishStep(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	b.Close()

	b = brokertest.Open(t, broker.Config{Dir: dir})
	for _, r := range []string{"new", "newer"} {
		if err := b.OpenSteps(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if n, none := b.Waiting("new"), b.Waiting("newer"); n != 1 || none != 0 {
		t.Errorf("%d and %d steps wait, want 1 and none", n, none)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var got []string
	if err := b.ConsumeSteps(ctx, "new", 1, func(_ context.Context, d *broker.Delivery) {
		got = append(got, d.Step.ID)
		if err := d.Ack(); err != nil {
			t.Error(err)
		}
		cancel()
	}); err != nil || len(got) != 1 || got[0] != "one" {
		t.Errorf("consumed %v, error %v", got, err)
	}
}

// A consumer that is gone ends what is being handled, which may hang: only then is
// anybody told.
func TestAConsumerThatIsGoneEndsWhatHangs(t *testing.T) {
	b := brokertest.New(t)
	if err := b.OpenSteps(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.PublishStep(t.Context(), &broker.Step{ID: "hangs", Action: broker.Action{Responder: "one"}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	handling, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- b.ConsumeSteps(ctx, "one", 4, func(ctx context.Context, _ *broker.Delivery) {
			close(handling)
			<-ctx.Done()
		})
	}()
	<-handling
	js, err := jetstream.New(b.Conn())
	if err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteConsumer(t.Context(), broker.StreamActions, "one"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("it ended without an error")
		}
	case <-time.After(15 * time.Second):
		t.Error("it does not end")
		cancel()
		<-ended
	}
	cancel()
}
