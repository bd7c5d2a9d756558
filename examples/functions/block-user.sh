#!/bin/sh
# Shows how a function of your own, in shell, answers stoop's responder call by the
# command nats: it keeps a list of users to be locked out, and puts the user of the
# alert on it. It needs jq. docs/functions.md has what is asked and answered.
#
#   export NATS_URL=tls://127.0.0.1:4222 NATS_CA=tls.crt NATS_USER=block-user
#   export NATS_PASSWORD="$(cat password)" BLOCKED_USERS=blocked-users
#   nats reply functions.block-user --queue block-user --command "$PWD/block-user.sh"
#
# nats starts it for each question, which is in NATS_REQUEST_BODY (at most 128 KiB:
# that is how long a variable may be), and sends what it writes as the answer.
# Attackers write parts of the question: it is never put where a shell reads code, and
# never into --command, where nats would fill it in.
set -eu
export LC_ALL=C
list=${BLOCKED_USERS:-blocked-users}

answer() { # STATUS REASON [USER]
	jq -nc --arg status "$1" --arg reason "$2" --arg user "${3-}" \
		'{status: $status, reason: $reason} + if $user == "" then {} else {found: {user: $user}} end'
	exit 0
}

user=$(printf '%s' "$NATS_REQUEST_BODY" | jq -r '.alert.output_fields["user.name"] // "" | strings' 2>/dev/null) ||
	answer failed "the question could not be read"
case $user in
'' | [!a-z_]* | *[!a-z0-9_-]*) answer refused "the alert names no user that could be locked out" ;;
esac
touch "$list" 2>/dev/null || answer failed "the list can't be written"
if grep -qxF -- "$user" "$list"; then
	answer nothing "$user is on the list" "$user"
fi
printf '%s\n' "$user" >>"$list"
answer done "$user is on the list now" "$user"
