#!/usr/bin/env bash
# Shows on this machine, without Falco and without a cluster, how stoop stops a
# suspect: a process in a cgroup like a container's is frozen when an alert names
# it, looked at, and let go on. Needs root. All that it makes is a temporary
# folder and one cgroup, and both go with it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "this needs root: run it as root, or sudo $0"; exit 1; }
[ -x stoop ] || { echo "build it first: make build"; exit 1; }

id=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
for root in /sys/fs/cgroup/freezer /sys/fs/cgroup; do
	[ -e "$root/cgroup.procs" ] && break
done
cgroup=$root/docker/$id
dir=$(mktemp -d)
run='' suspect='' parent=''
[ -d "$root/docker" ] || parent=$root/docker
cleanup() {
	[ -z "$run" ] || kill "$run" 2>/dev/null || true
	for file in freezer.state:THAWED cgroup.freeze:0; do
		[ ! -e "$cgroup/${file%:*}" ] || echo "${file#*:}" >"$cgroup/${file%:*}"
	done
	[ -z "$suspect" ] || kill -9 "$suspect" 2>/dev/null || true
	wait 2>/dev/null || true
	rmdir "$cgroup" $parent 2>/dev/null || true
	rm -rf "$dir"
}
trap cleanup EXIT

mkdir -p "$cgroup"
# It goes into the cgroup before it becomes the suspect, as containers begin.
AWS_SECRET_KEY=hunter2 sh -c 'echo $$ >"$1/cgroup.procs"; while :; do date +%T.%N >"$2/new"; mv "$2/new" "$2/alive"; sleep 0.02; done' \
	miner "$cgroup" "$dir" &
suspect=$!
sleep 0.2
echo "A suspect runs as process $suspect in the container ${id:0:12}. Twice a look at its clock:"
cat "$dir/alive"; sleep 0.1; cat "$dir/alive"

cat >"$dir/rules.yaml" <<END
mode: enforce
rules:
  - name: contain
    match: {rule: Drop and execute new binary in container}
    actions:
      - freeze-container
      - capture-proc
END
./stoop run --mode enforce --rules "$dir/rules.yaml" --pipe "$dir/falco.pipe" --data "$dir/data" --node here 2>"$dir/log" &
run=$!
for _ in $(seq 100); do
	grep -qs '"msg":"ready"\|msg=ready' "$dir/log" && break
	kill -0 "$run" 2>/dev/null || { cat "$dir/log"; exit 1; }
	sleep 0.05
done

echo
echo "An alert about it goes into the FIFO, as Falco would write it. What stoop did:"
printf '{"hostname":"here","output":"a new binary runs","priority":"Critical","rule":"Drop and execute new binary in container","source":"syscall","time":"%s","output_fields":{"container.id":"%s","proc.pid":%d}}\n' \
	"$(date -u +%FT%T.%NZ)" "${id:0:12}" "$suspect" >"$dir/falco.pipe"
for _ in $(seq 100); do
	[ "$(./stoop history --data "$dir/data" -o json 2>/dev/null | grep -c '"status":"done"' || true)" -ge 2 ] && break
	sleep 0.05
done
COLUMNS=80 ./stoop history --data "$dir/data"

echo
echo "Its clock stands still:"
cat "$dir/alive"; sleep 0.3; cat "$dir/alive"
stood=$(cat "$dir/alive")

case=$(dirname "$dir"/data/evidence/*/manifest.json)
echo
echo "The evidence, a folder a step (data/evidence/$(basename "$case")):"
(cd "$case" && find . -type f ! -name manifest.json | sort | head -8 | cut -c3-; echo "… and manifest.json, with the SHA-256 of each of $(find . -type f | wc -l) files")
if grep -rqs hunter2 "$case"; then
	echo "the demo went wrong: a secret is in the evidence"
	exit 1
fi

echo
echo "Taken back, by stoop undo --all:"
COLUMNS=80 ./stoop undo --all --data "$dir/data"
sleep 0.2
cat "$dir/alive"
[ "$stood" != "$(cat "$dir/alive")" ] || { echo "the demo went wrong: the suspect stands still"; exit 1; }
echo "It goes on. That was all of it."
