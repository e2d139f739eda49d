{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Of an object beside the operator, by a list of the root and the end of its name; 63 letters at most. */}}
{{- define "finetune-operator.nameOf" -}}
{{- $end := printf "-%s" (index . 1) -}}
{{- include "finetune-operator.fullname" (index . 0) | trunc (int (sub 63 (len $end))) | trimSuffix "-" -}}{{- $end -}}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "finetune-operator.fullname" .) -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "finetune-operator.image" -}}
{{- printf "%s:%s" .image.repository (.image.tag | default .appVersion) -}}
{{- with .image.digest -}}@{{ . }}{{- end -}}
{{- end -}}

{{/* Names of the Secrets for pulling images, as a JSON list; 0.1.0 took plain names alone. */}}
{{- define "finetune-operator.pullSecrets" -}}
{{- $names := list -}}
{{- range .Values.imagePullSecrets -}}
{{- if kindIs "string" . -}}
{{- $names = append $names . -}}
{{- else -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
{{- toJson $names -}}
{{- end -}}

{{- define "finetune-operator.imagePullSecrets" -}}
{{- with include "finetune-operator.pullSecrets" . | fromJsonArray -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Of the pod of `helm test` and its account: no selector of the operator finds them. */}}
{{- define "finetune-operator.testLabels" -}}
{{ include "finetune-operator.labels" . | fromYaml | merge (dict "app.kubernetes.io/component" "test") | toYaml }}
{{- end -}}

{{- define "finetune-operator.demoStoreLabels" -}}
{{ include "finetune-operator.labels" . | fromYaml | merge (dict "app.kubernetes.io/component" "demo-store") | toYaml }}
{{- end -}}

{{/* Where a policy holds: in these namespaces. */}}
{{- define "finetune-operator.inNamespaces" -}}
matchResources:
  namespaceSelector:
    matchExpressions:
      - key: kubernetes.io/metadata.name
        operator: In
        values: {{- toYaml . | nindent 10 }}
{{- end -}}

{{/* The fields of status that the operator alone writes. */}}
{{- define "finetune-operator.statusFields" -}}
observedGeneration phase reason stage conditions stages version artifacts images versions manifestUri metrics dataset notices lineage resolved lastRefreshTime nextRefreshTime lastHandledRetryAt usage resolvedInputs planned
{{- end -}}

{{/* What the operator may do where it watches: each verb on each resource by name, nothing on Secrets. */}}
{{- define "finetune-operator.rules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch]
# Also what it hands on to the trainer's Role, which may patch the status of one FineTuneJob.
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
# Needed for blockOwnerDeletion where OwnerReferencesPermissionEnforcement is on (OpenShift).
- apiGroups: [finetune.dev]
  resources: [finetunejobs/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# Its own are made for a FineTuneJob's stages and deleted after the last one. They are listed once
# an operator begins to lead, by its label, to find what the one before has left.
- apiGroups: [""]
  resources: [configmaps, serviceaccounts]
  verbs: [get, list, create, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, create, delete]
# Listed to say why the Job controller can't create a pod.
- apiGroups: [""]
  resources: [events]
  verbs: [list, create, patch]
# Kueue's, to say why a Job waits in a queue. There may be none.
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
{{- end -}}
