{{/* rules.yaml. */}}
{{- define "stoop.rules" -}}
{{- $names := list -}}
{{- $rules := list -}}
{{- range .Values.rules -}}
{{- $names = append $names .name -}}
{{- $rules = append $rules (ternary (set (deepCopy .) "mode" "enforce") . (has .name $.Values.enforce)) -}}
{{- end -}}
{{- range .Values.enforce -}}
{{- if not (has . $names) -}}
{{- fail (printf "enforce: there is no rule %q; there are: %s" . (join ", " $names)) -}}
{{- end -}}
{{- end -}}
mode: audit
rules:
{{ toYaml $rules }}
{{ end -}}

{{/* Whether Falco is in another pod than stoop, and so the FIFO in a folder of the host's. */}}
{{- define "stoop.pipeOnHost" -}}
{{- if and (include "stoop.pipe" .) (or .Values.split (not .Values.falco.enabled)) -}}true{{- end -}}
{{- end -}}

{{/* Whether alerts come through the FIFO. */}}
{{- define "stoop.pipe" -}}
{{- if or .Values.falco.enabled (eq .Values.source.type "pipe") -}}true{{- end -}}
{{- end -}}

{{/* stoop.yaml. */}}
{{- define "stoop.config" -}}
{{- $own := dict "mode" .Values.mode -}}
{{- $_ := set $own "http" (dict "listen" (printf "%s:%d" (ternary "" "127.0.0.1" .Values.metrics.enabled) (int .Values.metrics.port))) -}}
{{- if include "stoop.pipe" . -}}
{{- $_ := set $own "source" (dict "pipe" "/run/stoop/falco.pipe") -}}
{{- else -}}
{{- $http := dict "listen" (printf ":%d" (int .Values.source.http.port)) "token-file" "/etc/stoop-http/token/token" "cert" "/etc/stoop-http/tls/tls.crt" "key" "/etc/stoop-http/tls/tls.key" -}}
{{- $_ := set $own "source" (dict "http" $http) -}}
{{- end -}}
{{ toYaml (mergeOverwrite (deepCopy .Values.config) $own) }}
{{ end -}}

{{- define "stoop.rulesMap" -}}
{{- $name := printf "%s-rules" (include "stoop.fullname" .) -}}
{{- if eq .Values.rollout "pods" -}}
{{- include "stoop.hashed" (dict "name" $name "data" (include "stoop.rules" .)) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{- define "stoop.configMap" -}}
{{- include "stoop.hashed" (dict "name" (printf "%s-config" (include "stoop.fullname" .)) "data" (include "stoop.config" .)) -}}
{{- end -}}
