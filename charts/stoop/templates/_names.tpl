{{/* The release's full name: also that of its service account, and so short. */}}
{{- define "stoop.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "stoop.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "stoop.fullname" .) -}}
{{- else -}}
{{- required "serviceAccount.name: which one, if none is created?" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels of what is made; with the selector's: (dict "root" $ "component" "stoop"). */}}
{{- define "stoop.selector" -}}
app.kubernetes.io/name: {{ .root.Values.nameOverride | default .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "stoop.labels" -}}
{{ include "stoop.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* An image: (dict "repository" … "tag" … "digest" …). */}}
{{- define "stoop.image" -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag }}
{{- end -}}
{{- end -}}

{{/* A ConfigMap's name with the hash of what is in it. */}}
{{- define "stoop.hashed" -}}
{{ .name }}-{{ .data | sha256sum | trunc 10 }}
{{- end -}}
