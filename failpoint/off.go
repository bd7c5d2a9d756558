//go:build !failpoints

// Package failpoint marks the places around publish and acknowledge where a
// crash would hurt most, so that tests can have one right there. In a program
// that was not built with the tag failpoints the marks are nothing.
package failpoint

// Hit ends the process as kill -9 does, if the program was built with the tag
// failpoints and STOOP_FAILPOINT names this place.
func Hit(string) {}
