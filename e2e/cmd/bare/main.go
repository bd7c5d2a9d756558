// Command bare is what stoop is compared with: the libraries that it can't do
// without and nothing of its own. An embedded JetStream with one stream on
// disk, a watch on the pods of one node, one CEL expression.
//
// bare DATA KUBECONFIG NODE prints ready when all three are, and waits for the
// end of its input. bare publish DATA BYTES N measures how fast JetStream
// stores N messages.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"cel.dev/cel-go/cel"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bare:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 4 && args[0] == "publish" {
		size, err1 := strconv.Atoi(args[2])
		n, err2 := strconv.Atoi(args[3])
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		return publish(ctx, args[1], size, n)
	}
	if len(args) != 3 {
		return errors.New("usage: bare DATA KUBECONFIG NODE | bare publish DATA BYTES N")
	}
	stop, _, err := openStream(ctx, args[0])
	if err != nil {
		return err
	}
	defer stop()
	env, err := cel.NewEnv(cel.Variable("fields", cel.MapType(cel.StringType, cel.DynType)))
	if err != nil {
		return err
	}
	ast, issues := env.Compile(`fields["k8s.ns.name"].startsWith("shop-")`)
	if issues.Err() != nil {
		return issues.Err()
	}
	if _, err := env.Program(ast); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", args[1])
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	informer := cache.NewSharedInformer(
		cache.NewListWatchFromClient(client.CoreV1().RESTClient(), "pods", metav1.NamespaceAll,
			fields.OneTermEqualSelector("spec.nodeName", args[2])), &corev1.Pod{}, 0)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		informer.RunWithContext(ctx)
	}()
	defer func() { cancel(); <-done }()
	for !informer.HasSynced() {
		time.Sleep(time.Millisecond)
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func openStream(ctx context.Context, data string) (stop func(), nc *nats.Conn, err error) {
	s, err := server.NewServer(&server.Options{DontListen: true, NoSigs: true, JetStream: true, StoreDir: data})
	if err != nil {
		return nil, nil, err
	}
	s.Start()
	if !s.ReadyForConnections(10 * time.Second) {
		return nil, nil, errors.New("the NATS server is not ready after 10 s")
	}
	if nc, err = nats.Connect("", nats.InProcessServer(s)); err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, nil, err
	}
	_, err = js.CreateStream(ctx, jetstream.StreamConfig{Name: "ALERTS", Subjects: []string{"falco.>"}, Storage: jetstream.FileStorage, MaxBytes: 256 << 20})
	return func() { nc.Close(); s.Shutdown(); s.WaitForShutdown() }, nc, err
}

// publish prints how many messages a second were stored and acknowledged.
func publish(ctx context.Context, data string, size, n int) error {
	stop, nc, err := openStream(ctx, data)
	if err != nil {
		return err
	}
	defer stop()
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(4096))
	if err != nil {
		return err
	}
	payload := make([]byte, size)
	began := time.Now()
	for range n {
		if _, err := js.PublishAsync("falco.debug.storm", payload); err != nil {
			return err
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(time.Minute):
		return errors.New("JetStream has not acknowledged everything after a minute")
	}
	fmt.Printf("%.0f\n", float64(n)/time.Since(began).Seconds())
	return nil
}
