#!/usr/bin/env bash
# Is the vLLM server on the GPU that it was meant for, and on no other?
#
# Needs bash 4.4, coreutils, nvidia-smi and the docker CLI; changes nothing. It may also be read from
# standard input ("bash -s -- --json < check_gpu_allocation.sh"), so nothing here looks at $0 or reads
# standard input. docs/check_gpu_allocation.md lists the exit codes, causes and JSON fields.
#
# The verdict rests on UUIDs and host PIDs alone. Indices are only shown: they are renumbered inside
# a container and can change at a reboot. nvidia-smi is never asked for the names of processes: it
# prints a line break in one as it is, so that any program could spoil the list for us.
#
# No `set -e`: nearly every command here may fail, and each failure is a finding to report.
set -uf         # -f: text is split into lines unquoted and must not match file names
export LC_ALL=C # match bytes, and have the other programs' messages in English

readonly SERVICE=vllm # the Compose service that --project looks for
readonly NUMBER='(0|[1-9][0-9]{0,8})'
readonly MOST=262144 UNREADABLE=256 # bytes of an answer; in place of an exit code: longer, or binary

judged=0 json=0 quiet=0 deep=0 drift=1 limit=10 expect='' container='' project=''
verdict=unknown code=3 cause='' message='' cure=''
# What can't be read of a card or a process is empty.
gpu_index=() gpu_uuid=() gpu_bus=() gpu_total=() gpu_used=() gpu_driver=() gpu_name=() odd_gpu=''
app_uuid=() app_pid=() app_memory=() app_index=() app_name=() app_own=() app_row=() listed=false
mig_list=() # exit code, output and error of "nvidia-smi -L", where it may have left out an instance
mig_asked=0
up='cd /opt/vllm-gpu && docker compose -f docker-compose.serving.yml up -d' # where the server's files are
id='' status='' health='' exit_code='' started='' image='' directory='' asked=() asked_count=0 pids=()
notes=() seen=() seen_why=''
expected_id='' place=''            # what is expected, and the UUID that this means
declare -A slot_of=() comm_of=()   # GPU or MIG UUID: its card's place in gpu_…; own PID: its name

show_help() {
  printf '%s\n' \
    'Usage: check_gpu_allocation.sh [OPTION]...' \
    'Says whether the vLLM server runs on the expected GPU and on no other.' '' \
    '  --expect ID        the GPU that it should be on: index, UUID or PCI bus id' \
    '                     (default: the one that the container was asked for)' \
    '  --container NAME   the container to judge (default: vllm-server)' \
    "  --project NAME     or: the container of service \"$SERVICE\" in this Compose project" \
    '  --deep             also ask inside the container whether it still sees its GPU' \
    '  --no-drift         take an index for what it means now, whatever it meant when' \
    '                     the server was proven' \
    '  --timeout SECONDS  limit for each call of nvidia-smi and docker (default: 10)' \
    '  --json             print one JSON object instead of the report' \
    '  --quiet            print nothing: only the exit code' \
    '  --help             print this' '' \
    'Exit code: 0 on the expected GPU and no other; 1 on a wrong or additional GPU;' \
    '           2 wrong usage, or no such GPU here; 3 cannot tell (and why not).'
}

usage_error() { # SENTENCE [CAUSE CURE]
  judged=1 verdict=usage code=2 message=$1 cause=${2:-usage} cure=${3:-'See --help.'}
  ((json && !quiet)) && print_json
  visible "check_gpu_allocation: $message $cure"
  printf '%s\n' "$REPLY" >&2
  exit 2
}

parse_options() {
  local option value
  for option; do [[ $option == --json ]] && json=1; done # so that wrong usage is told in JSON, too
  while (($#)); do
    option=${1%%=*} value=${1#*=}
    case $1 in
      --json | --help | --quiet | --deep | --no-drift) ;;
      --expect=* | --container=* | --project=* | --timeout=*) ;;
      --expect | --container | --project | --timeout)
        (($# > 1)) || usage_error "$1 needs a value."
        value=$2
        shift ;;
      *) usage_error "There is no option '$1'." ;;
    esac
    shift
    case $option in
      --help) show_help; judged=1; exit 0 ;;
      --quiet) quiet=1 ;;
      --deep) deep=1 ;;
      --no-drift) drift=0 ;;
      --expect)
        bus_number "$value" || [[ $value =~ ^($NUMBER|(GPU|MIG)-[0-9A-Za-z/-]{1,80})$ ]] ||
          usage_error "'$value' is no GPU index, UUID or PCI bus id."
        expect=$value ;;
      --container | --project)
        [[ $value =~ ^[a-zA-Z0-9][a-zA-Z0-9_.-]*$ ]] || usage_error "'$value' is no name for $option."
        if [[ $option == --project ]]; then project=$value; else container=$value; fi ;;
      --timeout)
        [[ $value =~ ^[1-9][0-9]{0,3}$ ]] || usage_error "'$value' is no number of seconds from 1 to 9999."
        limit=$value ;;
    esac
  done
  [[ $container && $project ]] && usage_error 'Give --container or --project, not both.'
  ((json && quiet)) && usage_error 'Give --json or --quiet, not both.'
  container=${container:-vllm-server}
}

# --- Calling other programs ------------------------------------------------------------------------

# start VARIABLE COMMAND...: run it in the background; VARIABLE gets the handle to finish it with.
# A process stuck in the kernel (a card that fell off the bus) survives even SIGKILL and holds its
# pipes open. So finish never waits for their end, and the subshell holds none of our own.
start() {
  local fd variable=$1
  shift
  exec {fd}< <(
    exec </dev/null 2>/dev/null
    {
      exec {pipe}< <(exec timeout -k 1 "$limit" "$@" 2>&3 3>&-)
      IFS= read -r -N "$MOST" -u "$pipe" out
      exec {pipe}<&- # a program that prints without end ends here, or when its time is up
      wait "$!" && rc=0 || rc=$?
    } 3>&1
    ((${#out} < MOST)) || out='' rc=$UNREADABLE
    printf '\0%s\0%s\0' "$out" "$rc"
  )
  printf -v "$variable" '%s' "$fd $!"
}

finish() { # HANDLE: sets $out, $err and $rc; rc is 124 when the time was up
  local fd=${1% *}
  out='' err='' rc=''
  if IFS= read -r -d '' -n "$MOST" -t $((limit + 2)) -u "$fd" err && ((${#err} < MOST)) &&
    IFS= read -r -d '' -t 9 -u "$fd" out && IFS= read -r -d '' -t 9 -u "$fd" rc; then
    [[ $rc =~ ^[0-9]{1,3}$ ]] || rc=$UNREADABLE
  else
    kill "${1#* }" 2>/dev/null
    rc=124
    ((${#err} < MOST)) || rc=$UNREADABLE
  fi
  [[ $rc == 137 ]] && rc=124 # it ignored SIGTERM
  exec {fd}<&-
}

call() { # COMMAND...: start and finish
  local handle
  start handle "$@"
  finish "$handle"
}

split() { # TEXT: sets $lines, without carriage returns and empty lines; none is so long that it takes ages to match
  local n IFS=$'\n'
  # shellcheck disable=SC2206 # splitting is meant
  lines=(${1//$'\r'/})
  for n in "${!lines[@]}"; do ((${#lines[n]} <= 4096)) || lines[n]=${lines[n]:0:4096}; done
}

note() { # SENTENCE: something to know beside the verdict
  notes+=("$1")
}

quoted() { # sets $REPLY to the start of what the program said, from $lines
  REPLY=${lines[*]:0:3}
  REPLY=${REPLY:0:300}
  REPLY=${REPLY:-it said nothing}
}

# problem CAUSE SENTENCE CURE: a reason why there is no verdict. The first one gives the cause.
problem() {
  [[ $message != *"$2"* ]] || return 0 # two calls can fail in the same way
  cause=${cause:-$1}
  message+="${message:+ Also: }$2"
  cure+="${cure:+ }$3"
}

# --- The cards -------------------------------------------------------------------------------------

smi_problem() { # [ROW]: what a call of nvidia-smi that failed, or whose answer (or row) was not understood, means
  if ((rc)); then split "$err"$'\n'"$out"; else split "${1-$out}"; fi
  quoted
  case $rc:$out$err in
    124:*) problem nvidia_smi_timeout "nvidia-smi gave no answer within $limit s; a card may have fallen off the bus." \
      "Look for 'Xid' or 'fallen off the bus' in 'dmesg'; a reboot usually helps. If it is only slow: 'systemctl enable --now nvidia-persistenced'." ;;
    *'Driver/library version mismatch'*) problem driver_library_mismatch \
      'The loaded NVIDIA driver and its libraries have different versions (an update without a reboot).' \
      'Reboot, or reload the nvidia kernel modules.' ;;
    9:* | *"couldn't communicate with the NVIDIA driver"*) problem driver_not_loaded \
      'The NVIDIA driver is not loaded.' \
      "Try 'modprobe nvidia'; if that fails, install the driver for the running kernel and reboot." ;;
    15:* | *'GPU is lost'* | *'Unable to determine the device handle'*) problem gpu_lost \
      "nvidia-smi cannot reach a GPU; it may have fallen off the bus: $REPLY" \
      "Look for 'Xid' in 'dmesg', then reboot." ;;
    6:* | *'No devices were found'*) problem no_devices 'nvidia-smi finds no GPU on this machine.' \
      "Look at 'lspci | grep -i nvidia' and 'dmesg | grep -i nvrm'." ;;
    "$UNREADABLE":*) problem nvidia_smi_unparsable 'nvidia-smi printed more than 256 KiB, or binary data.' \
      "Run 'nvidia-smi' by hand." ;;
    0:*) problem nvidia_smi_unparsable "nvidia-smi answered in a form that this script doesn't know: $REPLY" \
      "Run 'nvidia-smi' by hand; a newer driver may need a newer script." ;;
    *) problem nvidia_smi_failed "nvidia-smi failed (exit code $rc): $REPLY" \
      "Run 'nvidia-smi' by hand." ;;
  esac
  return 1
}

finish_smi() { # HANDLE: as finish, looking past a damaged infoROM (code 14), with which a card works all the same
  local line
  finish "$1"
  [[ $rc == 14 ]] || return 0
  split "$out"
  rc=0 out=''
  for line in "${lines[@]}"; do [[ $line == 'WARNING: infoROM'* ]] || out+=$line$'\n'; done
}

# fields LINE N: sets $field to the N comma-separated fields of a row, the last one with its commas. Odd or
# missing ones spoil nothing: whoever needs one sees for himself whether it can be read.
fields() {
  local n IFS=,
  # shellcheck disable=SC2206 # splitting is meant
  field=($1)
  field=("${field[@]:0:$2-1}" "${field[*]:$2-1}")
  for ((n = 0; n < $2; n++)); do
    field[n]=${field[n]-}
    field[n]=${field[n]#"${field[n]%%[! ]*}"}
    field[n]=${field[n]%"${field[n]##*[! ]}"}
  done
}

readable() { # TEXT FORM: sets $REPLY to the text, or to nothing where it has another form
  REPLY=''
  [[ $1 =~ ^($2)$ ]] && REPLY=${BASH_REMATCH[1]}
}

read_gpus() { # HANDLE
  local line n=0 field
  finish_smi "$1"
  split "$out"
  ((rc || ${#lines[@]})) || rc=6
  [[ $rc != 0 || $out$err == *'No devices were found'* ]] && { smi_problem; return; }
  for line in "${lines[@]}"; do
    fields "$line" 7
    readable "${field[0]}" "$NUMBER"; gpu_index[n]=$REPLY
    readable "${field[1]}" 'GPU-[0-9A-Za-z-]+'; gpu_uuid[n]=$REPLY
    readable "${field[2]}" '[0-9A-Fa-f:]+\.[0-7]'; gpu_bus[n]=$REPLY
    readable "${field[3]% MiB}" "$NUMBER"; gpu_total[n]=$REPLY
    readable "${field[4]% MiB}" "$NUMBER"; gpu_used[n]=$REPLY
    gpu_driver[n]=${field[5]} gpu_name[n]=${field[6]}
    [[ ${gpu_index[n]} && ${gpu_uuid[n]} && ${gpu_bus[n]} ]] || odd_gpu=$line
    if [[ ${gpu_uuid[n]} ]]; then
      [[ ! ${slot_of[${gpu_uuid[n]}]+twice} ]] || { smi_problem "$line"; return; }
      slot_of[${gpu_uuid[n]}]=$n
    fi
    n=$((n + 1))
  done
  ((${#slot_of[@]})) || smi_problem
}

read_apps() { # HANDLE: the processes on the cards
  local line n=0 mig=0 field
  finish_smi "$1"
  [[ $out == *'No running processes found'* ]] && out=''
  ((rc)) && { smi_problem; return; }
  listed=true
  split "$out"
  for line in "${lines[@]}"; do
    fields "$line" 3
    readable "${field[0]}" '(GPU|MIG)-[0-9A-Za-z/-]+'; app_uuid[n]=$REPLY
    readable "${field[1]}" '[1-9][0-9]{0,8}'; app_pid[n]=$REPLY
    readable "${field[2]% MiB}" "$NUMBER"; app_memory[n]=$REPLY
    app_row[n]=$line
    [[ ${app_uuid[n]} == MIG* ]] && mig=1
    n=$((n + 1))
  done
  ((mig)) && read_mig
  for line in "${!app_pid[@]}"; do name_app "$line"; done
}

read_mig() { # which card each MIG instance is part of: one more call, only where an instance turns up
  local handle one uuids
  ((!mig_asked)) || return 0
  mig_asked=1
  start handle nvidia-smi -L
  finish_smi "$handle"
  read_list
  for one in "${uuids[@]-}"; do [[ $rc == 0 && $one == @(GPU|MIG)-* ]] || mig_list=("$rc" "$out" "$err"); done
}

may_be_unlisted() { # ID: is it an instance that "nvidia-smi -L" may have left out?
  [[ ${1#nvidia.com/gpu=} == MIG-* && ${mig_list[0]+failed} ]]
}

mig_problem() { # ID: if so, reports why
  may_be_unlisted "$1" || return 1
  rc=${mig_list[0]} out=${mig_list[1]} err=${mig_list[2]}
  smi_problem
  return 0
}

read_list() { # what "nvidia-smi -L" said: sets $uuids to those of the cards, or of a card's MIG instances instead
  local line parent=''
  uuids=()
  split "$out"
  for line in "${lines[@]}"; do
    if [[ $line =~ ^GPU\ .*UUID:\ (GPU-[0-9A-Za-z-]+) ]]; then
      parent=${slot_of[${BASH_REMATCH[1]}]-}
      uuids+=("${BASH_REMATCH[1]}")
    elif [[ $line =~ ^\ +MIG\ .*UUID:\ (MIG-[0-9A-Za-z/-]+) ]]; then
      [[ ! $parent ]] || slot_of[${BASH_REMATCH[1]}]=$parent
      [[ ${uuids[*]: -1} != GPU-* ]] || unset 'uuids[-1]'
      uuids+=("${BASH_REMATCH[1]}")
    else
      uuids+=("$line") # it may be a card all the same
    fi
  done
}

name_app() { # N: fills in what follows from the n-th process's PID and card
  local pid=${app_pid[$1]:-?} slot=${slot_of[${app_uuid[$1]:-?}]-}
  app_own[$1]=0 app_index[$1]=${slot:+${gpu_index[slot]}} REPLY=''
  if [[ ${comm_of[$pid]+own} ]]; then
    app_own[$1]=1 REPLY=${comm_of[$pid]}
  elif [[ -r /proc/$pid/comm ]]; then
    { IFS= read -r -d '' REPLY </proc/"$pid"/comm; } 2>/dev/null
  fi
  app_name[$1]=${REPLY%$'\n'}
}

bus_number() { # PCI BUS ID, with or without its domain: sets $REPLY to a form that can be compared
  local bus=${1,,}
  REPLY=''
  [[ $bus == *:*:* ]] || bus=0000:$bus
  [[ $bus =~ ^([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])$ ]] || return 1
  REPLY=$((16#${BASH_REMATCH[1]})):${BASH_REMATCH[2]}
}

# find_card ID: sets $REPLY to the UUID of the card or MIG instance that it names. As for NVIDIA's runtime, the
# beginning of a UUID is enough. Ends with 2 where two cards have that name: who knows which one is meant?
find_card() {
  local wanted=${1#nvidia.com/gpu=} n bus uuid='' found=0 prefix=''
  bus_number "$wanted"
  bus=$REPLY
  [[ ! ${wanted,,} =~ ^gpu-[0-9a-f]{8}[0-9a-f-]*$ ]] || prefix=${wanted,,}
  for n in "${!gpu_uuid[@]}"; do
    bus_number "${gpu_bus[n]}"
    if [[ $wanted == "${gpu_index[n]:-?}" || ${wanted,,} == "${gpu_uuid[n],,}" ||
      ($prefix && ${gpu_uuid[n],,} == "$prefix"*) || ($bus && $bus == "$REPLY") ]]; then
      found=$((found + 1)) uuid=${gpu_uuid[n]}
    fi
  done
  REPLY=$uuid
  ((found < 2)) || return 2
  ((!found)) || { [[ $uuid ]]; return; }
  REPLY=$wanted
  [[ $wanted =~ ^MIG-[0-9A-Za-z/-]+$ ]] || return 1
  [[ ${slot_of[$wanted]+known} ]] || read_mig
  REPLY=$wanted
  [[ ${slot_of[$wanted]+known} ]]
}

is_id() { # TEXT: is it an id in one of the forms that find_card understands?
  local id=${1#nvidia.com/gpu=}
  bus_number "$id" || [[ $id =~ ^($NUMBER|[Gg][Pp][Uu]-[0-9A-Fa-f]{8}[0-9A-Fa-f-]*|MIG-[0-9A-Za-z/-]+)$ ]]
}

card() { # UUID: sets $REPLY to the card's name in a sentence
  local n=${slot_of[$1]}
  REPLY="GPU ${gpu_index[n]:-?} (${gpu_name[n]:-?}, $1)"
}

part_of_place() { # UUID: is it the expected card or MIG instance, or an instance of the expected card?
  [[ $1 == "$place" || ${slot_of[${1:-?}]+known} && ${gpu_uuid[${slot_of[$1]}]} == "$place" ]]
}

# --- The container ---------------------------------------------------------------------------------

docker_problem() { # what a call of docker that failed means
  local text=${out,,}${err,,}
  split "$err"$'\n'"$out"
  quoted
  case $rc:$text in
    124:*) problem docker_timeout "docker gave no answer within $limit s." "Try 'systemctl status docker'." ;;
    *'no such container'* | *'no such object'*) no_such_container "There is no container $container on this machine" ;;
    *'permission denied while trying to connect'*)
      problem engine_permission "This user may not use the Docker engine's socket." \
        "Use sudo, or have the user added to the group 'docker'." ;;
    *'cannot connect to the docker daemon'* | *'failed to connect to the docker api'* | *'error during connect'*)
      problem engine_not_running 'The Docker engine is not running, or not reachable from here.' \
        "'systemctl start docker' starts it; by hand, look at DOCKER_HOST and 'docker context ls', too (the role asks /var/run/docker.sock only)." ;;
    "$UNREADABLE":*) problem docker_unparsable 'docker printed more than 256 KiB, or binary data.' \
      "Run 'docker ps' by hand." ;;
    *) problem docker_failed "docker failed (exit code $rc): $REPLY" "Run 'docker ps' by hand." ;;
  esac
}

no_such_container() { # SENTENCE; adds which containers there are
  lines=()
  call docker ps -a --filter label=com.docker.compose.service --format '{{.Names}}'
  split "$out"
  problem no_such_container "$1${lines[0]+"; of Compose there are: ${lines[*]:0:8}"}." \
    "Start it with '$up', or name another one with --container or --project."
}

find_in_project() { # sets $container to the one of --project
  local label=label=com.docker.compose
  call docker ps -a --no-trunc --format '{{.ID}}' --filter "$label.project=$project" \
    --filter "$label.service=$SERVICE" --filter "$label.oneoff=False"
  ((rc)) && { docker_problem; return 1; }
  split "$out"
  container=${lines[0]-}
  case ${#lines[@]} in
    1) return 0 ;;
    0) no_such_container "There is no container of service $SERVICE in Compose project $project" ;;
    *) problem several_containers "Service $SERVICE of Compose project $project has ${#lines[@]} containers." \
      'Name one of them with --container.' ;;
  esac
  return 1
}

# PIDs of another machine's engine could be those of anything here. A context is asked about only where one is set.
engine_is_here() {
  local host=${DOCKER_HOST-} config=${DOCKER_CONFIG:-${HOME-}/.docker}/config.json text=''
  if [[ ! $host ]]; then
    [[ ${DOCKER_CONTEXT-} || ! -f $config ]] || { IFS= read -r -d '' -n "$MOST" text <"$config"; } 2>/dev/null
    [[ ${DOCKER_CONTEXT:-default} != default || $text == *'"currentContext"'* ]] || return 0
    call docker context inspect --format '{{.Endpoints.docker.Host}}'
    ((rc)) && { docker_problem; return 1; }
    host=${out%%$'\n'*}
  fi
  [[ $host && $host != unix://* ]] || return 0
  problem remote_engine "docker is set up to use the engine at $host, which need not be of this machine." \
    'Run this on that machine; or, for the engine of this one, with DOCKER_HOST=unix:///var/run/docker.sock.'
  return 1
}

read_container() {
  local line key value driver=''
  [[ ! $project ]] || find_in_project || return
  # These fields only: environment and arguments hold secrets. Ids as JSON, so that each is one line.
  call docker inspect --type container --format 'id {{.Id}}
name {{.Name}}
status {{.State.Status}}
health {{with index .State "Health"}}{{.Status}}{{end}}
exit {{.State.ExitCode}}
started {{.State.StartedAt}}
image {{.Config.Image}}
directory {{json (index .Config.Labels "com.docker.compose.project.working_dir")}}{{range .HostConfig.DeviceRequests}}
driver {{.Driver}}
count {{.Count}}{{range .DeviceIDs}}
device {{json .}}{{end}}{{end}}' "$container"
  ((rc)) && { docker_problem; return; }
  split "$out"
  for line in "${lines[@]}"; do
    key=${line%% *} value=${line#"${line%% *}"} value=${value# }
    case $key:$driver in
      id:*) id=$value ;;
      name:*) container=${value#/} ;;
      status:*) status=$value ;;
      health:*) [[ $value == none ]] || health=$value ;;
      exit:*) [[ $status == @(exited|dead|restarting) ]] && exit_code=$value ;;
      started:*) [[ $value == 0001-* ]] || started=$value ;; # 0001: never
      image:*) image=$value ;;
      directory:*) [[ $value =~ ^\"(/[^\"\\]*)\"$ ]] && directory=${BASH_REMATCH[1]} up="cd $directory &&${up#*&&}" ;;
      driver:*) driver=$value ;;
      count: | count:nvidia) [[ $value =~ ^(-1|[1-9][0-9]*)$ ]] && asked_count=$value ;;
      device: | device:nvidia) add_request "$value" ;;
      device:cdi) [[ $value == '"nvidia.com/gpu='* ]] && add_request "$value" ;;
    esac
  done
  if [[ ! $id =~ ^[0-9a-f]{12,64}$ || ! $status =~ ^[a-z]+$ ]]; then
    id=''
    quoted
    problem docker_unparsable "'docker inspect' answered in a form that this script doesn't know: $REPLY" \
      "Run 'docker inspect $container' by hand."
  elif [[ $status == running ]]; then
    [[ $health != unhealthy ]] || note "Docker's health check reports $container as unhealthy. To see why: \
docker inspect --format '{{json .State.Health}}' $container"
    read_pids
  else
    not_running
  fi
}

add_request() { # an id, as JSON; NVIDIA's runtime also takes several ids with commas in between
  local one IFS=, ids=${1#\"}
  for one in ${ids%\"}; do
    if [[ $one == @(all|nvidia.com/gpu=all) ]]; then asked_count=-1; else asked+=("$one"); fi
  done
}

not_running() {
  local next="'docker logs --tail 50 $container' says why; '$up' starts it."
  case $status in
    created) next="It was never started, mostly as the engine refused the GPU: 'docker start $container' says why." ;;
    restarting) next="It fails again and again: 'docker logs --tail 50 $container' says why." ;;
    paused) next="It still holds its memory on the card; 'docker unpause $container' lets it go on." ;;
  esac
  problem container_not_running \
    "$container is not running: it is $status${exit_code:+ with exit code $exit_code}." "$next"
}

read_pids() { # of every process of the container: vLLM's work on the card is done by a child
  local line name
  call docker top "$id" -eo pid,comm # never the arguments: they can hold secrets
  case ${err,,} in # what became of it since we inspected it
    *'is restarting'*) status=restarting ;;
    *'is not running'* | *'no such container'*) status=exited ;;
  esac
  [[ $status == running ]] || { not_running; return; }
  ((rc)) && { docker_problem; return; }
  split "$out"
  if [[ ! ${lines[0]-} =~ ^\ *PID ]]; then
    quoted
    problem docker_unparsable "'docker top' answered in a form that this script doesn't know: $REPLY" \
      "Run 'docker top $container -eo pid,comm' by hand."
    return
  fi
  for line in "${lines[@]:1}"; do
    if [[ ! $line =~ ^\ *$NUMBER(\ .*)?$ ]]; then # skipping it could hide a process on a wrong card
      problem docker_unparsable "'docker top' lists a process whose PID can't be read: ${line:0:300}" \
        "Run 'docker top $container -eo pid,comm' by hand."
      return
    fi
    pids+=("${BASH_REMATCH[1]}") name=${BASH_REMATCH[2]}
    name=${name#"${name%%[! ]*}"}
    comm_of[${pids[-1]}]=${name%"${name##*[! ]}"}
  done
}

# --- The verdict -----------------------------------------------------------------------------------

judge() {
  local n cards=''
  if [[ ! $expect ]]; then
    [[ $id ]] && expect_what_was_asked
  elif ((${#slot_of[@]})); then
    expected_id=$expect
    if find_card "$expect"; then
      place=$REPLY
    elif mig_problem "$expect"; then
      :
    elif [[ $odd_gpu ]]; then # it may be the one that is meant
      rc=0
      smi_problem "$odd_gpu"
    else
      for n in "${gpu_uuid[@]}"; do
        card "$n"
        cards+="${cards:+, }$REPLY"
      done
      usage_error "This machine has no GPU '$expect'." no_such_gpu "It has: $cards."
    fi
  fi
  if [[ ! $cause ]]; then
    has_drifted || judge_processes
    ((deep)) && note_what_it_sees
  fi
}

expect_what_was_asked() { # sets $expected_id and $place; without them there is a problem
  local one found why='' sentence next='Name the GPU with --expect, and give the compose file device_ids: '
  next+='only so is the server pinned to one.'
  if ((asked_count)); then
    why=asked_for_count sentence="was asked for a number of GPUs (${asked_count/#-1/all}), not for a certain one."
  elif ((${#asked[@]} == 0)); then
    why=asked_for_no_gpu sentence='was asked for no GPU at all.'
  elif ((${#slot_of[@]})); then
    for one in "${asked[@]}"; do
      find_card "$one"
      found=$?
      if ((found)) && { ((found == 2)) || ! is_id "$one"; }; then
        why=requested_gpu_unclear
        sentence="was asked for GPU '$one', a spelling that this script can't match with one GPU."
        next="Set device_ids to its index or its whole UUID (for a MIG instance: MIG-…), as 'nvidia-smi -L' lists it; "
        next+='or name it with --expect.'
      elif ((found)) && mig_problem "$one"; then
        why=$cause
      elif ((found)) && [[ $odd_gpu ]]; then
        why=nvidia_smi_unparsable
        sentence="was asked for GPU '$one', which may be the one that nvidia-smi shows as '${odd_gpu:0:300}'."
        next="Run 'nvidia-smi' by hand, or name the GPU by its UUID with --expect."
      elif ((found)); then
        why=requested_gpu_missing sentence="was asked for GPU '$one', which this machine doesn't have (any more)."
        next="Compare 'nvidia-smi -L', and name the GPU with --expect."
      elif [[ $place && $place != "$REPLY" ]]; then
        why=${why:-asked_for_several} sentence=${sentence:-"was asked for several GPUs (${asked[*]})."}
      fi
      expected_id=$one place=$REPLY
    done
  fi
  [[ $why ]] || return
  place=''
  [[ $cause ]] || problem "$why" "$container $sentence" "$next"
}

# Prints what is in FILE, and then owner, mode and name of all on the way there: folders, links, where these lead.
# Ends with 3 where there is no such file: not with what a failure would end with, as that is no proof of it.
# A program of its own, so that it has a deadline: FILE is below a folder that a container's label names.
# shellcheck disable=SC2016 # for that program to expand
readonly WALK='
todo=$1 at= way=(/)
while [[ $todo ]]; do
  step=${todo%%/*} todo=${todo:${#step}} todo=${todo#/}
  case $step in "" | .) continue ;; ..) at=${at%/*}; continue ;; esac
  at+=/$step way+=("$at")
  [[ -L $at ]] || continue
  ((${#way[@]} < 99)) && step=$(readlink -- "$at") || exit 3
  [[ $step == /* ]] && at= || at=${at%/*}
  todo=$step/$todo
done
error=$(stat -- "$at" 2>&1) || case $error in
  *": No such file or directory" | *": Not a directory") exit 3 ;;
  *) exit 4 ;;
esac
[[ -f $at ]] || exit 3
[[ -r $at ]] || exit 4
read -r line <"$at"
printf "is %s\n" "$line"
exec stat -c "%u %A %n" -- "${way[@]}"'

# An index can mean another card after a reboot or a change of cards. What it meant when the server was
# proven stands beside its files. It is believed only where nobody but root and this user can have written it.
has_drifted() {
  local line index='' uuid='' file=$directory/.proven/current/gpu
  [[ $drift == 1 && $directory && ${asked[*]} =~ ^$NUMBER$ ]] || return 1
  call bash -c "$WALK" walk "$file"
  case $rc in
    0) ;;
    3) return 1 ;;
    124) note "$file could not be read within $limit s, so it is not known which GPU was proven."; return 1 ;;
    *) note "Which GPU was proven is not known: $file can't be read. Run this as root."; return 1 ;;
  esac
  split "$out"
  for line in "${lines[@]:1}"; do
    [[ ${line%% *} == @(0|"$EUID") && ${line#* } == @(l*|d????????[tT]*|?????-??-*) ]] && continue
    note "$file is ignored: others than root can change it; see owner and mode of ${line#* * }."
    return 1
  done
  [[ ${lines[0]} =~ ^is\ $NUMBER\ +([^ ]+) ]] && index=${BASH_REMATCH[1]} uuid=${BASH_REMATCH[2]}
  [[ $index == "${asked[0]}" && $uuid != "$place" ]] || return 1
  find_card "$index" && [[ $REPLY == "$place" ]] || return 1
  card "$place"
  verdict=misplaced code=1 cause=gpu_drifted
  message="$REPLY is another card than GPU $index was when $container was proven: that was $uuid."
  cure="Name the card by its UUID in gpu_device_id, or accept the new numbering: ansible-playbook serve.yml "
  cure+="-e '{\"vllm_gpu_force\": [\"drift\"]}'."
}

# What must be readable for an "ok": that no process of the container is outside of the expected place. A row whose
# PID can't be read may be one of its processes on a wrong GPU; but not where the container sees no other GPU, as what
# it can't see it can't have opened. A row on the expected place can't spoil an "ok", and one whose PID isn't the
# container's is another's, whatever else is odd about it.
judge_processes() {
  local n uuid right=0 wrong='' want unclear='' maybe=''
  for n in "${!app_pid[@]}"; do
    uuid=${app_uuid[n]}
    if ((!app_own[n])); then
      [[ ! ${app_pid[n]} ]] || continue
      if part_of_place "$uuid"; then maybe=${app_row[n]}; else unclear=${app_row[n]}; fi
    elif [[ ! $uuid ]]; then
      maybe=${app_row[n]} unclear=$maybe
    elif [[ ! ${slot_of[$uuid]+known} ]]; then
      mig_problem "$uuid" || problem nvidia_smi_unparsable \
        "nvidia-smi names a process on $uuid, which is not in its list of GPUs." \
        "Run this again; if it stays, compare 'nvidia-smi -L'."
      return
    elif part_of_place "$uuid"; then
      right=1
    elif [[ $uuid == "${gpu_uuid[${slot_of[$place]}]}" ]]; then
      problem mig_instance_unclear "nvidia-smi doesn't say on which MIG instance of $uuid $container runs." \
        "With '--expect $uuid' the card at least can be judged; 'nvidia-smi' may show more."
      return
    else
      card "$uuid"
      [[ $wrong == *"$REPLY"* ]] || wrong+="${wrong:+ and }$REPLY"
    fi
  done
  card "$place"
  want=$REPLY
  if [[ $wrong ]]; then
    verdict=misplaced code=1 cause=wrong_gpu message="$container runs on $wrong, not on $want."
    ((right)) && cause=additional_gpu message="$container runs on $want, but holds $wrong as well."
    if was_asked_for_it; then
      cure="It was asked for the right GPU only, but was given another. Try "
      cure+="'$up --force-recreate'; then see that it is not privileged and that NVIDIA's"
      cure+=' container toolkit is set up.'
    else
      cure="Run 'ansible-playbook serve.yml -e gpu_device_id=$expected_id', or set GPU_DEVICE_ID=$expected_id in .env"
      cure+=" and run '$up' ('restart' is not enough)."
    fi
  elif ((deep || !right)) && lost_its_view; then
    return
  elif [[ $unclear ]] && ! sees_no_other; then
    process_unclear "$unclear" "${seen_why:-it sees other GPUs as well}"
  elif ((right)); then
    verdict=ok code=0 message="$container runs on $want and on no other."
  elif [[ $maybe ]]; then
    process_unclear "$maybe" 'no other process of it is on a GPU'
  else
    nothing_there_yet
  fi
}

process_unclear() { # ROW WHY
  problem process_unclear "nvidia-smi lists '${1:0:300}', which may or may not be a process of $container ($2)." \
    "Run 'nvidia-smi' by hand; once that row is gone or can be read, run this again."
}

was_asked_for_it() { # was the container asked for the expected card, and for nothing else?
  local one
  ((${#asked[@]} && !asked_count)) || return 1
  for one in "${asked[@]}"; do
    find_card "$one" && [[ $REPLY == "$place" ]] || return 1
  done
}

# Asking inside the container costs as much as all the rest: so only where the verdict needs it, or with --deep.
look_inside() { # sets $seen to the $uuids that the container sees, or $seen_why to why they aren't known
  local handle uuids
  [[ ! ${seen[*]}$seen_why ]] || return 0
  start handle docker exec "$id" nvidia-smi -L
  finish_smi "$handle"
  read_list
  ((rc || !${#uuids[@]})) || { seen=("${uuids[@]}"); return; }
  split "$err"$'\n'"$out"
  quoted
  seen_why="asked inside of it, nvidia-smi failed with exit code $rc: $REPLY"
}

# A "systemctl daemon-reload" can take the card from a running container's view. That shows only from inside.
lost_its_view() {
  look_inside
  [[ $seen_why == *'NVML: Unknown Error'* ]] || return 1
  problem gpu_view_lost "$container lost its view of the GPU while it was running (NVML: Unknown Error)." \
    "Recreate it: '$up --force-recreate'."
}

sees_no_other() {
  local one
  look_inside
  [[ ! $seen_why ]] || return 1
  for one in "${seen[@]}"; do part_of_place "$one" || return 1; done
}

note_what_it_sees() {
  local one others=''
  look_inside
  for one in "${seen[@]}"; do
    if [[ $one != @(GPU|MIG)-* ]] || part_of_place "$one"; then continue; fi
    REPLY=$one
    [[ ! ${slot_of[$one]+known} ]] || card "$one"
    others+="${others:+ and }$REPLY"
  done
  card "$place"
  [[ ! $others ]] || note "$container also sees $others and can use it at any time: see that it requests only \
$REPLY and is not privileged."
  [[ ! $seen_why || $cause == gpu_view_lost ]] || note "Which GPUs $container sees is not known: $seen_why."
}

nothing_there_yet() {
  local n since now up=''
  since=$(date -d "$started" +%s 2>/dev/null) && printf -v now '%(%s)T' -1 && up=", up for $((now - since)) s,"
  problem no_process_yet "$container$up has no process on any GPU yet: it may still be loading." \
    "Ask again in some seconds; 'docker logs --tail 50 $container' shows how far it is."
  n=${slot_of[$place]}
  ((${#app_row[@]} || ${gpu_used[n]:-0} < 400)) || note "nvidia-smi lists no process on any GPU, although \
${gpu_used[n]} MiB of GPU ${gpu_index[n]:-?} are in use. In an LXC guest and under WSL2 it never lists any: nothing \
can be proven there."
}

# --- JSON ------------------------------------------------------------------------------------------

# visible TEXT: sets $REPLY to its first 4096 bytes with control characters (which could drive a terminal) as \u001b,
# C1 ones (U+0080 to U+009F) likewise, and bytes that are no UTF-8 as \ufffd: harmless, and right in JSON as well.
visible() {
  local rest=${1:0:4096} done='' char more=[$'\x80'-$'\xbf'] n
  REPLY=$rest
  [[ $rest == *[![:print:]]* ]] || return 0
  while [[ $rest ]]; do
    n=1
    # shellcheck disable=SC2053 # $more is a pattern
    if [[ $rest == [$'\xc2'-$'\xdf']$more* ]]; then n=2
    elif [[ $rest == [$'\xe1'-$'\xec'$'\xee'$'\xef']$more$more* || $rest == $'\xe0'[$'\xa0'-$'\xbf']$more* ||
      $rest == $'\xed'[$'\x80'-$'\x9f']$more* ]]; then n=3
    elif [[ $rest == [$'\xf1'-$'\xf3']$more$more$more* || $rest == $'\xf0'[$'\x90'-$'\xbf']$more$more* ||
      $rest == $'\xf4'[$'\x80'-$'\x8f']$more$more* ]]; then n=4
    fi
    char=${rest:0:n} rest=${rest:n}
    case $char in
      [[:cntrl:]]) printf -v char '\\u%04x' "'$char" ;;
      $'\xc2'[$'\x80'-$'\x9f']) printf -v n %d "'${char:1}"; printf -v char '\\u%04x' $((n & 255)) ;;
      [$'\x80'-$'\xff']) char='\ufffd' ;;
    esac
    done+=$char
  done
  REPLY=$done
}

quote() { # TEXT: sets $REPLY to a JSON string, or to null for an empty text
  REPLY=null
  [[ $1 ]] || return 0
  REPLY=${1:0:2000} # cut before it is escaped
  REPLY=${REPLY//\\/\\\\}
  visible "${REPLY//\"/\\\"}"
  REPLY="\"$REPLY\""
}

# object KEY VALUE...: sets $REPLY. The value of a key with a leading # is a number, with @ it is JSON.
object() {
  local all=''
  while (($#)); do
    case $1 in
      '#'*) REPLY=null; [[ $2 =~ ^-?(0|[1-9][0-9]*)$ ]] && REPLY=$2 ;;
      @*) REPLY=$2 ;;
      *) quote "$2" ;;
    esac
    all+="${all:+,}\"${1#[#@]}\":$REPLY"
    shift 2
  done
  REPLY="{$all}"
}

print_json() {
  local n gpus='' expected=null box=null mine='' others='' ids='' told='' numbers=${pids[*]}
  for n in "${!gpu_uuid[@]}"; do
    object '#index' "${gpu_index[n]}" uuid "${gpu_uuid[n]}" pci_bus_id "${gpu_bus[n]}" name "${gpu_name[n]}" \
      '#memory_total_mib' "${gpu_total[n]}" '#memory_used_mib' "${gpu_used[n]}" driver_version "${gpu_driver[n]}"
    gpus+="${gpus:+,}$REPLY"
  done
  if [[ $place ]]; then
    object id "$expected_id" '#index' "${gpu_index[${slot_of[$place]}]}" uuid "$place"
    expected=$REPLY
  fi
  if [[ $id ]]; then
    for n in "${asked[@]}"; do
      quote "$n"
      ids+="${ids:+,}$REPLY"
    done
    object name "$container" id "$id" status "$status" health "$health" '#exit_code' "$exit_code" \
      started_at "$started" image "$image" @requested "[$ids]" '#requested_count' "${asked_count#0}" @pids "[${numbers// /,}]"
    box=$REPLY
  fi
  for n in "${!app_name[@]}"; do
    object '#pid' "${app_pid[n]}" name "${app_name[n]}" gpu_uuid "${app_uuid[n]}" \
      '#gpu_index' "${app_index[n]}" '#memory_mib' "${app_memory[n]}"
    if ((app_own[n])); then mine+="${mine:+,}$REPLY"; else others+="${others:+,}$REPLY"; fi
  done
  for n in "${notes[@]}"; do
    quote "$n"
    told+="${told:+,}$REPLY"
  done
  object '#schema' 1 verdict "$verdict" cause "$cause" '#code' "$code" message "$message" cure "$cure" \
    @expected "$expected" @gpus "[$gpus]" @container "$box" @processes "[$mine]" @other_processes "[$others]" \
    @processes_listed "$listed" @notes "[$told]"
  printf '%s\n' "$REPLY"
}

# --- The report for a person -----------------------------------------------------------------------

say() { # TEXT [COLOUR]: indented, in lines of up to 80 columns
  local word line=' '
  visible "$1"
  for word in $REPLY; do
    if ((${#line} + ${#word} > 78)); then
      printf '%s%s%s\n' "${2-}" "$line" "${2:+$normal}"
      line='   '
    fi
    line+=" $word"
  done
  printf '%s%s%s\n' "${2-}" "$line" "${2:+$normal}"
}

print_processes() { # 1: the container's own; 0: the others
  local n any=0
  for n in "${!app_name[@]}"; do
    ((app_own[n] == $1)) || continue
    any=1
    visible "${app_name[n]:-?}"
    printf '  GPU %-3s pid %-8s %7s MiB  %s\n' "${app_index[n]:-?}" "${app_pid[n]:-?}" "${app_memory[n]:-?}" "$REPLY"
  done
  ((any)) || say none
}

name_requested() { # ID: sets $REPLY to what it means here
  local found=2
  [[ ! ${slot_of[*]} ]] || { find_card "$1"; found=$?; }
  if ((!found)); then
    card "$REPLY"
  elif [[ $found == 2 || $odd_gpu ]] || may_be_unlisted "$1" || ! is_id "$1"; then
    REPLY='not known'
  else
    REPLY='no GPU of this machine'
  fi
}

print_report() {
  local n bold='' normal='' colour='' word="CAN'T TELL"
  if [[ -t 1 && ! ${NO_COLOR-} && ${TERM-dumb} != dumb ]]; then bold=$'\e[1m' normal=$'\e[0m' colour=$'\e[33m'; fi
  case $verdict in
    ok) word=OK colour=${colour:+$'\e[32m'} ;;
    misplaced) word=MISPLACED colour=${colour:+$'\e[31m'} ;;
  esac
  visible "${gpu_driver[0]:+ (driver ${gpu_driver[0]})}"
  printf '%s\n' "${bold}1. GPUs of this machine$REPLY$normal"
  ((${#gpu_uuid[@]})) || say 'not known'
  for n in "${!gpu_uuid[@]}"; do
    visible "${gpu_name[n]:-?}"
    printf '  GPU %-3s %s, %s of %s MiB used\n          %s  %s\n' "${gpu_index[n]:-?}" "$REPLY" \
      "${gpu_used[n]:-?}" "${gpu_total[n]:-?}" "${gpu_uuid[n]:-?}" "${gpu_bus[n]:-?}"
  done

  printf '\n%s\n' "${bold}2. What the container was given$normal"
  [[ $id ]] || say 'not known'
  [[ ! $id ]] || say "$container (${id:0:12}): $status${started:+ since ${started%.*}}"
  [[ ! $id ]] || say "image: $image"
  for n in "${asked[@]}"; do
    name_requested "$n"
    say "asked for: '$n' = $REPLY"
  done
  ((asked_count)) && say "asked for: a number of GPUs (${asked_count/#-1/all})"
  [[ $id ]] && ((!asked_count && ${#asked[@]} == 0)) && say 'asked for: no GPU'

  printf '\n%s\n' "${bold}3. Its processes on the GPUs$normal"
  print_processes 1
  printf '%s\n' '  others on the GPUs:'
  print_processes 0

  printf '\n%s\n' "${bold}4. Verdict$normal"
  say "$word: $message" "$colour"
  [[ ! $cure ]] || say "Next: $cure"
  for n in "${notes[@]}"; do say "Note: $n"; done
}

# --- Main ------------------------------------------------------------------------------------------

main() {
  local gpus='' apps='' engine
  parse_options "$@"
  if type -P nvidia-smi >/dev/null; then
    start gpus nvidia-smi --query-gpu=index,uuid,pci.bus_id,memory.total,memory.used,driver_version,name \
      --format=csv,noheader,nounits
    start apps nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader,nounits
  fi
  # Meanwhile the engine is asked. What is wrong there is reported after what is wrong with the cards.
  if type -P docker >/dev/null; then
    engine_is_here && read_container
  else
    problem docker_missing 'The docker command is not installed.' 'Install the Docker CLI, or run this on the GPU host.'
  fi
  engine=("$cause" "$message" "$cure") cause='' message='' cure=''
  if [[ ! $gpus ]]; then
    problem nvidia_smi_missing 'nvidia-smi is not installed.' \
      "Install the NVIDIA driver's utilities, or run this on the GPU host."
  elif read_gpus "$gpus"; then
    read_apps "$apps"
  else
    kill "${apps#* }" 2>/dev/null # it would fail in the same way
  fi
  # Where the cards can't be read, that there is no container is no news.
  [[ ! ${engine[0]} || (${engine[0]} == no_such_container && $cause) ]] || problem "${engine[@]}"
  judge
  if ((json)); then print_json; elif ((!quiet)); then print_report; fi
  judged=1
  exit "$code"
}

# bash itself ends with 1 when it stumbles over a script. That must not pass for a verdict.
# shellcheck disable=SC2317,SC2329 # the trap calls it
unjudged() { ((judged)) || exit 3; }
trap unjudged EXIT
main "$@"
