package doctor

import (
	"os"
	"strings"
	"testing"
)

// docs/doctor.md has every check, as it is.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range Checks() {
		if row := "| `" + c.Name + "` | " + c.Doc + " |\n"; !strings.Contains(string(page), row) {
			t.Errorf("docs/doctor.md has no row %s", row)
		}
	}
}
