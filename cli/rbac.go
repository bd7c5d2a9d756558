package cli

import (
	"fmt"
	"path"
	"slices"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/validation"

	"stoop/alert"
	"stoop/responders"
	"stoop/rules"
)

func (p *program) rbacCommand() *cobra.Command {
	var file, config string
	var account responders.Account
	cmd := &cobra.Command{
		Use:   "rbac",
		Short: "Print the permissions that these rules need in a cluster",
		Long: `Prints the least Roles and ClusterRoles that the steps of the rules need, their
bindings to stoop's service account, and the policies that tie its token to its
own node, as YAML for kubectl apply. Rules in audit mode count as well: they are
meant to be enforced one day.

A rule that is limited to namespaces by name needs Roles in these alone: match
has fields: {k8s.ns.name: [shop, web]}, or ka.target.namespace for audit events.
What guard.protect.namespaces names needs none.

Steps that audit events cause are done by stoops of their own, with
kubernetes.auditEvents: elected in their configuration. With --audit-events, or
with that configuration, it prints what these need; without, what the stoops of
nodes do. Give them service accounts of their own, so that no node's token can
delete what audit events name.

Print it anew, and apply it, when the rules change. Nothing is asked and nothing
is changed.`,
		Example: "  stoop rbac --rules rules.yaml\n  stoop rbac --rules rules.yaml --audit-events\n  stoop rbac --rules rules.yaml --namespace security | kubectl apply -f -",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, name := range []struct{ flag, value string }{{"--namespace", account.Namespace}, {"--service-account", account.Name}} {
				check := validation.IsDNS1123Label
				if name.flag != "--namespace" {
					check = validation.IsDNS1123Subdomain
				}
				if msgs := check(name.value); len(msgs) > 0 {
					return usage("%s is %q: %s", name.flag, name.value, msgs[0])
				}
			}
			entries := responders.All()
			c, set, err := loadBoth(config, file, entries)
			if err != nil {
				return wrong(err)
			}
			account.AuditEvents = account.AuditEvents || c.Kubernetes.AuditEvents == elected
			if account.AuditEvents && !cmd.Flags().Changed("service-account") {
				account.Name = auditAccount
			}
			needs, err := responders.Permit(entries, account, planned(set, entries, append(c.Guard.Protect.Namespaces, account.Namespace), account.AuditEvents))
			if err != nil {
				return err
			}
			who := "stoop's service account"
			if account.AuditEvents {
				who = "stoop's service account for audit events"
			}
			if _, err := fmt.Fprintf(p.stdout, "# What %s %s/%s needs for the rules %s, and no more.\n# Printed by stoop rbac; it has to be printed anew when the rules change.\n",
				who, account.Namespace, account.Name, set.Hash); err != nil {
				return err
			}
			return needs.Write(p.stdout)
		},
	}
	cmd.Flags().StringVar(&file, "rules", defaultRules, "the rules `FILE`")
	cmd.Flags().StringVar(&config, "config", "", "the configuration `FILE`, for what it protects")
	cmd.Flags().StringVar(&account.Namespace, "namespace", "stoop", "the `NAMESPACE` of stoop")
	cmd.Flags().StringVar(&account.Name, "service-account", "stoop", "the `NAME` of its service account")
	cmd.Flags().BoolVar(&account.AuditEvents, "audit-events", false, "what answers audit events (account "+auditAccount+")")
	return cmd
}

// auditAccount is the service account of the stoops that answer audit events, where
// --service-account does not say another: two accounts must not have roles of one
// name.
const auditAccount = "stoop-audit"

// planned are the steps that the rules may cause, after audit events or after other
// alerts, and the namespaces that they can act in.
func planned(set *rules.Set, entries []responders.Entry, protected []string, auditEvents bool) []responders.Planned {
	var out []responders.Planned
	for _, r := range set.Rules {
		if audit, other := r.Sources(alert.SourceAudit); auditEvents && !audit || !auditEvents && !other {
			continue
		}
		for _, a := range r.Actions {
			s := responders.Planned{Responder: a.Responder, Params: a.Params}
			i := slices.IndexFunc(entries, func(e responders.Entry) bool { return e.Name == a.Responder })
			if field := entries[i].NamespaceField(a.Params); field != "" {
				if s.Namespaces = r.Exact(field); s.Namespaces != nil {
					s.Namespaces = slices.DeleteFunc(s.Namespaces, func(ns string) bool {
						return len(validation.IsDNS1123Label(ns)) > 0 || slices.ContainsFunc(protected, func(glob string) bool {
							ok, err := path.Match(glob, ns)
							return ok && err == nil
						})
					})
				}
			}
			out = append(out, s)
		}
	}
	return out
}
