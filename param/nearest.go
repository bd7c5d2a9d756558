package param

import (
	"fmt"
	"strings"
)

// Unknown says that a word is none of those that exist, which of them was
// probably meant, and which there are: `unknown parameter "tll": did you mean
// "ttl"? There are: direction, ttl`.
func Unknown(what, word string, words []string) string {
	s := fmt.Sprintf("unknown %s %s", what, Cut(word))
	if near := Nearest(word, words); near != "" {
		s += fmt.Sprintf(": did you mean %q?", near)
	} else {
		s += "."
	}
	switch {
	case len(words) == 0:
		return s + " There is none at all"
	case len(words) == 1:
		return s + " There is only: " + words[0]
	}
	return s + " There are: " + strings.Join(words, ", ")
}

// Nearest is the one of words that somebody who wrote word probably meant, ""
// if none is near. Case, hyphens and underscores count for nothing.
func Nearest(word string, words []string) string {
	const longest = 64 // nobody misspells more, and the cost is quadratic
	w := plain(word)
	if w == "" || len(w) > longest {
		return ""
	}
	best, least := "", len(w)/3+2
	for _, candidate := range words {
		c := plain(candidate)
		if len(c) > longest {
			continue
		}
		d := distance(w, c)
		switch {
		case d <= min(len(w), len(c))/3, d == 1 && len(c) > 1:
		case len(w) >= 3 && (strings.HasPrefix(c, w) || strings.HasPrefix(w, c) && len(c) >= 3):
			d = len(w)/3 + 1 // behind any real misspelling
		default:
			continue
		}
		if d < least {
			best, least = candidate, d
		}
	}
	return best
}

func plain(s string) string {
	return strings.ToLower(strings.NewReplacer("-", "", "_", "", " ", "").Replace(s))
}

// distance counts the letters to add, drop, replace, or swap with their
// neighbour to make b of a.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d := min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[i-2][j-2]+1)
			}
			rows[i][j] = d
		}
	}
	return rows[len(a)][len(b)]
}
