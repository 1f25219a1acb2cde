#!/usr/bin/env bash
# Look for known weaknesses: of our code (bandit) and of the installed distributions (pip-audit). An audit that cannot
# run, or has no data, is skipped with a line that says so, and the last line counts these.
set -uo pipefail
cd "$(dirname "$0")/.."
bin="$1"
skipped=0
failed=0

skip() {
  skipped=$((skipped + 1))
  echo "audit: SKIPPED: $1"
}

if [ -x "$bin/bandit" ]; then
  "$bin/bandit" --quiet --recursive --configfile pyproject.toml src || failed=1
else
  skip "bandit is not installed"
fi
if [ -x "$bin/pip-audit" ]; then
  report="$("$bin/pip-audit" --skip-editable --progress-spinner=off --timeout 15 --format columns 2>&1)" && status=0 || status=$?
  unknown="$(grep -c 'could not be audited' <<< "$report")"
  known=$(($("$bin/python" -m pip list --exclude-editable --format freeze 2> /dev/null | wc -l) - unknown))
  if [ "$status" != 0 ] && ! grep -q '^Found [0-9]* known' <<< "$report"; then
    skip "pip-audit has no data of vulnerabilities ($(tail -n 1 <<< "$report" | cut -c 1-200))"
  elif [ "$known" -le 0 ]; then
    skip "pip-audit has no data of any of the $unknown distributions"
  else
    grep -v 'could not be audited' <<< "$report"
    [ "$unknown" = 0 ] || echo "audit: pip-audit has no data of $unknown distributions"
    [ "$status" = 0 ] || failed=1
  fi
else
  skip "pip-audit is not installed"
fi
echo "audit: $skipped of 2 audits skipped"
exit "$failed"
