{{- define "stoop.mainImage" -}}
{{- with .Values.image -}}
{{- include "stoop.image" (dict "repository" .repository "tag" (.tag | default $.Chart.AppVersion) "digest" .digest) -}}
{{- end -}}
{{- end -}}

{{/* What every container of stoop's may: nothing. */}}
{{- define "stoop.restricted" -}}
runAsUser: 65532
runAsGroup: 65532
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* Keeps the FIFO open, before, beside and after all others. */}}
{{- define "stoop.hold" -}}
- name: hold
  image: {{ include "stoop.image" (dict "repository" .Values.image.repository "tag" (.Values.hold.tag | default .Values.image.tag | default .Chart.AppVersion) "digest" (ternary .Values.hold.digest (.Values.hold.digest | default .Values.image.digest) (ne .Values.hold.tag ""))) }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  restartPolicy: Always
  command: [/usr/bin/stoop-hold]
  args: [/run/stoop/falco.pipe]
  securityContext:
    {{- include "stoop.restricted" . | nindent 4 }}
  resources:
    {{- toYaml .Values.hold.resources | nindent 4 }}
  volumeMounts:
    - {name: pipe, mountPath: /run/stoop}
{{- end -}}

{{/* Gives folders of the host's to stoop's user: (dict "root" $ "data" bool "pipe" bool). */}}
{{- define "stoop.prepare" -}}
{{- if .root.Values.data.prepare }}
- name: prepare
  image: {{ include "stoop.mainImage" .root }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [/usr/bin/stoop]
  args:
    - prepare
    - --owner=65532:65532
    {{- if .data }}
    - /var/lib/stoop
    {{- end }}
    {{- if .pipe }}
    - /run/stoop
    {{- end }}
  securityContext:
    runAsUser: 0
    runAsGroup: 0
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities:
      drop: [ALL]
      add:
        - CHOWN            # to give the folders away
        - DAC_READ_SEARCH  # to look into them afterwards, at the next start
    seccompProfile: {type: RuntimeDefault}
  resources:
    requests: {cpu: 10m, memory: 32Mi}
    limits: {memory: 64Mi}
  volumeMounts:
    {{- if .data }}
    - {name: data, mountPath: /var/lib/stoop}
    {{- end }}
    {{- if .pipe }}
    - {name: pipe, mountPath: /run/stoop}
    {{- end }}
{{- end }}
{{- end -}}

{{/* stoop itself: (dict "root" $ "sidecar" bool). */}}
{{- define "stoop.container" -}}
{{- $root := .root -}}
{{- with .root.Values -}}
- name: stoop
  image: {{ include "stoop.mainImage" $root }}
  imagePullPolicy: {{ .image.pullPolicy }}
  {{- if $.sidecar }}
  restartPolicy: Always
  {{- end }}
  command: [/usr/bin/stoop]
  args: [run]
  env:
    - name: NODE_NAME
      valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
    - name: POD_NAMESPACE
      valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
  {{- if or .metrics.enabled (not (include "stoop.pipe" $root)) }}
  ports:
    {{- if .metrics.enabled }}
    - {name: metrics, containerPort: {{ .metrics.port }}}
    {{- end }}
    {{- if not (include "stoop.pipe" $root) }}
    - {name: alerts, containerPort: {{ .source.http.port }}}
    {{- end }}
  {{- end }}
  # Falco starts once the FIFO is read.
  startupProbe:
    exec: {command: [/usr/bin/stoop, probe, live]}
    periodSeconds: 1
    timeoutSeconds: 5
    failureThreshold: 60
  # Fails on a deadlock alone: a restart mends nothing else.
  livenessProbe:
    exec: {command: [/usr/bin/stoop, probe, live]}
    periodSeconds: 30
    timeoutSeconds: 10
    failureThreshold: 4
  # The store takes a write, the FIFO is drained, no alert waits long.
  readinessProbe:
    exec: {command: [/usr/bin/stoop, probe, ready]}
    periodSeconds: 15
    timeoutSeconds: 10
    failureThreshold: 2
  securityContext:
    {{- if .node.responders }}
    runAsUser: 0
    runAsGroup: 0
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities:
      drop: [ALL]
      {{- with .node.capabilities }}
      add: {{ toJson . }}
      {{- end }}
    seccompProfile: {type: RuntimeDefault}
    # The runtime's profile lets nobody look at processes of other profiles.
    appArmorProfile: {type: Unconfined}
    {{- else }}
    {{- include "stoop.restricted" $root | nindent 4 }}
    {{- end }}
  resources:
    {{- toYaml .resources | nindent 4 }}
  volumeMounts:
    # Where every command of stoop's looks for them.
    - {name: config, mountPath: /etc/stoop, readOnly: true}
    - {name: data, mountPath: /var/lib/stoop}
    - {name: token, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
    - {name: tmp, mountPath: /tmp}
    {{- if include "stoop.pipe" $root }}
    - {name: pipe, mountPath: /run/stoop}
    {{- else }}
    - {name: http-token, mountPath: /etc/stoop-http/token, readOnly: true}
    - {name: http-tls, mountPath: /etc/stoop-http/tls, readOnly: true}
    {{- end }}
    {{- range .secrets }}
    - {name: secret-{{ .name }}, mountPath: /etc/stoop-secrets/{{ .name }}, readOnly: true}
    {{- end }}
    {{- if .node.responders }}
    # Freezing, and finding containers: the runtime's own mount shows stoop's alone.
    - {name: cgroup, mountPath: /sys/fs/cgroup}
    {{- end }}
{{- end -}}
{{- end -}}

{{- define "stoop.pipeVolume" -}}
- name: pipe
  {{- if include "stoop.pipeOnHost" . }}
  hostPath: {path: {{ .Values.source.hostPath }}, type: DirectoryOrCreate}
  {{- else }}
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
  {{- end }}
{{- end -}}

{{- define "stoop.volumes" -}}
{{- with .Values -}}
- name: config
  projected:
    sources:
      - configMap: {name: {{ include "stoop.configMap" $ }}}
      - configMap: {name: {{ include "stoop.rulesMap" $ }}}
- name: data
  {{- if eq .data.type "hostPath" }}
  hostPath: {path: {{ .data.path }}, type: DirectoryOrCreate}
  {{- else }}
  emptyDir: {sizeLimit: {{ .data.sizeLimit }}}
  {{- end }}
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 16Mi}
# A token for stoop's container alone: Falco's has none.
- name: token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap:
          name: kube-root-ca.crt
          items: [{key: ca.crt, path: ca.crt}]
      - downwardAPI:
          items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]
{{- if not (include "stoop.pipe" $) }}
- name: http-token
  secret:
    secretName: {{ required "source.http.tokenSecret: the Secret whose key token Falco shows" .source.http.tokenSecret }}
    defaultMode: 0440
    items: [{key: token, path: token}]
- name: http-tls
  secret:
    secretName: {{ required "source.http.tlsSecret: a Secret of the type kubernetes.io/tls" .source.http.tlsSecret }}
    defaultMode: 0440
{{- end }}
{{- range .secrets }}
- name: secret-{{ .name }}
  secret: {secretName: {{ .secretName }}, defaultMode: 0440}
{{- end }}
{{- if .node.responders }}
- name: cgroup
  hostPath: {path: /sys/fs/cgroup, type: Directory}
{{- end }}
{{- end -}}
{{- end -}}

{{/* What the pods of both DaemonSets have alike. */}}
{{- define "stoop.podSpec" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
# Tokens, Secrets and the FIFO's folder are for stoop's group.
securityContext: {fsGroup: 65532}
{{- end -}}
