package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"stoop/evidence"
	"stoop/param"
)

// evidenceDir is where a data folder has what is kept of suspects.
func evidenceDir(data string) string { return filepath.Join(data, "evidence") }

func (p *program) evidenceCommand() *cobra.Command {
	var output string
	var verify bool
	cmd := &cobra.Command{
		Use:   "evidence [ID [PIECE]]",
		Short: "List what is kept of suspects, show a case, or write a piece of it",
		Long: `Lists the cases of evidence, the earliest first; with the ID of a step, its case
and all pieces; with a piece's name as well, that piece, as it is, on standard
output. With --verify every piece is read again and held against the SHA-256 in
the manifest. It reads the data folder itself, whether stoop runs or not, as the
user whose it is (root).

Exits with 1 if --verify found something wrong.`,
		Example: `  stoop evidence
  stoop evidence 4f1c0e6f6a4de1d0a2b7 --verify
  stoop evidence 4f1c0e6f6a4de1d0a2b7 main.log | less
  stoop evidence 4f1c0e6f6a4de1d0a2b7 1234.exe > suspect.exe`,
		Args: cobra.MaximumNArgs(2),
	}
	data := dataFlag(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.Flags().BoolVar(&verify, "verify", false, "read every piece again and hold it against its manifest")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkOutput(output); err != nil {
			return err
		}
		if len(args) == 2 && verify {
			return usage("--verify goes with a case, or with none, and not with a piece")
		}
		s, err := evidence.OpenToRead(evidenceDir(*data))
		switch {
		case errors.Is(err, fs.ErrPermission):
			return fmt.Errorf("%w (what is kept of suspects is for stoop's user alone: try as root)", err)
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("%s holds no evidence (--data names the folder of the stoop that is meant): %w", *data, err)
		case err != nil:
			return err
		}
		defer s.Close()
		if len(args) == 2 {
			return p.piece(s, args[0], args[1])
		}
		e := &evidenceLister{store: s, verify: verify}
		if len(args) == 1 {
			return p.evidenceCase(cmd.Context(), e, args[0], output == "json")
		}
		return p.evidenceCases(cmd.Context(), e, output == "json")
	}
	return cmd
}

// shownCase is a case as it is listed: its manifest, and what is wrong with it.
type shownCase struct {
	evidence.Manifest
	Size  int64    `json:"size"`
	Whole bool     `json:"whole"`
	Copy  bool     `json:"copied,omitempty"` // the bucket has it
	Wrong []string `json:"wrong,omitempty"`
}

// evidenceLister reads cases, and holds them against their manifests if it is to.
type evidenceLister struct {
	store  *evidence.Store
	verify bool
	wrong  int
}

func (l *evidenceLister) show(ctx context.Context, m evidence.Manifest) (shownCase, error) {
	c := shownCase{Manifest: m, Whole: m.Finished(), Copy: l.store.Copied(m.Step)}
	for _, p := range m.Pieces {
		c.Size += p.Size
		c.Whole = c.Whole && p.Whole()
	}
	if l.verify {
		wrong, err := l.store.Verify(ctx, m.Step)
		switch {
		case ctx.Err() != nil:
			return c, ctx.Err()
		case err != nil:
			wrong = []string{err.Error()}
		}
		c.Wrong = wrong
		if len(wrong) > 0 {
			l.wrong++
		}
	}
	return c, nil
}

// verdict is the error of what was found wrong.
func (l *evidenceLister) verdict() error {
	if l.wrong > 0 {
		return errSilent
	}
	return nil
}

func (p *program) evidenceCases(ctx context.Context, l *evidenceLister, asJSON bool) error {
	cases, err := l.store.Cases()
	if err != nil {
		return err
	}
	out := bufio.NewWriter(p.stdout)
	defer out.Flush()
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	if len(cases) == 0 && !asJSON {
		fmt.Fprintln(out, "no evidence is kept")
		return nil
	}
	t := &table{head: []string{"ID", "TIME", "RESPONDER", "SIZE", "WHOLE", "TARGET AND RULE"}}
	for _, m := range cases {
		c, err := l.show(ctx, m)
		if err != nil {
			return err
		}
		if asJSON {
			if err := enc.Encode(c); err != nil {
				return err
			}
			continue
		}
		what := c.Target
		if c.Rule != "" {
			what += "; rule " + c.Rule
		}
		t.add(c.Step, when(c.Begun), c.Responder, sizeText(c.Size), c.wholeText(l.verify), what)
	}
	if !asJSON {
		t.print(out, width(p.stdout))
	}
	return l.verdict()
}

// when is a time in a list; a case without a manifest has none.
func when(t time.Time) string {
	if t.IsZero() {
		return "?"
	}
	return t.Local().Format("01-02 15:04:05")
}

// wholeText says in a word how it stands with a case.
func (c *shownCase) wholeText(verified bool) string {
	switch {
	case len(c.Wrong) > 0:
		return "wrong"
	case !c.Finished():
		return "unfinished"
	case !c.Whole:
		return "in part"
	case verified:
		return "verified"
	}
	return "yes"
}

func (p *program) evidenceCase(ctx context.Context, l *evidenceLister, id string, asJSON bool) error {
	m, err := l.store.Case(id)
	if err != nil {
		return p.noCase(l.store, id, err)
	}
	c, err := l.show(ctx, m)
	if err != nil {
		return err
	}
	out := bufio.NewWriter(p.stdout)
	defer out.Flush()
	if asJSON {
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(c); err != nil {
			return err
		}
		return l.verdict()
	}
	about := &table{head: []string{"STEP", c.Step}}
	about.add("RULE", c.Rule)
	about.add("RESPONDER", c.Responder)
	about.add("TARGET", c.Target)
	about.add("ALERT", c.Alert)
	about.add("BEGUN", c.Begun.Local().Format(time.RFC3339Nano))
	if c.Finished() {
		about.add("ENDED", c.Ended.Local().Format(time.RFC3339Nano))
	}
	about.add("WHOLE", c.wholeText(l.verify))
	if c.Copy {
		about.add("COPIED", "the bucket has it")
	}
	about.print(out, width(p.stdout))
	pieces := &table{head: []string{"PIECE", "SIZE", "SHA-256"}}
	for _, q := range c.Pieces {
		what := q.SHA256
		if q.Cut {
			what += " cut: there was more"
		}
		if q.Error != "" {
			what += " not whole: " + q.Error
		}
		if q.Earlier {
			what += " of a run that was cut off"
		}
		pieces.add(q.Name, sizeText(q.Size), what)
	}
	if len(c.Pieces) > 0 {
		fmt.Fprintln(out)
	}
	pieces.print(out, width(p.stdout))
	for i, list := range [][]string{c.Notes, c.Wrong} {
		for j, line := range list {
			if j == 0 {
				fmt.Fprintf(out, "\n%s\n", []string{"NOTES", "WRONG"}[i])
			}
			for _, part := range wrap(clean(line), width(p.stdout)) {
				fmt.Fprintln(out, part)
			}
		}
	}
	return l.verdict()
}

// noCase says which case may have been meant.
func (p *program) noCase(s *evidence.Store, id string, err error) error {
	if !errors.Is(err, evidence.ErrNoCase) {
		return err
	}
	cases, cerr := s.Cases()
	if cerr != nil {
		return err
	}
	var ids []string
	for _, c := range cases {
		ids = append(ids, c.Step)
	}
	if near := param.Nearest(id, ids); near != "" {
		return fmt.Errorf("%w; did you mean %s?", err, near)
	}
	return fmt.Errorf("%w (stoop evidence lists what there is)", err)
}

// piece writes a piece to standard output as it is; to a terminal only text that is
// safe for one, since an attacker may have written it.
func (p *program) piece(s *evidence.Store, id, name string) error {
	r, _, err := s.Read(id, name)
	if err != nil {
		return p.noCase(s, id, err)
	}
	defer r.Close()
	if !isTerminal(p.stdout) {
		_, err = io.Copy(p.stdout, r)
		return err
	}
	return showText(p.stdout, r, name)
}

// showText writes text line by line, made safe for a terminal, and refuses what is
// none.
func showText(w io.Writer, r io.Reader, name string) error {
	in := bufio.NewReaderSize(r, 64<<10)
	head, err := in.Peek(1024)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, bufio.ErrBufferFull) {
		return err
	}
	if isBinary(head) {
		return fmt.Errorf("%s is no text: send it to a file or a program (> FILE)", clean(name))
	}
	rest := "" // the beginning of a character whose end did not fit the buffer
	for {
		line, err := in.ReadSlice('\n')
		text, end := strings.CutSuffix(rest+string(line), "\n")
		rest = ""
		if errors.Is(err, bufio.ErrBufferFull) {
			for i := 1; i < utf8.UTFMax && i < len(text); i++ {
				if at := len(text) - i; utf8.RuneStart(text[at]) {
					if !utf8.FullRuneInString(text[at:]) {
						text, rest = text[:at], text[at:]
					}
					break
				}
			}
		}
		text = clean(text)
		if end {
			text += "\n"
		}
		if _, werr := io.WriteString(w, text); werr != nil {
			return werr
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
	}
}

// isBinary reports whether a file that begins so is no text.
func isBinary(head []byte) bool {
	bad := 0
	for i := 0; i < len(head); {
		r, n := utf8.DecodeRune(head[i:])
		switch {
		case r == 0:
			return true
		case r == utf8.RuneError && n == 1 && i+utf8.UTFMax <= len(head):
			bad++
		}
		i += n
	}
	return bad*10 > len(head)
}

// sizeText is a size for people.
func sizeText(n int64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB"}
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	f, u := float64(n)/1024, 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	return strconv.FormatFloat(f, 'f', 1, 64) + " " + units[u]
}
