package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/yaml"

	"stoop/responders/conformance"
)

// The parts of the network plugins' kinds that stoop writes, with what the plugins'
// own definitions ask of them: a field that is not here would be dropped, and the
// suite would see it.
const (
	ciliumSchema = `
type: object
required: [endpointSelector]
properties:
  endpointSelector: {type: object, properties: {matchLabels: {type: object, additionalProperties: {type: string}}}}
  ingressDeny: {type: array, items: {type: object, properties: {fromEntities: {type: array, items: {type: string, enum: [all, world, cluster, host, init, ingress, unmanaged, remote-node, health, none, kube-apiserver]}}}}}
  egressDeny: {type: array, items: {type: object, properties: {toEntities: {type: array, items: {type: string, enum: [all, world, cluster, host, init, ingress, unmanaged, remote-node, health, none, kube-apiserver]}}}}}
`
	calicoEntity = `{type: object, properties: {nets: {type: array, items: {type: string}}, notNets: {type: array, items: {type: string}}, selector: {type: string}, namespaceSelector: {type: string},
        ports: {type: array, items: {anyOf: [{type: integer}, {type: string}], pattern: "^.*", x-kubernetes-int-or-string: true}}}}`
	calicoSchema = `
type: object
properties:
  tier: {type: string}
  order: {type: number}
  selector: {type: string}
  types: {type: array, items: {type: string, enum: [Ingress, Egress]}}
  ingress: {type: array, items: {type: object, required: [action], properties: {action: {type: string, enum: [Allow, Deny, Log, Pass]}, protocol: {x-kubernetes-int-or-string: true}, source: ENTITY, destination: ENTITY}}}
  egress: {type: array, items: {type: object, required: [action], properties: {action: {type: string, enum: [Allow, Deny, Log, Pass]}, protocol: {x-kubernetes-int-or-string: true}, source: ENTITY, destination: ENTITY}}}
`
	selector      = `{type: object, properties: {matchLabels: {type: object, additionalProperties: {type: string}}}}`
	pods          = `{type: object, required: [podSelector], properties: {namespaceSelector: SELECTOR, podSelector: SELECTOR}}`
	port          = `{type: object, minProperties: 1, properties: {destinationPort: {type: object, minProperties: 1, maxProperties: 1, properties: {number: {type: integer, minimum: 1, maximum: 65535}}}}}`
	clusterSchema = `
type: object
required: [tier, priority, subject]
properties:
  tier: {type: string, enum: [Admin, Baseline]}
  priority: {type: integer, minimum: 0, maximum: 1000}
  subject: {type: object, minProperties: 1, maxProperties: 1, properties: {namespaces: SELECTOR, pods: PODS}}
  ingress: {type: array, maxItems: 25, items: {type: object, required: [action, from], properties: {
    name: {type: string, maxLength: 100}, action: {type: string, enum: [Accept, Deny, Pass]},
    from: {type: array, minItems: 1, maxItems: 25, items: {type: object, minProperties: 1, maxProperties: 1, properties: {namespaces: SELECTOR, pods: PODS}}}}}}
  egress: {type: array, maxItems: 25, items: {type: object, required: [action, to], properties: {
    name: {type: string, maxLength: 100}, action: {type: string, enum: [Accept, Deny, Pass]},
    protocols: {type: array, minItems: 1, maxItems: 25, items: {type: object, minProperties: 1, maxProperties: 1, properties: {tcp: PORT, udp: PORT}}},
    to: {type: array, minItems: 1, maxItems: 25, items: {type: object, minProperties: 1, maxProperties: 1, properties: {namespaces: SELECTOR, pods: PODS,
      networks: {type: array, minItems: 1, maxItems: 25, x-kubernetes-list-type: set, items: {type: string, maxLength: 43, x-kubernetes-validations: [{rule: "isCIDR(self)"}]}}}}}}}}
`
)

// denialCases are of the kinds of policies that deny, which the API server is taught
// here. That a network plugin enforces them is not seen.
func denialCases(t testing.TB) []conformance.Case {
	t.Helper()
	fill := strings.NewReplacer("ENTITY", calicoEntity, "PODS", strings.ReplaceAll(pods, "SELECTOR", selector), "SELECTOR", selector, "PORT", port)
	for _, crd := range []struct{ group, version, plural, kind, scope, schema string }{
		{"cilium.io", "v2", "ciliumnetworkpolicies", "CiliumNetworkPolicy", "Namespaced", ciliumSchema},
		{"projectcalico.org", "v3", "globalnetworkpolicies", "GlobalNetworkPolicy", "Cluster", fill.Replace(calicoSchema)},
		{"policy.networking.k8s.io", "v1alpha2", "clusternetworkpolicies", "ClusterNetworkPolicy", "Cluster", fill.Replace(clusterSchema)},
	} {
		// Kubernetes' own groups want a word that the definition was approved.
		manifest := fmt.Sprintf(`
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: %[3]s.%[1]s
  annotations: {api-approved.kubernetes.io: "unapproved, for a test"}
spec:
  group: %[1]s
  scope: %[5]s
  names: {plural: %[3]s, kind: %[4]s, listKind: %[4]sList, singular: %[6]s}
  versions:
    - name: %[2]s
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            spec:
%[7]s`, crd.group, crd.version, crd.plural, crd.kind, crd.scope, strings.ToLower(crd.kind), indented(crd.schema, 14))
		body, err := yaml.ToJSON([]byte(manifest))
		if err != nil {
			t.Fatal(err)
		}
		rest := shared.cluster.Client.CoreV1().RESTClient()
		err = rest.Post().AbsPath("/apis/apiextensions.k8s.io/v1/customresourcedefinitions").SetHeader("Content-Type", "application/json").Body(body).Do(t.Context()).Error()
		if err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatalf("define %s: %v", crd.kind, err)
		}
		// Once it is listed, and there is a place for it in the discovery too.
		for end := time.Now().Add(soon); ; time.Sleep(20 * time.Millisecond) {
			list, err := shared.cluster.Client.Discovery().ServerResourcesForGroupVersion(crd.group + "/" + crd.version)
			if err == nil && len(list.APIResources) > 0 {
				err = rest.Get().AbsPath("/apis", crd.group, crd.version, crd.plural).Param("limit", "1").Do(t.Context()).Error()
				if err == nil {
					_, err = shared.cluster.Client.Discovery().ServerGroups()
				}
			}
			if err == nil && len(list.APIResources) > 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s is not served: %v", crd.kind, err)
			}
		}
	}
	return conformance.Denials()
}

// indented is a text with so many spaces before each line.
func indented(s string, n int) string {
	return strings.Repeat(" ", n) + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n"+strings.Repeat(" ", n))
}
