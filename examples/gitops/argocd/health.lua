-- Health of a FineTuneJob for Argo CD. Put it into the ConfigMap argocd-cm, under the key
-- resource.customizations.health.finetune.dev_FineTuneJob (docs/gitops.md has the command).
local health = {status = "Progressing", message = "The operator has not looked at this spec yet."}
local status = obj.status or {}
if status.observedGeneration ~= obj.metadata.generation then
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end
local function holds(kind)
  return conditions[kind] ~= nil and conditions[kind].status == "True"
end

if holds("Stalled") then
  health = {status = "Degraded", message = conditions.Stalled.message}
elseif status.phase == "Suspended" then
  health = {status = "Suspended", message = "spec.suspend is set."}
elseif status.phase == "Succeeded" and holds("Ready") then
  health = {status = "Healthy", message = conditions.Ready.message}
elseif conditions.Progressing ~= nil then
  health.message = conditions.Progressing.message
end
return health
