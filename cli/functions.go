package cli

import (
	"encoding/json"
	"fmt"
	"slices"

	"stoop/broker"
	"stoop/rules"
)

// unserved are the calls of rules that nobody can answer, by what the
// configuration says, each as a sentence.
func (c *Config) unserved(set *rules.Set) []string {
	var out []string
	for _, r := range set.Rules {
		for _, a := range r.Actions {
			if a.Responder != "call" {
				continue
			}
			var p struct {
				Subject string `json:"subject"`
			}
			if json.Unmarshal(a.Params, &p) != nil {
				continue // it was checked when it was read
			}
			served := slices.ContainsFunc(c.Broker.Users, func(u BrokerUser) bool {
				return slices.ContainsFunc(u.Serve, func(s Subject) bool { return broker.Serves(string(s), p.Subject) })
			})
			switch {
			case slices.Contains(c.Broker.Mirror, p.Subject):
				out = append(out, fmt.Sprintf("rule %s calls %s, which is one of broker.mirror: nobody may answer there", r.Name, p.Subject))
			case c.Broker.Listen == "":
				out = append(out, fmt.Sprintf("rule %s calls %s, and nobody can answer: broker.listen is off", r.Name, p.Subject))
			case !served:
				out = append(out, fmt.Sprintf("rule %s calls %s, and nobody may answer there: no user in broker.users has it in serve", r.Name, p.Subject))
			}
		}
	}
	return out
}
