#!/usr/bin/env bash
# Shows stoop at work on this machine, without Falco and without a cluster:
# example alerts go into a FIFO as Falco would write them, and stoop tail shows
# what comes of each. Everything it makes is in a temporary folder, and goes
# with it.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
tail='' run=''
cleanup() {
	[ -z "$tail" ] || kill "$tail" 2>/dev/null || true
	[ -z "$run" ] || kill "$run" 2>/dev/null || true
	wait 2>/dev/null || true
	rm -rf "$dir"
}
trap cleanup EXIT

echo "stoop run reads the FIFO falco.pipe and answers by examples/demo-rules.yaml."
echo "There is no cluster here, so the rules that would touch a pod are in audit mode."
echo
sed "s|@dir@|$dir|" examples/demo-rules.yaml >"$dir/rules.yaml"
./stoop run --mode enforce --rules "$dir/rules.yaml" --pipe "$dir/falco.pipe" --data "$dir/data" --node demo 2>"$dir/log" &
run=$!
for _ in $(seq 100); do
	[ -S "$dir/data/stoop.sock" ] && grep -qs '"msg":"ready"\|msg=ready' "$dir/log" && break
	kill -0 "$run" 2>/dev/null || { cat "$dir/log"; exit 1; }
	sleep 0.05
done
COLUMNS=80 ./stoop tail --data "$dir/data" >"$dir/tail" 2>/dev/null &
tail=$!
sleep 0.5

# The alerts are the project's own. Their times are set to now: an old alert is
# never acted on. They come one by one, so that each is seen with what it causes.
while IFS= read -r line; do
	sed "s/\"time\":.*/\"time\":\"$(date -u +%FT%TZ)\"}/" <<<"$line" >"$dir/falco.pipe"
	sleep 0.1
done <examples/alerts.jsonl

for _ in $(seq 100); do
	[ "$(grep -c '  outcome  ' "$dir/tail" || true)" -ge 5 ] && break
	sleep 0.05
done
cat "$dir/tail"

echo
echo "stoop history:"
COLUMNS=80 ./stoop history --data "$dir/data"
kill "$tail"
wait "$tail" 2>/dev/null || true
tail=''
kill "$run"
wait "$run"
run=''
written=$(wc -l <"$dir/critical.jsonl")
[ "$written" -eq 2 ] || { echo "the demo went wrong: $written lines in critical.jsonl, not 2"; cat "$dir/log"; exit 1; }
echo
echo "Both Critical alerts are in critical.jsonl. That was all of it; rules.yaml has the rules to begin with."
