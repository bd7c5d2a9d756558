package rules

import "slices"

// Exact is every value that a field may have where the rule matches, in
// alphabetical order; nil: that can't be told, since match says nothing of the
// field, or has globs.
func (r *Rule) Exact(field string) []string {
	for _, f := range r.match.fields {
		if f.name == field && f.values.literal() {
			return slices.Compact(slices.Sorted(slices.Values(f.values.all)))
		}
	}
	return nil
}
