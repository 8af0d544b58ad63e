# Sourced by the scripts beside it. Starts this host's ranks of one run, one process a rank, and ends them together.
#
#   farspan_launch FLAG…    FLAG…: what dist_train.py takes, but for the grid, which comes from variables:
#
#   STAGES, REPLICAS        the grid: STAGES × REPLICAS ranks in all
#   MASTER, PORT            address of rank 0's host and a port that is free there  [127.0.0.1, 7033]
#   FIRST_RANK              number of this host's first rank                        [0]
#   RANKS_HERE              how many ranks run on this host                         [one a GPU; without GPUs all]
#   FIRST_GPU               the first rank's GPU, the next one has the next GPU     [0]
#   NET_INTERFACE           network interface for all traffic                       [the one that reaches MASTER]
#   LOGS                    folder for the output of every rank but rank 0, which has the terminal
#   PYTHON                  [.venv/bin/python of the checkout where there is one, else python3]
#
# Ctrl-C, SIGTERM and a lost terminal (SIGHUP) reach all ranks as one SIGTERM: they finish the step, save and leave.
# A second Ctrl-C kills them. Where a rank fails, the others are given time to say so and leave, then they are ended.
#
# Returns the status of the first rank that failed; 75 for a run that was stopped, whoever stopped it, and that the same
# command goes on with; 0 for one that is finished (docs/many-hosts.md).

farspan_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
farspan_ranks=() # rank -> its process
farspan_stopped=
farspan_stopped_at=0

farspan_say() { echo "launch: $*" >&2; }

farspan_tasks() { # sets farspan_data to the flag for TASKS; rank 0's host alone needs it
    if [ "${FIRST_RANK:-0}" = 0 ] && [ -z "${TASKS:-}" ]; then
        echo "set TASKS to the training data: TASKS=a.jsonl:0.6,b.jsonl:0.4 bash $0, or TASKS=tasks.json" >&2
        exit 2
    fi
    case ${TASKS:-} in
    *.json) farspan_data=(--task-config "$TASKS") ;;
    *) farspan_data=(--task-name "${TASKS:-}") ;;
    esac
}

farspan_kill() { # SIGNAL, to every rank that still runs, with its own children where it is KILL
    local pid group=
    [ "$1" = KILL ] && group=-
    for pid in "${farspan_ranks[@]}"; do
        kill "-$1" -- "$group$pid" 2>/dev/null || true
    done
}

farspan_stop() { # SIGNAL that came
    if [ -z "$farspan_stopped" ]; then
        farspan_stopped=$1 farspan_stopped_at=$SECONDS
        farspan_say "SIG$1: the ranks finish their step and save; once more ends them at once"
        farspan_kill TERM
    elif ((SECONDS - farspan_stopped_at >= 2)); then # not the same stop, told twice as timeout(1) does
        farspan_kill KILL
    fi
}

farspan_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

farspan_tell_failure() { # RANK STATUS
    local how="exited with status $2"
    (($2 > 128)) && how="was ended by SIG$(kill -l "$2")"
    farspan_say "rank $1 $how"
    if (($1 > 0)); then
        farspan_say "the end of $LOGS/rank$1.log:"
        tail -n 5 "$LOGS/rank$1.log" >&2
    fi
}

farspan_launch() {
    local world=$((STAGES * REPLICAS)) first=${FIRST_RANK:-0} python=${PYTHON:-} gpus here rank status
    local failed='' halted='' unclean='' deadline=0
    gpus=$(farspan_gpus)
    here=$((world - first))
    ((gpus > 0 && gpus < here)) && here=$gpus
    here=${RANKS_HERE:-$here}
    if ((first < 0 || here < 1 || first + here > world)); then
        farspan_say "FIRST_RANK $first and RANKS_HERE $here do not fit STAGES $STAGES × REPLICAS $REPLICAS:" \
            "ranks go from 0 to $((world - 1))"
        return 2
    fi
    if ((here < world)) && [ -z "${MASTER:-}" ]; then
        farspan_say "this host runs only $here of $world ranks (one a GPU): make the grid fit (STAGES × REPLICAS = $here)," \
            "or set MASTER to the address of rank 0's host and start the other ranks on theirs"
        return 2
    fi
    if [ -z "$python" ]; then
        python=$farspan_root/.venv/bin/python
        [ -x "$python" ] || python=python3
    fi
    local command=(
        "$python" "$farspan_root/dist_train.py"
        --dist-url "tcp://${MASTER:-127.0.0.1}:${PORT:-7033}" --world-size "$world"
        --pipeline-group-size "$STAGES" --data-group-size "$REPLICAS"
        ${NET_INTERFACE:+--net-interface "$NET_INTERFACE"} "$@"
    )
    mkdir -p "$LOGS"
    farspan_say "ranks $first to $((first + here - 1)) of $world here; rank 0 alone has the terminal," \
        "the others write to $LOGS/rank….log"
    farspan_say "$(printf '%q ' "${command[@]}")--rank …"

    trap 'farspan_stop INT' INT
    trap 'farspan_stop TERM' TERM
    trap 'farspan_stop HUP' HUP
    trap 'farspan_kill KILL' EXIT
    for ((rank = first; rank < first + here; rank++)); do
        # A session of its own: Ctrl-C comes to this script alone, which passes it on once.
        if ((rank == 0)); then exec 3>&2; else exec 3>>"$LOGS/rank$rank.log"; fi
        ((rank == 0)) || printf -- '---- started %(%F %T)T\n' >&3
        setsid "${command[@]}" --rank "$rank" --cuda-id $((${FIRST_GPU:-0} + rank - first)) </dev/null >&3 2>&3 3>&- &
        farspan_ranks[rank]=$!
        exec 3>&-
    done

    while ((${#farspan_ranks[@]} > 0)); do
        for rank in "${!farspan_ranks[@]}"; do
            kill -0 "${farspan_ranks[rank]}" 2>/dev/null && continue
            status=0
            wait "${farspan_ranks[rank]}" || status=$?
            unset "farspan_ranks[rank]"
            ((status == 0)) && continue
            if ((status == 75)); then
                halted=yes
            elif [ -n "$farspan_stopped" ]; then
                unclean=yes
            elif [ -z "$failed" ]; then
                failed=$status
                farspan_tell_failure "$rank" "$status"
            fi
            ((deadline > 0)) || [ -n "$farspan_stopped" ] || deadline=$((SECONDS + 30))
        done
        if ((deadline > 0 && SECONDS >= deadline + 10)); then
            farspan_kill KILL
        elif ((deadline > 0 && SECONDS >= deadline)); then
            farspan_kill TERM
        fi
        sleep 0.3 || true
    done
    trap - INT TERM HUP EXIT
    [ -z "$failed" ] || return "$failed"
    [ -z "$unclean" ] || return $((128 + $(kill -l "$farspan_stopped")))
    [ -z "$halted" ] || return 75
}
