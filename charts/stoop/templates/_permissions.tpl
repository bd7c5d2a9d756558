{{/*
What the steps of rules need, worked out as stoop rbac does (responders/rbac.go), from
files/grants.json, which is written from stoop's registry of responders. A test holds
the two together.
*/}}

{{/* Whether a step's parameters are so: (dict "when" … "params" … "defaults" …). None, as nil, never. */}}
{{- define "stoop.holds" -}}
{{- if .when -}}
{{- $ok := true -}}
{{- $params := .params -}}
{{- $defaults := .defaults | default dict -}}
{{- range $name, $want := .when -}}
{{- if ne (get $params $name | default (get $defaults $name) | toString) $want -}}{{- $ok = false -}}{{- end -}}
{{- end -}}
{{- if $ok -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* Adds verbs on a resource to grants: (dict "to" … "group" … "resource" … "names" (list) "verbs" (list) "by" …). */}}
{{- define "stoop.grant" -}}
{{- $names := .names | default list | sortAlpha -}}
{{- $key := printf "%s|%s|%s" .group .resource (join " " $names) -}}
{{- if not (hasKey .to $key) -}}
{{- $_ := set .to $key (dict "group" .group "resource" .resource "names" $names "verbs" dict "by" dict) -}}
{{- end -}}
{{- $grant := get .to $key -}}
{{- $by := .by -}}
{{- range .verbs -}}{{- $_ := set $grant.verbs . true -}}{{- end -}}
{{- $_ := set $grant.by $by true -}}
{{- end -}}

{{/* Rules of the data file, each with one group, resource and item of a parameter: (dict "into" (list in a dict) "rule" … "params" …). */}}
{{- define "stoop.expand" -}}
{{- $rule := .rule -}}
{{- $into := .into -}}
{{- $items := list "" -}}
{{- if $rule.each -}}{{- $items = get .params $rule.each | default list -}}{{- end -}}
{{- range $item := $items -}}
{{- $parts := splitn ($rule.cut | default ".") 2 (toString $item) -}}
{{- $head := $parts._0 -}}
{{- $tail := $parts._1 | default "" -}}
{{- if and (or (not $rule.head) (eq $rule.head $head)) (or (not $rule.tail) (eq $rule.tail $tail)) -}}
{{- range $group := $rule.groups -}}
{{- range $resource := $rule.resources -}}
{{- $names := list -}}
{{- range $rule.names -}}{{- $names = append $names (. | replace "{head}" $head | replace "{tail}" $tail) -}}{{- end -}}
{{- $one := dict "group" ($group | replace "{head}" $head | replace "{tail}" $tail) "resource" ($resource | replace "{head}" $head | replace "{tail}" $tail) "names" $names "verbs" $rule.verbs -}}
{{- $_ := set $into "rules" (append $into.rules $one) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Plans one step: (dict "data" … "into" … "responder" … "params" … "namespaces" … "limited" bool). */}}
{{- define "stoop.plan" -}}
{{- $data := .data -}}
{{- $into := .into -}}
{{- $step := . -}}
{{- $responder := get $data.responders .responder -}}
{{- $object := $responder.object | default "" -}}
{{- if include "stoop.holds" (dict "when" $responder.podWhen "params" .params "defaults" $responder.defaults) -}}{{- $object = "pod" -}}{{- end -}}
{{- /* What audit events name, no node's stoop acts on; the one that answers them, on nothing else. */ -}}
{{- if not (or (and $object (ne .audit (eq $object "resource"))) (and .audit $responder.ofNode) (and .limited (not .namespaces) $object)) -}}
{{- $everywhere := or (not .limited) (not $object) (include "stoop.holds" (dict "when" $responder.everywhere "params" .params "defaults" $responder.defaults)) -}}
{{- $expanded := dict "rules" list -}}
{{- range $responder.rules -}}
{{- if or (not .when) (include "stoop.holds" (dict "when" .when "params" $step.params "defaults" $responder.defaults)) -}}
{{- include "stoop.expand" (dict "into" $expanded "rule" . "params" $step.params) -}}
{{- end -}}
{{- end -}}
{{- range $one := $expanded.rules -}}
{{- $scoped := has (regexReplaceAll "/.*$" .resource "") (get $data.clusterScoped .group | default list) -}}
{{- $grant := dict "group" .group "resource" .resource "names" .names "verbs" .verbs "by" $step.responder -}}
{{- if and (eq .group "coordination.k8s.io") (eq .resource "leases") -}}
{{- include "stoop.grant" (merge (dict "to" $into.own) $grant) -}}
{{- else -}}
{{- if or $everywhere (and $scoped (eq $object "pod")) -}}
{{- include "stoop.grant" (merge (dict "to" $into.cluster) $grant) -}}
{{- else if not (and $scoped (ne .resource "namespaces") (not (has "bind" .verbs))) -}}
{{- range $step.namespaces -}}
{{- if not (hasKey $into.namespaces .) -}}{{- $_ := set $into.namespaces . dict -}}{{- end -}}
{{- include "stoop.grant" (merge (dict "to" (get $into.namespaces .)) $grant) -}}
{{- end -}}
{{- end -}}
{{- if not $step.audit -}}{{- include "stoop.grant" (merge (dict "to" $into.onNode) $grant) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if $responder.instead -}}
{{- include "stoop.plan" (dict "data" $data "into" $into "responder" $responder.instead "params" dict "namespaces" .namespaces "limited" .limited "audit" .audit) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* All that rules need, as JSON: cluster, own, onNode, namespaces. (dict "root" $ "rules" list "audit" bool). */}}
{{- define "stoop.permissions" -}}
{{- $root := .root -}}
{{- $data := .root.Files.Get "files/grants.json" | fromJson -}}
{{- $into := dict "cluster" dict "own" dict "onNode" dict "namespaces" dict -}}
{{- $audit := .audit -}}
{{- range ternary list $data.base $audit -}}
{{- $expanded := dict "rules" list -}}
{{- include "stoop.expand" (dict "into" $expanded "rule" . "params" dict) -}}
{{- range $expanded.rules -}}{{- include "stoop.grant" (merge (dict "to" $into.cluster "by" "stoop itself") .) -}}{{- end -}}
{{- end -}}
{{- range ternary (concat $data.own $data.audit) $data.own $audit -}}
{{- $expanded := dict "rules" list -}}
{{- include "stoop.expand" (dict "into" $expanded "rule" . "params" dict) -}}
{{- range $expanded.rules -}}{{- include "stoop.grant" (merge (dict "to" $into.own "by" "stoop itself") .) -}}{{- end -}}
{{- end -}}
{{- /* The annotation that pauses every node: docs/operations.md. */ -}}
{{- include "stoop.grant" (dict "to" $into.cluster "group" "" "resource" "namespaces" "names" (list .root.Release.Namespace) "verbs" (list "get" "list" "watch") "by" "stoop itself") -}}
{{- $protected := append (dig "guard" "protect" "namespaces" list .root.Values.config) .root.Release.Namespace -}}
{{- range $rule := .rules -}}
{{- $fields := dig "match" "fields" dict $rule -}}
{{- $sources := dig "match" "source" list $rule -}}
{{- if not (kindIs "slice" $sources) -}}{{- $sources = list $sources -}}{{- end -}}
{{- $counts := not $sources -}}
{{- range $sources -}}
{{- if $audit -}}
{{- if regexMatch (printf "^%s$" (regexQuoteMeta . | replace "\\*" ".*" | replace "\\?" ".")) "k8s_audit" -}}{{- $counts = true -}}{{- end -}}
{{- else if ne . "k8s_audit" -}}{{- $counts = true -}}
{{- end -}}
{{- end -}}
{{- range $action := ternary $rule.actions list $counts -}}
{{- $name := "" -}}
{{- $params := dict -}}
{{- if kindIs "string" $action -}}
{{- $name = $action -}}
{{- else -}}
{{- range $key, $value := $action -}}
{{- if not (has $key (list "onFailure" "approve")) -}}{{- $name = $key -}}{{- $params = $value | default dict -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (hasKey $data.responders $name) -}}{{- fail (printf "rules: %s: there is no responder %q" $rule.name $name) -}}{{- end -}}
{{- $responder := get $data.responders $name -}}
{{- $object := $responder.object | default "" -}}
{{- if include "stoop.holds" (dict "when" $responder.podWhen "params" $params "defaults" $responder.defaults) -}}{{- $object = "pod" -}}{{- end -}}
{{- $values := get $fields (get (dict "pod" "k8s.ns.name" "resource" "ka.target.namespace") $object) | default list -}}
{{- if not (kindIs "slice" $values) -}}{{- $values = list $values -}}{{- end -}}
{{- $limited := gt (len $values) 0 -}}
{{- $namespaces := list -}}
{{- range $value := $values -}}
{{- $ns := toString $value -}}
{{- if regexMatch "[*?]" $ns -}}{{- $limited = false -}}{{- end -}}
{{- $takes := regexMatch "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$" $ns -}}
{{- range $protected -}}
{{- if regexMatch (printf "^%s$" (regexQuoteMeta . | replace "\\*" "[^/]*" | replace "\\?" "[^/]")) $ns -}}{{- $takes = false -}}{{- end -}}
{{- end -}}
{{- if $takes -}}{{- $namespaces = append $namespaces $ns -}}{{- end -}}
{{- end -}}
{{- include "stoop.plan" (dict "data" $data "into" $into "responder" $name "params" $params "namespaces" (ternary $namespaces list $limited) "limited" $limited "audit" $audit) -}}
{{- end -}}
{{- end -}}
{{ toJson $into }}
{{- end -}}

{{/* The rules of a role, without what another grants already: (dict "grants" … "without" …). */}}
{{- define "stoop.roleRules" -}}
{{- $grants := .grants -}}
{{- $without := .without -}}
{{- range $key, $grant := .grants -}}
{{- $all := printf "%s|%s|" .group .resource -}}
{{- $verbs := list -}}
{{- range $verb, $_ := .verbs -}}
{{- $had := or (hasKey (dig $key "verbs" dict $without) $verb) (hasKey (dig $all "verbs" dict $without) $verb) -}}
{{- if and (ne $key $all) (hasKey (dig $all "verbs" dict $grants) $verb) -}}{{- $had = true -}}{{- end -}}
{{- if not $had -}}{{- $verbs = append $verbs $verb -}}{{- end -}}
{{- end -}}
{{- if $verbs }}
# For {{ keys .by | sortAlpha | join ", " }}.
- apiGroups: [{{ .group | quote }}]
  resources: [{{ .resource | quote }}]
  {{- with .names }}
  resourceNames: {{ toJson . }}
  {{- end }}
  verbs: {{ toJson $verbs }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* "true" if the grants have one of the verbs on a resource of the core group: (dict "grants" … "resource" … "verbs" …). */}}
{{- define "stoop.grants" -}}
{{- $verbs := .verbs -}}
{{- $resource := .resource -}}
{{- $has := false -}}
{{- range .grants -}}
{{- if and (eq .group "") (eq .resource $resource) -}}
{{- range $verb, $_ := .verbs -}}{{- if has $verb $verbs -}}{{- $has = true -}}{{- end -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if $has -}}true{{- end -}}
{{- end -}}

{{/*
A role, its binding, and what ties it to its node, for an account and its rules:
(dict "root" $ "rules" list "account" name "ownNode" bool "audit" bool: of the stoops that answer audit events).
*/}}
{{- define "stoop.rbac" -}}
{{- $root := .root -}}
{{- $account := .account -}}
{{- $needs := include "stoop.permissions" (dict "root" .root "rules" .rules "audit" .audit) | fromJson -}}
{{- $name := printf "%s-%s" .root.Release.Namespace .account -}}
{{- if eq .root.Release.Namespace .account -}}{{- $name = .account -}}{{- end -}}
{{- $labels := include "stoop.labels" (dict "root" .root "component" "permissions") -}}
{{- $roles := list (dict "kind" "ClusterRole" "rules" (include "stoop.roleRules" (dict "grants" $needs.cluster "without" dict))) -}}
{{- range $ns, $grants := $needs.namespaces -}}
{{- $roles = append $roles (dict "kind" "Role" "namespace" $ns "rules" (include "stoop.roleRules" (dict "grants" $grants "without" $needs.cluster))) -}}
{{- end -}}
{{- $roles = append $roles (dict "kind" "Role" "namespace" .root.Release.Namespace "rules" (include "stoop.roleRules" (dict "grants" $needs.own "without" $needs.cluster))) -}}
{{- range $roles }}
{{- if .rules }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}
metadata:
  name: {{ $name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- $labels | nindent 4 }}
rules:
  {{- trim .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}Binding
metadata:
  name: {{ $name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- $labels | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ .kind }}
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $account }}
    namespace: {{ $root.Release.Namespace }}
{{- end }}
{{- end }}
{{- if and .ownNode (semverCompare ">=1.32.0-0" .root.Capabilities.KubeVersion.Version) }}
{{- $change := list "patch" "update" -}}
{{- $operations := list -}}
{{- $resources := list -}}
{{- if include "stoop.grants" (dict "grants" $needs.onNode "resource" "pods" "verbs" (list "delete" "deletecollection")) -}}{{- $operations = append $operations "DELETE" -}}{{- end -}}
{{- if include "stoop.grants" (dict "grants" $needs.onNode "resource" "pods" "verbs" $change) -}}{{- $operations = append $operations "UPDATE" -}}{{- end -}}
{{- if $operations -}}{{- $resources = append $resources "pods" -}}{{- end -}}
{{- if include "stoop.grants" (dict "grants" $needs.onNode "resource" "pods/ephemeralcontainers" "verbs" $change) -}}
{{- $resources = append $resources "pods/ephemeralcontainers" -}}
{{- $operations = append $operations "UPDATE" -}}
{{- end -}}
{{- $policies := list -}}
{{- if $resources -}}
{{- $policies = append $policies (dict "what" "pods" "resources" $resources "operations" ($operations | uniq | sortAlpha) "own" "oldObject.?spec.?nodeName.orValue('')" "says" "this pod does not run on the node that stoop's token is of") -}}
{{- end -}}
{{- if include "stoop.grants" (dict "grants" $needs.onNode "resource" "nodes" "verbs" $change) -}}
{{- $policies = append $policies (dict "what" "nodes" "resources" (list "nodes") "operations" (list "UPDATE") "own" "request.name" "says" "this is not the node that stoop's token is of") -}}
{{- end -}}
{{- range $policies }}
---
# Ties stoop's token to the node that its pod runs on: docs/rbac.md says what can't be tied.
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: {{ $name }}-own-node-{{ .what }}
  labels:
    {{- $labels | nindent 4 }}
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
      - apiGroups: [""]
        apiVersions: ["v1"]
        operations: {{ toJson .operations }}
        resources: {{ toJson .resources }}
  matchConditions:
    - name: stoop
      expression: request.userInfo.username == 'system:serviceaccount:{{ $root.Release.Namespace }}:{{ $account }}'
  variables:
    - name: node
      expression: request.userInfo.extra[?'authentication.kubernetes.io/node-name'][0].orValue('')
  validations:
    - expression: variables.node != '' && variables.node == {{ .own }}
      message: {{ .says | quote }}
      reason: Forbidden
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ $name }}-own-node-{{ .what }}
  labels:
    {{- $labels | nindent 4 }}
spec:
  policyName: {{ $name }}-own-node-{{ .what }}
  validationActions: ["Deny"]
{{- end }}
{{- end }}
{{- end -}}
