package responders

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"stoop/evidence"
	"stoop/param"
)

func checkpointContainer() Entry {
	return Entry{
		Name: "checkpoint-container",
		Doc:  "Has the node's kubelet write a checkpoint of the suspect container: its memory, processes and files, to be looked into elsewhere.",
		Notes: `The kubelet has the container runtime do it with CRIU, and the container runs on. The
archive stays on the node, in the folder checkpoints of the kubelet's own folder (mostly
/var/lib/kubelet/checkpoints), and the outcome says under which name. Fetch it from
there soon: nobody removes it, and it is as large as the container's memory and the files
that it wrote. It holds the container's secrets; only root on the node can read it. The
answer and the name are kept as evidence too, and with it the number of checkpoints of
one container is bounded (evidence.perTarget); guard.limits bounds all.

It works where the runtime can: CRI-O with CRIU support switched on, containerd from 2.0
with criu on the node. Elsewhere the step fails at the first try with what the runtime
said. While CRIU writes, the container stands still, for seconds if its memory is large;
connections may break. A frozen container can't be checkpointed by every runtime: put it
before freeze-container, or use capture-proc there.

via: kubelet asks the kubelet of stoop's own node at its address (the node's InternalIP and
kubelet port). That takes get on nodes, and create on nodes/checkpoint, which the kubelet
checks. stoop sends its token, so the kubelet's certificate has to be good for the node's
name or address, and signed by the cluster's CA, or by one in the file ca: a kubelet that
signs its own (kubeadm's default, without serverTLSBootstrap) has that in kubelet.crt in
/var/lib/kubelet/pki. A network policy or firewall must let stoop reach the port.
via: apiserver goes through the API server, which takes create on nodes/proxy: that is as
much as root on every node, so it is not the default.`,
		Params: param.Describe(checkpointDefaults()),
		RBAC: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get"}},
			{APIGroups: []string{""}, Resources: []string{"nodes/checkpoint"}, Verbs: []string{"create"}},
		},
		Grants: []Grant{
			{Rule: rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}}},
			{Rule: rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get"}}, When: When{"via": viaKubelet}},
			{Rule: rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/checkpoint"}, Verbs: []string{"create"}}, When: When{"via": viaKubelet}},
			{Rule: rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/proxy"}, Verbs: []string{"create"}}, When: When{"via": viaAPIServer}},
		},
		Kind:     Harm,
		Object:   PodObject,
		Deadline: 6 * time.Minute,
		New: func(env Env) Responder {
			return &checkpointer{kube: env.Kube, store: env.Evidence, node: env.Node}
		},
	}
}

const (
	viaKubelet   = "kubelet"
	viaAPIServer = "apiserver"
)

type checkpointParams struct {
	Via     string         `param:"via" oneof:"kubelet apiserver" doc:"Whom stoop asks: the node's kubelet itself, or the API server to ask it."`
	CA      string         `param:"ca" doc:"A file with the certificates that sign the kubelet's; none: the cluster's CA."`
	Timeout param.Duration `param:"timeout" min:"1s" max:"5m" doc:"How long the runtime may take."`
}

func checkpointDefaults() checkpointParams {
	return checkpointParams{Via: viaKubelet, Timeout: param.Duration(time.Minute)}
}

// Validate refuses what means nothing.
func (p checkpointParams) Validate() error {
	if p.CA != "" && p.Via == viaAPIServer {
		return errors.New("ca: with via: apiserver it is the API server that trusts the kubelet")
	}
	return nil
}

type checkpointer struct {
	kube  *Kube
	store *evidence.Store
	node  string
}

func (c *checkpointer) Check(_ context.Context, r *Request) error {
	_, err := c.params(r)
	return err
}

func (c *checkpointer) params(r *Request) (checkpointParams, error) {
	params := checkpointDefaults()
	if err := r.Decode(&params); err != nil {
		return params, Refuse("%v", err)
	}
	if err := params.Validate(); err != nil {
		return params, Refuse("%v", err)
	}
	if c.store == nil {
		return params, Refuse("there is no evidence store, so that it was done could not be kept")
	}
	return params, nil
}

// checkpointed is what the evidence says of a checkpoint.
type checkpointed struct {
	Namespace string   `json:"namespace"`
	Pod       string   `json:"pod"`
	Container string   `json:"container"`
	ID        string   `json:"id"`
	Node      string   `json:"node"`
	Archives  []string `json:"archives"` // on the node
}

const pieceCheckpoint = "checkpoint.json"

func (c *checkpointer) Act(ctx context.Context, r *Request) (Result, error) {
	params, err := c.params(r)
	if err != nil {
		return Result{}, err
	}
	fail := func(err error) (Result, error) {
		return Result{}, fmt.Errorf("checkpoint a container of pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
	}
	kept, again, err := beginCase(ctx, c.store, r, r.Target.Container)
	switch {
	case err != nil:
		return fail(err)
	case kept == nil && again.Nothing:
		return Result{}, Refuse("there are enough checkpoints, or no room for evidence: %s", again.Reason)
	case kept == nil:
		return again, nil
	}
	drop := func(err error) (Result, error) {
		if derr := kept.Discard(); derr != nil {
			err = errors.Join(err, derr)
		}
		return fail(err)
	}
	pod, err := sameNow(ctx, c.kube, r.Pod)
	if err != nil {
		return drop(err)
	}
	name, id, err := suspectContainer(pod, r.Target.Container)
	if err != nil {
		return drop(err)
	}
	done := checkpointed{Namespace: pod.Namespace, Pod: pod.Name, Container: name, ID: id, Node: pod.Spec.NodeName}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(params.Timeout)+10*time.Second)
	defer cancel()
	if done.Archives, err = c.ask(ctx, params, pod, name); err != nil {
		return drop(err)
	}
	about, err := json.MarshalIndent(done, "", "  ")
	if err != nil {
		return drop(err)
	}
	_, err = kept.Add(context.WithoutCancel(ctx), pieceCheckpoint, bytes.NewReader(about), -1)
	if err = errors.Join(err, sameAfter(ctx, c.kube, pod, name, id), kept.Close()); err != nil {
		return fail(fmt.Errorf("%w; the archive is %s on node %s", err, strings.Join(done.Archives, ", "), done.Node))
	}
	res := Result{Found: foundEvidence(kept)}
	res.Found["checkpoint"] = strings.Join(done.Archives, ", ")
	res.Reason = fmt.Sprintf("the checkpoint of container %s is %s on node %s", name, res.Found["checkpoint"], done.Node)
	return res, nil
}

// kubeletAnswerMost is how much of a kubelet's answer is read.
const kubeletAnswerMost = 64 << 10

// ask has the checkpoint written and returns the archives' names on the node.
func (c *checkpointer) ask(ctx context.Context, params checkpointParams, pod *corev1.Pod, container string) ([]string, error) {
	seconds := strconv.Itoa(int(time.Duration(params.Timeout).Seconds()))
	var code int
	var answer []byte
	var err error
	if params.Via == viaAPIServer {
		result := c.kube.core.Post().Resource("nodes").Name(pod.Spec.NodeName).SubResource("proxy").
			Suffix("checkpoint", pod.Namespace, pod.Name, container).Param("timeout", seconds).
			Do(ctx).StatusCode(&code)
		answer, _ = result.Raw() // its error is the same, told worse
		if err = result.Error(); err != nil && !strings.Contains(string(answer), runtimeFailed) && code != http.StatusNotFound {
			return nil, err // the API server's own
		}
	} else if code, answer, err = c.askKubelet(ctx, params, pod, container, seconds); err != nil {
		return nil, err
	}
	said := strings.TrimSpace(string(answer[:min(len(answer), 500)]))
	switch code {
	case http.StatusOK:
	case http.StatusForbidden:
		return nil, fmt.Errorf("the kubelet lets stoop not do it: %s; give its role the verb create on nodes/checkpoint", said)
	case http.StatusUnauthorized:
		return nil, errors.New("the kubelet does not know stoop's token: it needs authentication.webhook.enabled: true in its configuration")
	case http.StatusNotFound:
		return nil, fmt.Errorf("the kubelet knows no such container, or no checkpoints (feature gate ContainerCheckpoint, before Kubernetes 1.30 off by default): %s", said)
	case http.StatusInternalServerError:
		return nil, fmt.Errorf("the node's container runtime can't: %s", said)
	default:
		return nil, Retry(fmt.Errorf("the kubelet answers with status %d: %s", code, said), 0)
	}
	var list struct{ Items []string }
	if err := json.Unmarshal(answer, &list); err != nil || len(list.Items) == 0 {
		return nil, fmt.Errorf("the kubelet names no archive: %q", said)
	}
	return list.Items, nil
}

// runtimeFailed begins what the kubelet says when the runtime could not do it.
const runtimeFailed = "checkpointing of "

// askKubelet asks this node's kubelet itself.
func (c *checkpointer) askKubelet(ctx context.Context, params checkpointParams, pod *corev1.Pod, container, seconds string) (int, []byte, error) {
	node, err := c.kube.Nodes().Get(ctx, pod.Spec.NodeName, metav1.GetOptions{})
	if err != nil {
		return 0, nil, err
	}
	client, address, err := c.kube.kubelet(node, params.CA)
	if err != nil {
		return 0, nil, err
	}
	defer client.CloseIdleConnections()
	u := url.URL{
		Scheme: "https", Host: address, RawQuery: "timeout=" + seconds,
		Path: "/checkpoint/" + pod.Namespace + "/" + pod.Name + "/" + container,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	var unknown *tls.CertificateVerificationError
	if errors.As(err, &unknown) {
		return 0, nil, fmt.Errorf("the kubelet's certificate is not to be trusted: %v; name who signed it with ca, or set serverTLSBootstrap: true in the kubelet's configuration", unknown.Err)
	}
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, kubeletAnswerMost))
	return resp.StatusCode, b, err
}

// kubelet is how the kubelet of a node is reached, with stoop's own credentials.
func (k *Kube) kubelet(node *corev1.Node, caFile string) (client *http.Client, address string, err error) {
	var ip string
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP && ip == "" {
			ip = a.Address
		}
	}
	port := node.Status.DaemonEndpoints.KubeletEndpoint.Port
	if ip == "" || port == 0 {
		return nil, "", fmt.Errorf("node %s says no InternalIP, or no port of its kubelet", node.Name)
	}
	c := rest.CopyConfig(k.config)
	if caFile != "" {
		c.CAFile, c.CAData = caFile, nil
	}
	c.Insecure, c.ServerName = false, ""
	conf, err := rest.TLSConfigFor(c)
	if err != nil {
		return nil, "", fmt.Errorf("trust of the kubelet: %w", err)
	}
	if conf == nil {
		conf = &tls.Config{}
	}
	// The certificate is good for the node's name, or for its address: which one
	// depends on who made it. So it is verified here, not in less.
	conf.MinVersion, conf.InsecureSkipVerify = tls.VersionTLS12, true
	conf.VerifyConnection = func(s tls.ConnectionState) error {
		return verifyKubelet(s.PeerCertificates, conf.RootCAs, node.Name, ip)
	}
	conf.NextProtos = []string{"http/1.1"}
	// A custom transport carries the TLS; the credentials are put on top of it.
	c.TLSClientConfig = rest.TLSClientConfig{}
	c.Transport = &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true, TLSHandshakeTimeout: 10 * time.Second}
	c.Timeout = 0
	client, err = rest.HTTPClientFor(c)
	return client, net.JoinHostPort(ip, strconv.Itoa(int(port))), err
}

func verifyKubelet(chain []*x509.Certificate, roots *x509.CertPool, names ...string) error {
	if len(chain) == 0 {
		return errors.New("the kubelet shows no certificate")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	var errs []error
	for _, name := range names {
		_, err := chain[0].Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: between})
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return &tls.CertificateVerificationError{UnverifiedCertificates: chain, Err: errors.Join(errs...)}
}
