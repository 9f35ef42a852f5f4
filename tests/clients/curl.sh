#!/bin/bash
# The command curl: one run for each request, or one for all.
set -euo pipefail
keep=$1 url=$2 runs=()
for request in "${@:3}"; do
    read -r method target type file expect <<<"$request"
    run=(-q --noproxy '*' -sS --max-time 20 --cacert "$CA" --cert "$CERT" --key "$KEY"
        -o /dev/null -w '%{http_code}\n' "$url$target")
    [[ $method != HEAD ]] || run+=(--head)
    [[ $method != POST ]] || run+=(--data-binary "@$file" -H "Content-Type: $type")
    [[ -z $expect ]] || run+=(-H "Expect: $expect" --expect100-timeout 15)
    if [[ $keep == new ]]; then curl "${run[@]}"; else runs+=("${runs[@]:+--next}" "${run[@]}"); fi
done
[[ $keep == new ]] || curl "${runs[@]}"
