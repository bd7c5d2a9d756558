package responders_test

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/responders"
)

// The chart renders its roles from this file.
func TestDocsGrants(t *testing.T) {
	const path = "../charts/stoop/files/grants.json"
	got, err := json.MarshalIndent(responders.Describe(responders.All()), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what the registry says: make docs", path)
	}
}

// Parameters that are no text decide too, also where the default is written out.
func TestGrantsByBooleans(t *testing.T) {
	e := entryOf(t, "delete-pod")
	forced := []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get", "delete"}}}
	for params, want := range map[string][]rbacv1.PolicyRule{
		"": e.RBAC, `{"force":false}`: e.RBAC, `{"maxUnavailable":"25%"}`: e.RBAC, `{"force":true}`: forced,
	} {
		if got := e.PermissionsFor(json.RawMessage(params)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", params, got, want)
		}
	}
}

func TestGrantsByParameters(t *testing.T) {
	rule := func(group, resource string, names []string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{resource}, ResourceNames: names, Verbs: verbs}
	}
	e := responders.Entry{
		Params: entryOf(t, "isolate-pod").Params,
		Grants: []responders.Grant{
			{Rule: rule("", "pods", nil, "get")},
			{Rule: rule("a", "strong", nil, "get"), When: responders.When{"strength": "strongest"}},
			{Rule: rule("a", "standard", nil, "get"), When: responders.When{"strength": "standard"}},
			{Rule: rule("{tail}", "{head}/scale", nil, "get"), Each: "kinds"},
			{Rule: rule("a", "roles", []string{"{tail}"}, "bind"), Each: "bind", Cut: "/", Head: "Role"},
			{Rule: rule("a", "known", nil, "get"), Each: "kinds", Head: "b", Tail: "c.d"},
		},
	}
	for params, want := range map[string][]rbacv1.PolicyRule{
		"":                          {rule("", "pods", nil, "get"), rule("a", "standard", nil, "get")},
		`{"strength":"strongest"}`:  {rule("", "pods", nil, "get"), rule("a", "strong", nil, "get")},
		`{"strength":7}`:            {rule("", "pods", nil, "get")},
		`{"kinds":["x","b.c.d"]}`:   {rule("", "pods", nil, "get"), rule("a", "standard", nil, "get"), rule("", "x/scale", nil, "get"), rule("c.d", "b/scale", nil, "get"), rule("a", "known", nil, "get")},
		`{"bind":["Role/r","X/r"]}`: {rule("", "pods", nil, "get"), rule("a", "standard", nil, "get"), rule("a", "roles", []string{"r"}, "bind")},
	} {
		if got := e.PermissionsFor(json.RawMessage(params)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", params, got, want)
		}
	}
}
