package rules

import "slices"

// Sources says whether a rule may match alerts of a source, and whether those of any
// other, by what match says.
func (r *Rule) Sources(source string) (this, other bool) {
	s := r.match.source
	if s == nil {
		return true, true
	}
	return s.match(source), !s.literal() || slices.ContainsFunc(s.all, func(v string) bool { return v != source })
}

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
