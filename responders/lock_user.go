package responders

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"stoop/node"
	"stoop/param"
)

func lockUser() Entry {
	return Entry{
		Name: "lock-user",
		Doc:  "Locks the login of the user who raised an alert on the host, and ends his sessions.",
		Notes: `It is for alerts of the host itself (container.id: host), and only where stoop runs on
the host: in a pod it is refused.

The user is the one of the alert: user.name and user.uid, or with user: login
user.loginname and user.loginuid, which stay those of who logged in when he went on with
su or sudo. Name and number have to agree with the one line of /etc/passwd that stoop
itself reads; a user of a directory (LDAP, SSSD) is refused. Never locked are root, the
uids below 1000, 65534 and 65535, the user that stoop runs as, and those named in
protect.

The login is locked with usermod: the password (--lock) and the account (--expiredate
1). The second is what counts, since a locked password still lets in who has an SSH key.
sshd, login, su, sudo and cron ask whether an account has expired; a program that asks
neither PAM nor /etc/shadow does not.

Then his sessions are ended: where systemd-logind knows him, by loginctl terminate-user;
and every process on the host that runs under his uid is killed, wherever it is.
Processes in containers are not his for having the same number, and stay. A process that
he started as another user (a shell of sudo) ends only with a session that logind knows.

What he can do elsewhere goes on: keys for other machines, tokens, a program with setuid
or a cron job of another user that he left behind. Undo gives back what was there
before, the password and the date at which the account expires, where they still are
what stoop made of them. The lock outlives a restart of the machine. Where stoop's
capabilities are limited, usermod needs CAP_CHOWN besides those below.`,
		Params:   param.Describe(lockUserDefaults()),
		Needs:    []node.Need{node.NeedHostPID, node.NeedKill, node.NeedPtrace, node.NeedDACOverride},
		Kind:     Harm,
		Object:   HostObject,
		Deadline: 20 * time.Second,
		New: func(env Env) Responder {
			return &userLocker{own: env.Own, host: proc("/proc").bareHost, usermod: "/usr/sbin/usermod", loginctl: "loginctl"}
		},
	}
}

type lockUserParams struct {
	User    string         `param:"user" oneof:"process login" doc:"Whose login: of the user that the process runs as, or of the one who logged in."`
	Protect []string       `param:"protect" doc:"Users that are never locked, by name; * and ? are globs."`
	TTL     param.Duration `param:"ttl" doc:"After how long he is let in again by himself; 0 is never."`
}

func lockUserDefaults() lockUserParams { return lockUserParams{User: "process"} }

const (
	// userFirst and userNobody bound the uids that people have: those below are
	// the system's, and the last two that 16 bits hold are nobody's.
	userFirst  = 1000
	userNobody = 65534
	userUnset  = math.MaxUint32 // a login uid that was never set
	// lockedDay is the day on which a locked account expired, counted from 1970. 0
	// may also mean that it never does.
	lockedDay = "1"
	// endSessions bounds how long a user's processes are hunted.
	endSessions = 5 * time.Second
)

type userLocker struct {
	own      *OwnProcesses
	host     func() error // why this is no host, or nil
	root     string       // what stands before /etc; "" but for tests
	usermod  string
	loginctl string
	mu       sync.Mutex // what was there before is read and changed by one at a time
}

// lockedUser is the undo record: the account, and what was changed of it.
type lockedUser struct {
	Name     string `json:"name"`
	UID      uint32 `json:"uid"`
	Password bool   `json:"password,omitempty"` // it was locked
	Account  bool   `json:"account,omitempty"`  // it was made to expire
	Expires  string `json:"expires,omitempty"`  // when it did before: days since 1970; "" is never
}

// Check says whether the alert's user would be locked.
func (l *userLocker) Check(_ context.Context, r *Request) error {
	_, _, err := l.suspect(r)
	return err
}

// Object implements [Particular]: another process of the same user is no other
// reason.
func (l *userLocker) Object(r *Request) string {
	params := lockUserDefaults()
	_ = r.Decode(&params) // Check says what is wrong with them
	_, id := params.fields()
	uid, _ := r.Alert.Field(id)
	return "user/" + param.Cut(uid)
}

func (p lockUserParams) fields() (name, id string) {
	if p.User == "login" {
		return "user.loginname", "user.loginuid"
	}
	return "user.name", "user.uid"
}

// suspect is the account that the step is about.
func (l *userLocker) suspect(r *Request) (lockUserParams, account, error) {
	params := lockUserDefaults()
	if err := r.Decode(&params); err != nil {
		return params, account{}, Refuse("%v", err)
	}
	if !r.Target.Host {
		return params, account{}, errNotHost
	}
	if err := l.host(); err != nil {
		return params, account{}, Refuse("%v", err)
	}
	nameField, idField := params.fields()
	name, ok := r.Alert.Field(nameField)
	id, ok2 := r.Alert.Field(idField)
	uid, err := strconv.ParseUint(id, 10, 32)
	switch {
	case !ok || !ok2:
		return params, account{}, Refuse("the alert does not name its user: both %s and %s are needed (append_output in falco.yaml adds them)", nameField, idField)
	case id == "-1", uid == userUnset && err == nil:
		return params, account{}, Refuse("nobody logged in for this process: a service started it")
	case err != nil:
		return params, account{}, Refuse("%s is %s, which is no number of a user", idField, quote(id))
	}
	a, err := l.account(name, uint32(uid))
	if err != nil {
		return params, a, err
	}
	switch {
	case a.uid == 0:
		return params, a, Refuse("root is never locked")
	case a.uid < userFirst || a.uid >= userNobody && a.uid < 1<<16:
		return params, a, Refuse("user %s (uid %d) is the system's: those below %d, %d and %d are never locked", a.name, a.uid, userFirst, userNobody, userNobody+1)
	case int(a.uid) == os.Geteuid(), int(a.uid) == os.Getuid():
		return params, a, Refuse("stoop runs as user %s", a.name)
	case matchAny(params.Protect, a.name):
		return params, a, Refuse("user %s is protected", a.name)
	}
	if _, err := l.login(a); err != nil {
		return params, a, err
	}
	return params, a, l.writable()
}

// writable refuses where usermod would only say that it can't lock its files.
func (l *userLocker) writable() error {
	switch err := unix.Access(filepath.Join(l.root, "/etc"), unix.W_OK); {
	case errors.Is(err, unix.EROFS):
		return Refuse("/etc is read-only for stoop: add ReadWritePaths=/etc to its unit")
	case err != nil:
		return Refuse("stoop may not write to /etc, where accounts are locked: %v", err)
	}
	return nil
}

// account is a user as /etc/passwd has him.
type account struct {
	name string
	uid  uint32
}

// accountName is what usermod and a shell can live with: it comes from
// /etc/passwd, and yet no option may begin by it.
var accountName = regexp.MustCompile(`^[A-Za-z0-9_.][A-Za-z0-9_.@-]{0,254}\$?$`)

// account finds the one line of /etc/passwd with this name and number.
func (l *userLocker) account(name string, uid uint32) (account, error) {
	const path = "/etc/passwd"
	b, err := os.ReadFile(filepath.Join(l.root, path))
	if err != nil {
		return account{}, fmt.Errorf("read %s: %w", path, err)
	}
	named := false
	var others []string
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) < 7 {
			continue
		}
		n, err := strconv.ParseUint(f[2], 10, 32)
		same := err == nil && uint32(n) == uid
		switch {
		case f[0] == name && !same:
			return account{}, Refuse("the alert's user %s has uid %d there, and %s in %s", quote(name), uid, quote(f[2]), path)
		case f[0] == name && named:
			return account{}, Refuse("user %s stands twice in %s", quote(name), path)
		case f[0] == name:
			named = true
		case same:
			others = append(others, f[0])
		}
	}
	switch {
	case !named:
		return account{}, Refuse("there is no user %s in %s: users of a directory (LDAP, SSSD) are locked there", quote(name), path)
	case len(others) > 0:
		return account{}, Refuse("uid %d has another name, %s: locking one would leave the other", uid, quote(others[0]))
	case !accountName.MatchString(name):
		return account{}, Refuse("%s is no name that usermod takes", quote(name))
	}
	return account{name, uid}, nil
}

// login is what /etc/shadow says of an account.
type login struct {
	password string
	expires  string // days since 1970; "" is never
}

// locked reports whether no password is right.
func (s login) locked() bool { return strings.HasPrefix(s.password, "!") }

// expired reports whether the account lets nobody in any more.
func (s login) expired() bool {
	day, err := strconv.ParseInt(s.expires, 10, 64)
	return err == nil && day > 0 && day <= time.Now().Unix()/(24*60*60)
}

func (l *userLocker) login(a account) (login, error) {
	const path = "/etc/shadow"
	b, err := os.ReadFile(filepath.Join(l.root, path))
	if err != nil {
		return login{}, fmt.Errorf("read %s: %w", path, err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) >= 8 && f[0] == a.name {
			return login{password: f[1], expires: f[7]}, nil
		}
	}
	return login{}, Refuse("user %s has no line in %s, which is where an account is made to expire (pwconv makes one)", a.name, path)
}

func (l *userLocker) Act(ctx context.Context, r *Request) (Result, error) {
	params, a, err := l.suspect(r)
	if err != nil {
		return Result{}, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	rec, did, err := l.lock(ctx, r, a, time.Duration(params.TTL))
	if err != nil {
		return Result{}, fmt.Errorf("lock user %s: %w", a.name, err)
	}
	note := l.endSession(ctx, a)
	killed, err := l.killAll(ctx, a.uid)
	if err != nil {
		note += "; " + err.Error()
	}
	res := Result{Found: map[string]string{
		"user": a.name, "uid": strconv.FormatUint(uint64(a.uid), 10), "killed": strconv.Itoa(killed),
	}}
	ended := fmt.Sprintf("%d of his processes killed%s", killed, note)
	switch {
	case did:
		res.Reason = fmt.Sprintf("user %s locked, %s", a.name, ended)
		res.TTL = time.Duration(params.TTL)
		if res.Undo, err = json.Marshal(rec); err != nil {
			return Result{}, err
		}
	case killed > 0 || note != "":
		res.Reason = fmt.Sprintf("user %s was locked already, %s", a.name, ended)
	default:
		res.Nothing, res.Reason = true, fmt.Sprintf("user %s was locked already, and had no process", a.name)
	}
	return res, nil
}

// lock locks the login, and says what of it stoop did: in this run of the step or
// in one that was cut off.
func (l *userLocker) lock(ctx context.Context, r *Request, a account, ttl time.Duration) (rec lockedUser, did bool, err error) {
	before, err := l.login(a)
	if err != nil {
		return rec, false, err
	}
	rec = lockedUser{Name: a.name, UID: a.uid, Expires: before.expires}
	var args []string
	// An empty password can't be unlocked again; the date alone keeps him out.
	if rec.Password = before.password != "" && !before.locked(); rec.Password {
		args = append(args, "--lock")
	}
	if rec.Account = !before.expired(); rec.Account {
		args = append(args, "--expiredate", lockedDay)
	}
	var earlier lockedUser
	if err := json.Unmarshal(r.Intended, &earlier); err == nil && earlier.Name == a.name && earlier.UID == a.uid {
		rec = earlier // what was there before an earlier run touched it
		did = true
	}
	if len(args) == 0 {
		return rec, did, nil
	}
	if !did {
		undo, err := json.Marshal(rec)
		if err != nil {
			return rec, false, err
		}
		r.Intend(undo, ttl)
	}
	if err := l.change(ctx, a, args...); err != nil {
		return rec, false, err
	}
	after, err := l.login(a)
	if err != nil {
		return rec, false, err
	}
	if !after.expired() || rec.Password && !after.locked() {
		return rec, false, errors.New("usermod says that it did it, and /etc/shadow does not")
	}
	return rec, true, nil
}

// Undo gives back what Act took, where it is still so.
func (l *userLocker) Undo(ctx context.Context, u *UndoRequest) (Result, error) {
	var rec lockedUser
	if err := json.Unmarshal(u.Record, &rec); err != nil || rec.Name == "" || rec.UID < userFirst {
		return Result{}, Refuse("the undo record of step %s can't be read", u.ID)
	}
	if err := l.host(); err != nil {
		return Result{}, Refuse("%v", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	a, err := l.account(rec.Name, rec.UID)
	if as[*refusal](err) {
		return Result{}, fmt.Errorf("user %s (uid %d): %w: %v", rec.Name, rec.UID, ErrGone, err)
	}
	if err != nil {
		return Result{}, err
	}
	now, err := l.login(a)
	if err != nil {
		return Result{}, fmt.Errorf("unlock user %s: %w", a.name, err)
	}
	var args []string
	if rec.Password && now.locked() && len(now.password) > 1 {
		args = append(args, "--unlock")
	}
	if rec.Account && now.expires == lockedDay {
		args = append(args, "--expiredate", rec.Expires)
	}
	if len(args) == 0 {
		return Result{Nothing: true, Reason: fmt.Sprintf("somebody unlocked user %s meanwhile", a.name)}, nil
	}
	if err := l.change(ctx, a, args...); err != nil {
		return Result{}, fmt.Errorf("unlock user %s: %w", a.name, err)
	}
	reason := fmt.Sprintf("user %s unlocked", a.name)
	if after, err := l.login(a); err == nil && (after.locked() || after.expired()) {
		reason = fmt.Sprintf("what stoop did to user %s is taken back; he was locked before that too, or somebody locked him since", a.name)
	}
	return Result{Reason: reason}, nil
}

// change has usermod change an account: it knows the locks and the formats of
// the files.
func (l *userLocker) change(ctx context.Context, a account, args ...string) error {
	if l.root != "" {
		args = append([]string{"--prefix", l.root}, args...)
	}
	_, err := l.command(ctx, l.usermod, append(args, "--", a.name)...)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return Refuse("this host has no %s, with which accounts are locked (package shadow, on Debian passwd)", l.usermod)
	case err != nil && strings.Contains(err.Error(), "cannot lock"):
		// Somebody else is changing the file.
		return Retry(err, 0)
	}
	return err
}

// command runs a program of the host, known as stoop's own.
func (l *userLocker) command(ctx context.Context, path string, args ...string) (stderr output, err error) {
	stderr.max = tailMost
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=" + runPath, "LC_ALL=C", "TZ=UTC"}
	cmd.Dir, cmd.Stderr, cmd.WaitDelay = "/", &stderr, runPipes
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return stderr, err
	}
	ended := l.own.Started(cmd.Process.Pid, "")
	waitExit(cmd.Process.Pid)
	ended()
	err = cmd.Wait()
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
		if line := stderr.lastLine(); line != "" {
			err = fmt.Errorf("%w: %q", err, line)
		}
	}
	return stderr, err
}

// endSession has logind end the user's sessions, with all that runs in them,
// under whatever uid. The note says what did not work.
func (l *userLocker) endSession(ctx context.Context, a account) (note string) {
	uid := strconv.FormatUint(uint64(a.uid), 10)
	if _, err := os.Stat(filepath.Join(l.root, "/run/systemd/users", uid)); err != nil {
		return "" // no logind, or he has no session
	}
	ctx, cancel := context.WithTimeout(ctx, endSessions)
	defer cancel()
	if _, err := l.command(ctx, l.loginctl, "terminate-user", uid); err != nil {
		return fmt.Sprintf("; his sessions could not be ended by logind: %v", err)
	}
	return ""
}

// killAll kills every process that runs under the uid, outside of containers,
// and returns how many those were.
func (l *userLocker) killAll(ctx context.Context, uid uint32) (killed int, err error) {
	ctx, cancel := context.WithTimeout(ctx, endSessions)
	defer cancel()
	const root = proc("/proc")
	hit := map[int]bool{}
	// What is made while the list is read may be missed, so that only two that
	// find nothing are an end.
	for empty := 0; empty < 2; {
		found, err := root.ofUser(uid)
		if err != nil {
			return len(hit), err
		}
		alive := 0
		for _, pid := range found {
			was, err := root.killUser(pid, uid)
			if err != nil {
				return len(hit), fmt.Errorf("process %d of his could not be killed: %w", pid, err)
			}
			if was {
				alive++
				hit[pid] = true
			}
		}
		if empty++; alive > 0 {
			empty = 0
		}
		select {
		case <-ctx.Done():
			return len(hit), fmt.Errorf("when time was over there were still %d of his processes", alive)
		case <-time.After(time.Millisecond):
		}
	}
	return len(hit), nil
}

// ofUser are the numbers of the processes that run under the uid.
func (root proc) ofUser(uid uint32) ([]int, error) {
	d, err := os.Open(string(root))
	if err != nil {
		return nil, fmt.Errorf("list the processes: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list the processes: %w", err)
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid != os.Getpid() && root.runsAs(pid, uid) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// killUser kills a process if it is still the user's, runs and is in no container;
// was says so.
func (root proc) killUser(pid int, uid uint32) (was bool, err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false, nil // it has ended
	}
	defer unix.Close(fd)
	// Held by the pidfd, it is what is looked at, or it has ended meanwhile, and
	// then nobody is hit.
	groups, err := os.ReadFile(filepath.Join(root.dir(int64(pid)), "cgroup"))
	if err != nil || inContainer(groups) || !root.runsAs(pid, uid) || isZombie(pid) {
		return false, nil
	}
	err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	return true, err
}

// runsAs reports whether one of a process's four uids is this one: of a program
// with setuid one still is.
func (root proc) runsAs(pid int, uid uint32) bool {
	b, err := os.ReadFile(filepath.Join(root.dir(int64(pid)), "status"))
	if err != nil {
		return false
	}
	_, rest, ok := bytes.Cut(b, []byte("\nUid:\t"))
	if !ok {
		return false
	}
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	want := strconv.FormatUint(uint64(uid), 10)
	for f := range bytes.FieldsSeq(line) {
		if string(f) == want {
			return true
		}
	}
	return false
}

// inContainer reports whether /proc/PID/cgroup is that of a process in a
// container. Below user.slice the user names cgroups as he likes.
func inContainer(groups []byte) bool {
	for line := range strings.Lines(string(groups)) {
		part := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(part) < 3 || strings.HasPrefix(part[2], "/user.slice/") {
			continue
		}
		if cgroupContainer.MatchString(part[2]) || strings.HasPrefix(part[2], "/machine.slice/") || strings.HasPrefix(part[2], "/lxc") {
			return true
		}
	}
	return false
}

// bareHost says why this process is not one of the host itself; nil: it is.
func (root proc) bareHost() error {
	if !root.initialPids() {
		return errors.New("stoop runs in a container, and the host's users are not its to lock: run it as a service of the host for this")
	}
	var host, own unix.Stat_t
	if err := unix.Stat(filepath.Join(string(root), "1", "root")+"/", &host); err != nil {
		return fmt.Errorf("whether stoop runs on the host itself can't be told: look at the root of process 1: %w", err)
	}
	if err := unix.Stat("/", &own); err != nil {
		return fmt.Errorf("look at /: %w", err)
	}
	if host.Dev != own.Dev || host.Ino != own.Ino {
		return errors.New("stoop's / is not the host's (it runs in a container), and the host's users are not its to lock: run it as a service of the host for this")
	}
	return nil
}
