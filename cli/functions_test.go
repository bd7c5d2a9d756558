package cli

import (
	"reflect"
	"testing"

	"stoop/broker"
	"stoop/param"
)

// What a user may answer on gets from stoop.yaml to the broker.
func TestServeReachesTheBroker(t *testing.T) {
	t.Setenv("PASSWORD", "secret")
	c := defaults()
	raw := `{"broker":{"listen":"127.0.0.1:0","users":[{"name":"one","password":{"env":"PASSWORD"},"serve":["functions.one","more.>"]},{"name":"siem","nkey":"U"}]}}`
	if err := param.Decode([]byte(raw), &c); err != nil {
		t.Fatal(err)
	}
	bc, err := c.brokerConfig()
	if err != nil {
		t.Fatal(err)
	}
	want := []broker.User{{Name: "one", Password: "secret", Serve: []string{"functions.one", "more.>"}}, {Name: "siem", NKey: "U"}}
	if !reflect.DeepEqual(bc.Listen.Users, want) {
		t.Errorf("the users are %+v", bc.Listen.Users)
	}
}
