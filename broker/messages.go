package broker

import (
	"encoding/json"
	"slices"
	"time"

	"stoop/alert"
)

// Origin says by which way an alert came in, and so how far it is to be
// believed.
type Origin string

// The ways in.
const (
	OriginFIFO  Origin = "fifo"
	OriginStdin Origin = "stdin"
	OriginFile  Origin = "file"
	OriginHTTP  Origin = "http"
	OriginLocal Origin = "local" // stoop publish
	OriginStoop Origin = "stoop" // stoop's own: a breaker opened, alerts were shed
	// OriginOpenHTTP is HTTP without authentication: whoever reaches the port
	// can write such an alert, so it never starts a harmful step.
	OriginOpenHTTP Origin = "http-unauthenticated"
)

// Action is one entry of a routing slip: a responder and its parameters, as
// checked when the rules were read.
type Action struct {
	Responder string          `json:"responder"`
	Params    json.RawMessage `json:"params,omitempty"`
	OnFailure OnFailure       `json:"onFailure,omitempty"`
	// Approve is whether the step waits until a person approves it; nil: as its
	// responder does where the rule says nothing.
	Approve *bool `json:"approve,omitempty"`
}

// OnFailure is what becomes of the rest of a chain when a step fails.
type OnFailure string

// Continue is the default, so that evidence that can't be had never stops a
// kill.
const (
	Continue OnFailure = "continue"
	Stop     OnFailure = "stop"
)

// Mode is whether a rule's steps are done or only told.
type Mode string

// Audit is what a fresh install runs.
const (
	Audit   Mode = "audit"
	Enforce Mode = "enforce"
)

// Took are a step's times, counted from the alert's arrival. They are written
// in whole microseconds.
type Took struct {
	Stored    Micros `json:"stored,omitempty"`    // the alert was stored
	Matched   Micros `json:"matched,omitempty"`   // a rule matched it
	Requested Micros `json:"requested,omitempty"` // the guards let the step through and the act began
	Done      Micros `json:"done,omitempty"`      // the act was over
}

// Micros is a duration in microseconds.
type Micros int64

// MicrosSince is the time from t until now.
func MicrosSince(t time.Time) Micros { return Micros(time.Since(t).Microseconds()) }

// Step is one message of the stream ACTIONS: what is to be done next for an
// alert, and after it.
type Step struct {
	ID       string          `json:"id"`       // from alert, rule and position; see [StepID]
	AlertID  string          `json:"alertID"`  //
	Alert    json.RawMessage `json:"alert"`    // as Falco wrote it
	Received time.Time       `json:"received"` // when it arrived on the pipe
	Origin   Origin          `json:"origin"`   //
	Rule     string          `json:"rule"`     // the rule of rules.yaml that matched
	Rules    string          `json:"rules"`    // the hash of the rules in force
	Mode     Mode            `json:"mode"`     // the rule's when it matched; the program's is asked at the act
	Position int             `json:"position"` // in the rule's list of actions, from 0
	Action
	Target    alert.Target `json:"target"`
	Found     []Finding    `json:"found,omitempty"`     // by the steps before
	Remaining []Action     `json:"remaining,omitempty"` // after this one
	Took      Took         `json:"took"`
	Approved  *Approval    `json:"approved,omitempty"` // by a person who was asked
	// InPlaceOf is the responder whose place this one has taken, and why: see
	// docs/responders.md.
	InPlaceOf string `json:"inPlaceOf,omitempty"`
	// Agreed are the ids of the alerts that the rule waited for, this one's the
	// last; only of the latest [AgreedMost]. Empty: the rule waits for none.
	Agreed []string `json:"agreed,omitempty"`
}

// AgreedMost is how many ids of alerts that agreed a step and its outcome carry.
const AgreedMost = 16

// Approval is a person's word that a step may be done.
type Approval struct {
	Actor string    `json:"actor"`
	Time  time.Time `json:"time"`
}

// Since is when it became the step's turn by the word of somebody: of Falco, or of
// the person who approved it. Deadlines count from it.
func (s *Step) Since() time.Time {
	if s.Approved != nil {
		return s.Approved.Time
	}
	return s.Received
}

// Next is the step after s in its chain, nil if s is the last one. found is what
// s leaves to it, if anything.
func (s *Step) Next(found ...Finding) *Step {
	if len(s.Remaining) == 0 {
		return nil
	}
	n := *s
	n.Position++
	n.ID = StepID(s.AlertID, s.Rule, n.Position, "")
	n.Action, n.Remaining = s.Remaining[0], s.Remaining[1:]
	n.Found = append(slices.Clone(s.Found), found...)
	n.Approved = nil // it was for this step alone
	n.Took = Took{Stored: s.Took.Stored, Matched: s.Took.Matched}
	return &n
}

// Finding is what an earlier step of a chain leaves to the later ones.
type Finding struct {
	Responder string            `json:"responder"`
	Status    Status            `json:"status"`
	Reason    string            `json:"reason,omitempty"`
	Found     map[string]string `json:"found,omitempty"`
}

// Status is what became of a step.
type Status string

// What can become of a step.
const (
	Done             Status = "done"
	Nothing          Status = "nothing"    // it was so already, or the target is gone
	Audited          Status = "audit"      // would have been done
	Suppressed       Status = "suppressed" // a guard held it back
	Refused          Status = "refused"    // the responder won't
	Retrying         Status = "retrying"
	Failed           Status = "failed"
	Expired          Status = "expired"
	Undone           Status = "undone"
	AwaitingApproval Status = "awaiting-approval"
	Denied           Status = "denied"
)

// Outcome is one message of the stream OUTCOMES, and a line of stoop history.
type Outcome struct {
	ID        string            `json:"id"` // the step's
	Time      time.Time         `json:"time"`
	Alert     string            `json:"alert,omitempty"` // its id
	Rule      string            `json:"rule,omitempty"`  // of rules.yaml
	Responder string            `json:"responder"`
	Status    Status            `json:"status"`
	Reason    string            `json:"reason,omitempty"`
	Actor     string            `json:"actor,omitempty"` // who undid, approved or denied it
	Target    alert.Target      `json:"target,omitzero"`
	Found     map[string]string `json:"found,omitempty"`
	Undo      bool              `json:"undo,omitempty"` // stoop undo takes it back
	Node      string            `json:"node,omitempty"`
	Cluster   string            `json:"cluster,omitempty"`
	Rules     string            `json:"rules,omitempty"` // the hash of the rules in force
	Attempt   int               `json:"attempt,omitempty"`
	Agreed    []string          `json:"agreed,omitempty"` // the ids of the alerts that the rule waited for, the latest of them
	Took      Took              `json:"took,omitzero"`
}
