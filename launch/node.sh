#!/bin/bash
# Trains together with other machines, without SLURM: run it on each of them, with the machine's own number.
#
#   launch/node.sh 0 2 10.0.0.1 RUN.yaml strategy=zero2     on the machine that is 10.0.0.1
#   launch/node.sh 1 2 10.0.0.1 RUN.yaml strategy=zero2     on the other one
#
# NUMBER, MACHINES and ADDRESS[:PORT] of machine 0, where all ranks meet (port 29500 unless given); then what
# `farnear launch` takes. Machines may be started in any order, a few minutes apart. They need the same farnear, as many
# GPUs each, and one folder for shards, model and run that all of them see. Ctrl-C on any of them saves and stops all;
# the same commands with --resume auto continue.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "node.sh: say launch/node.sh NUMBER MACHINES ADDRESS[:PORT] RUN.yaml [key=value ...]" >&2
    exit 2
fi
number=$1 machines=$2 address=$3
shift 3

port=29500
# An address with several colons is one of IPv6: it may stand in brackets, and needs them to have a port.
case $address in
    \[*\]:*) port=${address##*:} address=${address#\[} address=${address%%\]*} ;;
    \[*\]) address=${address#\[} address=${address%\]} ;;
    *:*:*) ;;
    *:*) port=${address##*:} address=${address%:*} ;;
esac
exec python -m farnear launch "$@" \
    --num_machines "$machines" --machine_rank "$number" --main_process_ip "$address" --main_process_port "$port"
