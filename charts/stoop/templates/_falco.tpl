{{/* falco.yaml. What it must have, and why, is in docs/falco.md. */}}
{{- define "stoop.falcoConfig" -}}
{{- $files := list "/etc/falco/falco_rules.yaml" -}}
{{- range $name, $_ := include "stoop.falcoRules" . | fromYaml -}}
{{- $files = append $files (printf "/etc/stoop-falco/%s" $name) -}}
{{- end -}}
{{- $own := include "stoop.falcoBase" . | fromYaml -}}
{{- $_ := set $own "rules_files" $files -}}
{{ toYaml (mergeOverwrite $own (deepCopy .Values.falco.config)) }}
{{ end -}}

{{- define "stoop.falcoBase" -}}
# The image's own snippets would load the container plugin a second time.
config_files: []
engine: {kind: modern_ebpf}
load_plugins: [container]
plugins:
  - name: container
    library_path: libcontainer.so
    init_config:
      engines:
        cri: {enabled: true, sockets: [{{ .Values.falco.runtimeSocket | quote }}]}
        containerd: {enabled: false}
        docker: {enabled: {{ hasSuffix "docker.sock" .Values.falco.runtimeSocket }}, sockets: [{{ .Values.falco.runtimeSocket | quote }}]}
        podman: {enabled: false}
        lxc: {enabled: false}
        libvirt_lxc: {enabled: false}
        bpm: {enabled: false}
{{ include "stoop.falcoNeeds" (dict "root" . "folder" "/run/stoop") }}
# The alerts are stoop's to tell; what Falco says of itself is in its log.
stdout_output: {enabled: false}
syslog_output: {enabled: false}
http_output: {enabled: false}
program_output: {enabled: false}
log_stderr: true
log_syslog: false
# Nothing listens.
webserver: {enabled: false}
watch_config_files: false
{{- end -}}

{{/* What any Falco needs that writes to stoop: (dict "root" $ "folder" that of the FIFO). */}}
{{- define "stoop.falcoNeeds" -}}
json_output: true
json_include_output_property: true
json_include_tags_property: true
buffered_outputs: false
{{- if include "stoop.pipe" .root }}
file_output:
  enabled: true
  keep_alive: true
  filename: {{ .folder }}/falco.pipe
{{- else }}
http_output:
  enabled: true
  url: https://falco:TOKEN@{{ include "stoop.fullname" .root }}-alerts.{{ .root.Release.Namespace }}.svc:{{ .root.Values.source.http.port }}/
{{- end }}
append_output:
  - suggested_output: true
  - match: {source: syscall}
    extra_fields:
      - proc.pid
      - proc.pid.ts
      - proc.ppid
      - "proc.apid[2]"
      - k8s.pod.uid
      - container.full_id
      - evt.hostname
      - fd.name
      - fd.l4proto
      - user.name
      - user.uid
      - user.loginname
      - user.loginuid
{{- end -}}

{{/* Rules files besides Falco's own, as a mapping of names to texts. */}}
{{- define "stoop.falcoRules" -}}
{{- $rules := dict -}}
{{- $examples := include "stoop.falcoExamples" . | trim -}}
{{- if $examples -}}{{- $_ := set $rules "a-examples.yaml" (printf "%s\n" $examples) -}}{{- end -}}
{{- range $name, $text := .Values.falco.rules -}}
{{- if hasKey $rules $name -}}{{- fail (printf "falco.rules: the name %s is taken" $name) -}}{{- end -}}
{{- $_ := set $rules $name $text -}}
{{- end -}}
{{ toYaml $rules }}
{{- end -}}

{{- define "stoop.falcoExamples" -}}
{{- $ips := list -}}
{{- $nets := list -}}
{{- $names := list -}}
{{- range .Values.falco.examples.forbiddenAddresses -}}
{{- if contains "/" . -}}{{- $nets = append $nets . -}}
{{- else if regexMatch "^[0-9.]+$|:" . -}}{{- $ips = append $ips . -}}
{{- else -}}{{- $names = append $names . -}}
{{- end -}}
{{- end -}}
{{- $to := list -}}
{{- if $ips }}{{ $to = append $to "fd.sip in (stoop_forbidden_ips)" }}
- list: stoop_forbidden_ips
  items: {{ range $i, $ip := $ips }}{{ if $i }}, {{ else }}[{{ end }}{{ $ip | squote | quote }}{{ end }}]
{{- end }}
{{- if $nets }}{{ $to = append $to "fd.snet in (stoop_forbidden_networks)" }}
- list: stoop_forbidden_networks
  items: {{ range $i, $net := $nets }}{{ if $i }}, {{ else }}[{{ end }}{{ $net | squote | quote }}{{ end }}]
{{- end }}
{{- if $names }}{{ $to = append $to "fd.sip.name in (stoop_forbidden_names)" }}
- list: stoop_forbidden_names
  items: {{ toJson $names }}
{{- end }}
{{- if $to }}
- rule: Connection to a forbidden address
  desc: A container connects to an address, a network or a name that is listed in the chart's values.
  condition: >
    evt.type in (connect, sendto, sendmsg) and fd.typechar in (4, 6)
    and container.id != host and ({{ join " or " $to }})
  output: A container connects to a forbidden address | connection=%fd.name protocol=%fd.l4proto process=%proc.name command=%proc.cmdline container_id=%container.id
  priority: CRITICAL
  tags: [container, network, stoop]
{{- end }}
{{- if .Values.falco.examples.miners }}
- rule: Cryptominer at work
  desc: A program in a container is called like a miner, or is told of a mining pool.
  condition: >
    evt.type in (execve, execveat) and container.id != host
    and (proc.name in (xmrig, xmr-stak, minerd, cpuminer, ethminer, t-rex, nbminer, lolMiner)
    or proc.cmdline contains "stratum+tcp://" or proc.cmdline contains "stratum+ssl://"
    or proc.cmdline contains "--donate-level")
  output: A cryptominer runs in a container | process=%proc.name command=%proc.cmdline container_id=%container.id
  priority: CRITICAL
  tags: [container, process, stoop]
{{- end }}
{{- end -}}

{{- define "stoop.falcoMap" -}}
{{- include "stoop.hashed" (dict "name" (printf "%s-falco" (include "stoop.fullname" .)) "data" (print (include "stoop.falcoConfig" .) (include "stoop.falcoRules" .))) -}}
{{- end -}}

{{- define "stoop.falco" -}}
{{- with .Values.falco -}}
- name: falco
  image: {{ include "stoop.image" .image }}
  imagePullPolicy: {{ .image.pullPolicy }}
  command: [/usr/bin/falco]
  args: [-c, /etc/stoop-falco/falco.yaml{{ range .args }}, {{ . | quote }}{{ end }}]
  env:
    - {name: HOST_ROOT, value: /host}
    # What the alerts call this node.
    - name: FALCO_HOSTNAME
      valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  securityContext:
    {{- if .privileged }}
    privileged: true
    {{- else }}
    runAsUser: 0
    allowPrivilegeEscalation: false
    capabilities:
      drop: [ALL]
      {{- with .capabilities }}
      add: {{ toJson . }}
      {{- end }}
    appArmorProfile: {type: Unconfined}
    {{- end }}
  resources:
    {{- toYaml .resources | nindent 4 }}
  volumeMounts:
    - {name: falco, mountPath: /etc/stoop-falco, readOnly: true}
    - {name: pipe, mountPath: /run/stoop}
    - {name: host-proc, mountPath: /host/proc, readOnly: true}
    - {name: host-etc, mountPath: /host/etc, readOnly: true}
    - {name: host-kernel, mountPath: /sys/kernel, readOnly: true}
    - {name: host-runtime, mountPath: /host{{ dir .runtimeSocket }}, readOnly: true}
{{- end -}}
{{- end -}}

{{- define "stoop.falcoVolumes" -}}
- name: falco
  configMap: {name: {{ include "stoop.falcoMap" . }}}
- name: host-proc
  hostPath: {path: /proc, type: Directory}
# Names of users.
- name: host-etc
  hostPath: {path: /etc, type: Directory}
# The kernel's types and trace points.
- name: host-kernel
  hostPath: {path: /sys/kernel, type: Directory}
- name: host-runtime
  hostPath: {path: {{ dir .Values.falco.runtimeSocket }}}
{{- end -}}
