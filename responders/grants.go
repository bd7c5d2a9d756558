package responders

import (
	"encoding/json"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
)

// When are parameters and the values that they have; none: whatever they are.
type When map[string]string

// Grant is permissions that hang on the parameters of a step. It is data, no code,
// so that the chart, whose templates can't run ours, renders its roles from the
// same description.
type Grant struct {
	Rule rbacv1.PolicyRule
	When When // needed with these parameters alone
	// Each names a parameter that is a list: needed once for each item of it. Cut is
	// what divides an item into two (default a dot), which {head} and {tail} stand
	// for in the rule's groups, resources and names.
	Each, Cut string
	// Head and Tail, where they are set, are those of the items that it is needed for.
	Head, Tail string
}

// always are grants whatever the parameters.
func always(rules ...rbacv1.PolicyRule) []Grant {
	out := make([]Grant, len(rules))
	for i, r := range rules {
		out[i].Rule = r
	}
	return out
}

// rulesOf are those of all grants, whatever the parameters.
func rulesOf(grants []Grant) []rbacv1.PolicyRule {
	out := make([]rbacv1.PolicyRule, len(grants))
	for i, g := range grants {
		out[i] = g.Rule
	}
	return out
}

// PermissionsFor are what a step with these parameters needs.
func (e *Entry) PermissionsFor(params json.RawMessage) []rbacv1.PolicyRule {
	if e.Grants == nil {
		return e.RBAC
	}
	set := map[string]json.RawMessage{}
	_ = json.Unmarshal(params, &set) // what is none has been refused with the rules
	var out []rbacv1.PolicyRule
	for _, g := range e.Grants {
		if !e.holds(g.When, set) {
			continue
		}
		if g.Each == "" {
			out = append(out, g.Rule)
			continue
		}
		var items []string
		_ = json.Unmarshal(set[g.Each], &items)
		for _, item := range items {
			if r, ok := g.of(item); ok {
				out = append(out, r)
			}
		}
	}
	return out
}

// of is the grant for an item, if it is for that one.
func (g Grant) of(item string) (rbacv1.PolicyRule, bool) {
	cut := g.Cut
	if cut == "" {
		cut = "."
	}
	head, tail, _ := strings.Cut(item, cut)
	if g.Head != "" && g.Head != head || g.Tail != "" && g.Tail != tail {
		return rbacv1.PolicyRule{}, false
	}
	fill := func(in []string) []string {
		out := slices.Clone(in)
		for i := range out {
			out[i] = strings.NewReplacer("{head}", head, "{tail}", tail).Replace(out[i])
		}
		return out
	}
	r := g.Rule
	r.APIGroups, r.Resources, r.ResourceNames = fill(r.APIGroups), fill(r.Resources), fill(r.ResourceNames)
	return r, true
}

// holds reports whether the parameters that are set, over the defaults, are so.
func (e *Entry) holds(w When, set map[string]json.RawMessage) bool {
	for name, want := range w {
		value := ""
		for _, f := range e.Params.Fields {
			if f.Name == name {
				value = f.Default
			}
		}
		if raw := set[name]; raw != nil && json.Unmarshal(raw, &value) != nil {
			value = string(raw) // a boolean, or a number
		}
		if value != want {
			return false
		}
	}
	return true
}

// with is [Entry.holds] for parameters as they come; nil never holds.
func (e *Entry) with(w When, params json.RawMessage) bool {
	if w == nil {
		return false
	}
	set := map[string]json.RawMessage{}
	_ = json.Unmarshal(params, &set)
	return e.holds(w, set)
}

// Described is what of the registry the chart renders its roles from, as JSON.
type Described struct {
	// What stoop needs before any responder does, everywhere and in its own namespace.
	Base []DescribedRule `json:"base"`
	Own  []DescribedRule `json:"own"`
	// Audit is what it needs in its own namespace besides, to answer audit events.
	Audit []DescribedRule `json:"audit"`
	// ClusterScoped are resources that are in no namespace, by their group.
	ClusterScoped map[string][]string           `json:"clusterScoped"`
	Responders    map[string]DescribedResponder `json:"responders"`
}

// DescribedRule is a [Grant].
type DescribedRule struct {
	Groups    []string `json:"groups"`
	Resources []string `json:"resources"`
	Names     []string `json:"names,omitempty"`
	Verbs     []string `json:"verbs"`
	When      When     `json:"when,omitempty"`
	Each      string   `json:"each,omitempty"`
	Cut       string   `json:"cut,omitempty"`
	Head      string   `json:"head,omitempty"`
	Tail      string   `json:"tail,omitempty"`
}

// DescribedResponder is an [Entry].
type DescribedResponder struct {
	Object     string            `json:"object,omitempty"` // pod or resource; "" is anything else
	OfNode     bool              `json:"ofNode,omitempty"` // anything else that is on a node, or is one
	PodWhen    When              `json:"podWhen,omitempty"`
	Everywhere When              `json:"everywhere,omitempty"`
	Instead    string            `json:"instead,omitempty"`
	Defaults   map[string]string `json:"defaults,omitempty"` // of the parameters that decide
	Rules      []DescribedRule   `json:"rules,omitempty"`
}

// Describe is all that decides which permissions the steps of rules need.
func Describe(entries []Entry) Described {
	d := Described{
		Base: describedRules(always(BaseRBAC()...)), Own: describedRules(always(OwnRBAC()...)),
		Audit:         describedRules(always(ElectionRBAC()...)),
		ClusterScoped: clusterScopedResources(), Responders: map[string]DescribedResponder{},
	}
	for i := range entries {
		e := &entries[i]
		grants := e.Grants
		if grants == nil {
			grants = always(e.RBAC...)
		}
		r := DescribedResponder{
			Object:  map[Object]string{PodObject: "pod", ResourceObject: "resource"}[e.Object],
			OfNode:  e.Object != NoObject && e.Object != PodObject && e.Object != ResourceObject,
			PodWhen: e.PodWhen, Everywhere: e.Everywhere, Instead: e.Instead, Rules: describedRules(grants),
		}
		decide := func(w When) {
			for name := range w {
				for _, f := range e.Params.Fields {
					if f.Name == name {
						if r.Defaults == nil {
							r.Defaults = map[string]string{}
						}
						r.Defaults[name] = f.Default
					}
				}
			}
		}
		decide(e.PodWhen)
		decide(e.Everywhere)
		for _, g := range grants {
			decide(g.When)
		}
		d.Responders[e.Name] = r
	}
	return d
}

func describedRules(grants []Grant) []DescribedRule {
	out := make([]DescribedRule, len(grants))
	for i, g := range grants {
		out[i] = DescribedRule{
			Groups: g.Rule.APIGroups, Resources: g.Rule.Resources, Names: g.Rule.ResourceNames, Verbs: g.Rule.Verbs,
			When: g.When, Each: g.Each, Cut: g.Cut, Head: g.Head, Tail: g.Tail,
		}
	}
	return out
}
