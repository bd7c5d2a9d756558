package responders

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"

	"stoop/broker"
	"stoop/param"
)

// What a function of the user's may answer: [call] and [webhookCall].
const (
	maxAnswer       = 64 << 10 // in all
	maxAnswerFound  = 64       // entries of found
	maxAnswerReason = 500      // characters of the reason; the rest is cut
)

// answerKey is what the keys of found look like.
var answerKey = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}$`)

// readAnswer makes a result of what a function answered. Nothing at all is a
// function that did what it was asked to. Whatever is not understood is an error:
// a refusal in other words must not count as a success.
func readAnswer(data []byte) (Result, error) {
	if len(data) > maxAnswer {
		return Result{}, fmt.Errorf("the answer has more than %s", param.Size(maxAnswer))
	}
	data = bytes.TrimSpace(data)
	if len(data) == 0 {
		return Result{}, nil
	}
	if data[0] != '{' {
		return Result{}, fmt.Errorf("the answer is no JSON object: %s", strconv.Quote(oneLine(string(data), 100)))
	}
	var a struct {
		Status broker.Status     `json:"status"`
		Reason string            `json:"reason"`
		Found  map[string]string `json:"found"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err := d.Decode(&a)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("there is more behind the object")
		}
	}
	if err != nil {
		return Result{}, fmt.Errorf("the answer is no JSON object with status, reason and found (a map of texts): %s", oneLine(err.Error(), 200))
	}
	if len(a.Found) > maxAnswerFound {
		return Result{}, fmt.Errorf("the answer has more than %d entries in found", maxAnswerFound)
	}
	for k := range a.Found {
		if !answerKey.MatchString(k) {
			return Result{}, fmt.Errorf("the answer has the key %s in found: a key is made of letters, digits, \"_\", \".\", \":\", \"/\" and \"-\", at most 64", strconv.Quote(oneLine(k, 100)))
		}
	}
	res := Result{Reason: oneLine(a.Reason, maxAnswerReason), Found: a.Found}
	switch a.Status {
	case "", broker.Done:
		return res, nil
	case broker.Nothing:
		res.Nothing = true
		return res, nil
	case broker.Refused:
		return res, Refuse("the function refused: %s", cmp.Or(res.Reason, "it does not say why"))
	case broker.Failed:
		return res, fmt.Errorf("the function failed: %s", cmp.Or(res.Reason, "it does not say why"))
	}
	return Result{}, fmt.Errorf("the answer has the status %s: it is done, nothing, refused or failed", strconv.Quote(oneLine(string(a.Status), 50)))
}
