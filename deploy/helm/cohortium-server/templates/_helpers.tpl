{{- define "cohortium.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- define "cohortium.selector" -}}
app.kubernetes.io/name: cohortium-server
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}
{{- define "cohortium.labels" -}}
{{ include "cohortium.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
{{- define "cohortium.container" -}}
image: "{{ .Values.image.repository }}@{{ .Values.image.digest }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.runAsUser }}
  runAsGroup: {{ .Values.runAsUser }}
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  privileged: false
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end -}}
