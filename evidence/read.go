package evidence

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// manifestMost is how many bytes of a manifest are read.
const manifestMost = 16 << 20

// OpenToRead opens the folder that another process writes to. Only what reads may be
// called.
func OpenToRead(dir string) (*Store, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the evidence folder: %w", err)
	}
	return &Store{cfg: Config{Dir: dir}, root: root}, nil
}

// Cases are the manifests of all cases, the earliest first. One that can't be
// read has a note instead of pieces.
func (s *Store) Cases() ([]Manifest, error) {
	steps, err := s.steps()
	if err != nil {
		return nil, err
	}
	cases := make([]Manifest, 0, len(steps))
	for _, step := range steps {
		m, err := s.manifest(step)
		if err != nil {
			m = Manifest{About: About{Step: step}, Notes: []string{"the manifest can't be read: " + err.Error()}}
		}
		cases = append(cases, m)
	}
	slices.SortFunc(cases, func(a, b Manifest) int {
		return cmp.Or(a.Begun.Compare(b.Begun), cmp.Compare(a.Step, b.Step))
	})
	return cases, nil
}

// Case is the manifest of a step's case, or [ErrNoCase].
func (s *Store) Case(step string) (Manifest, error) {
	if !isStep(step) {
		return Manifest{}, fmt.Errorf("%.40q: %w", step, ErrNoCase)
	}
	m, err := s.manifest(step)
	if errors.Is(err, fs.ErrNotExist) {
		return Manifest{}, fmt.Errorf("step %s: %w", step, ErrNoCase)
	}
	return m, err
}

// Read opens a piece of a case.
func (s *Store) Read(step, name string) (io.ReadCloser, Piece, error) {
	m, err := s.Case(step)
	if err != nil {
		return nil, Piece{}, err
	}
	p, ok := m.Piece(name)
	if !ok || p.SHA256 == "" {
		return nil, p, fmt.Errorf("the evidence of step %s has no piece %.100q", step, name)
	}
	f, err := s.file(step, p.Name)
	if err != nil {
		return nil, p, err
	}
	return f, p, nil
}

// Copied reports whether a bucket has the case as it is, by the mark in its folder.
func (s *Store) Copied(step string) bool {
	m, err := s.mark(step)
	if err != nil {
		return false
	}
	_, sum, err := s.hash(context.Background(), step, manifestName)
	return err == nil && m.Manifest == sum
}

// Verify reads all pieces of a case again and says what is not as its manifest
// says; nil: all is.
func (s *Store) Verify(ctx context.Context, step string) ([]string, error) {
	m, err := s.Case(step)
	if err != nil {
		return nil, err
	}
	var wrong []string
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if !m.Finished() {
		say("the case was never finished")
	}
	listed := map[string]bool{manifestName: true, uploadedName: true}
	for _, p := range m.Pieces {
		listed[p.Name] = true
		if p.SHA256 == "" {
			continue
		}
		size, sum, err := s.hash(ctx, step, p.Name)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			say("%s can't be read: %v", p.Name, err)
		case size != p.Size:
			say("%s has %d bytes, it had %d", p.Name, size, p.Size)
		case sum != p.SHA256:
			say("%s has the SHA-256 %s, it had %s", p.Name, sum, p.SHA256)
		}
	}
	entries, err := fs.ReadDir(s.root.FS(), step)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !listed[e.Name()] {
			say("%s is in no manifest", e.Name())
		}
	}
	return wrong, nil
}

// manifest reads a case's manifest. Its error may be [fs.ErrNotExist].
func (s *Store) manifest(step string) (Manifest, error) {
	f, err := s.file(step, manifestName)
	if err != nil {
		return Manifest{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, manifestMost))
	if err != nil {
		return Manifest{}, err
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return Manifest{}, fmt.Errorf("read %s: %w", path(step, manifestName), err)
	}
	switch {
	case m.Version != manifestVersion:
		return Manifest{}, fmt.Errorf("%s is of version %d, and this stoop reads %d", path(step, manifestName), m.Version, manifestVersion)
	case m.Step != step:
		return Manifest{}, fmt.Errorf("%s is of another step", path(step, manifestName))
	}
	for _, p := range m.Pieces {
		if !isName(p.Name) {
			return Manifest{}, fmt.Errorf("%s names a piece %.100q, which is no name of one", path(step, manifestName), p.Name)
		}
	}
	return m, nil
}

// isName reports whether a piece may have this name: a manifest that somebody
// changed must lead nowhere.
func isName(name string) bool {
	return name != "" && name != manifestName && !strings.HasPrefix(name, ".") && !strings.ContainsAny(name, "/\x00")
}

func (s *Store) manifestSize(step string) (int64, error) {
	info, err := s.root.Lstat(path(step, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return blocks(info.Size()), nil
}

// file opens a file of a case, and nothing that is no regular file.
func (s *Store) file(step, name string) (*os.File, error) {
	info, err := s.root.Lstat(path(step, name))
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path(step, name))
	}
	return s.root.Open(path(step, name))
}

// hash is a file's size and SHA-256.
func (s *Store) hash(ctx context.Context, step, name string) (int64, string, error) {
	f, err := s.file(step, name)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, contextReader{ctx, f})
	return n, hex.EncodeToString(h.Sum(nil)), err
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r contextReader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}

func shortHash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
