package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"stoop/param"
	"stoop/responders"
	"stoop/rules"
)

// The chart refuses what stoop would refuse: the part of values.schema.json that is
// about rules and configuration is written from the program.
func TestDocsChartSchema(t *testing.T) {
	const path = "../charts/stoop/values.schema.json"
	const mark = `  "$defs": `
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, _, ok := strings.Cut(string(data), mark)
	if !ok {
		t.Fatalf("%s has no $defs", path)
	}
	defs, err := json.MarshalIndent(chartDefs(), "  ", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want := before + mark + string(defs) + "\n}\n"
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if want != string(data) {
		t.Errorf("%s is not what the program says: make docs", path)
	}
}

// schema is a JSON schema.
type schema map[string]any

func mappingOf(properties schema) schema {
	return schema{"type": "object", "additionalProperties": false, "properties": properties}
}

func chartDefs() schema {
	config := schema{}
	for _, f := range param.Describe(defaults()).Fields {
		switch f.Name {
		case "node", "data", "mode", "source", "http": // the chart says these
		default:
			config[f.Name] = fieldSchema(f)
		}
	}
	params := schema{}
	var names []string
	for _, e := range responders.All() {
		names = append(names, e.Name)
		p := fieldsSchema(e.Params.Fields)
		p["type"] = []string{"object", "null"}
		params[e.Name] = p
	}
	params["onFailure"], params["approve"] = schema{"enum": []string{"continue", "stop"}}, schema{"type": "boolean"}
	text := schema{"type": "string"}
	value := schema{"type": []string{"string", "number", "boolean"}}
	values := schema{"oneOf": []schema{value, {"type": "array", "items": value, "minItems": 1}}}
	conditions := schema{}
	for _, key := range []string{"rule", "priority", "source", "tags", "hostname"} {
		conditions[key] = values
	}
	conditions["fields"] = schema{"type": "object", "additionalProperties": values}
	rule := mappingOf(schema{
		"name": text, "description": text, "where": text,
		"mode": schema{"enum": []string{"audit", "enforce"}}, "onFailure": params["onFailure"],
		"match": mappingOf(conditions), "except": mappingOf(conditions),
		"when": mappingOf(schema{
			"count": schema{"type": "integer"}, "rules": schema{"type": "array", "items": text}, "within": text, "by": text,
		}),
		"actions": schema{
			"type": "array", "minItems": 1,
			"items": schema{
				"if":   schema{"type": "string"},
				"then": schema{"enum": names},
				"else": mappingOf(params),
			},
		},
	})
	rule["required"] = []string{"name", "match", "actions"}
	return schema{"config": mappingOf(config), "rule": rule}
}

func fieldsSchema(fields []param.Field) schema {
	properties, required := schema{}, []string{}
	for _, f := range fields {
		properties[f.Name] = fieldSchema(f)
		if f.Required {
			required = append(required, f.Name)
		}
	}
	s := mappingOf(properties)
	if len(required) > 0 {
		s["required"] = required
	}
	return s
}

func fieldSchema(f param.Field) schema {
	if of, ok := strings.CutPrefix(f.Type, "list of "); ok {
		item := f
		item.Type = of
		return schema{"type": "array", "items": fieldSchema(item)}
	}
	switch f.Type {
	case "mapping":
		return fieldsSchema(f.Fields)
	case "map of string":
		return schema{"type": "object", "additionalProperties": schema{"type": "string"}}
	case "secret":
		s := mappingOf(schema{"file": schema{"type": "string"}, "env": schema{"type": "string"}})
		s["minProperties"], s["maxProperties"] = 1, 1
		return s
	case "bool":
		return schema{"type": "boolean"}
	case "integer":
		return schema{"type": "integer"}
	case "string":
		if len(f.OneOf) > 0 {
			return schema{"enum": f.OneOf}
		}
		return schema{"type": "string"}
	}
	return schema{"type": []string{"string", "integer"}} // what reads itself from text: 5m, 64KiB, 0
}

// What the schema's rules may hold is what stoop reads: no key of a rule is missing.
func TestChartSchemaKnowsEveryKeyOfARule(t *testing.T) {
	_, err := rules.Parse("rules.yaml", []byte("rules: [{nonsense: 1}]"), catalogOf(responders.All()))
	if err == nil {
		t.Fatal("a key that there is not is taken")
	}
	_, listed, ok := strings.Cut(err.Error(), "There are: ")
	if !ok {
		t.Fatalf("the error does not list the keys: %v", err)
	}
	listed, _, _ = strings.Cut(listed, "\n")
	properties := chartDefs()["rule"].(schema)["properties"].(schema)
	for key := range strings.SplitSeq(listed, ", ") {
		if properties[key] == nil {
			t.Errorf("the schema does not know the key %q of a rule", key)
		}
	}
}

// What the chart protects by default is what stoop does: no role is given there.
func TestChartProtectsWhatStoopProtects(t *testing.T) {
	data, err := os.ReadFile("../charts/stoop/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values struct {
		Config struct {
			Guard struct {
				Protect struct{ Namespaces []string }
			}
		}
		Rules []yaml.Node
	}
	if err := yaml.NewDecoder(bytes.NewReader(data)).Decode(&values); err != nil {
		t.Fatal(err)
	}
	if got, want := values.Config.Guard.Protect.Namespaces, defaults().Guard.Protect.Namespaces; !reflect.DeepEqual(got, want) {
		t.Errorf("the chart protects %q, stoop %q", got, want)
	}
}
