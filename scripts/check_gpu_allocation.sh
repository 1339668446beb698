#!/usr/bin/env bash
# Checks that the vLLM server runs on the expected GPU and on no other.
#
# Needs bash 4.4, coreutils, nvidia-smi and the docker CLI; changes nothing. It can also be read from
# standard input ("bash -s -- --json < check_gpu_allocation.sh"), so it uses neither $0 nor standard
# input. docs/check_gpu_allocation.md lists the exit codes, causes and JSON fields.
#
# The verdict depends on UUIDs and host PIDs only. Indices are only shown: they are renumbered inside a
# container and can change at a reboot. nvidia-smi is not asked for process names: it does not escape a
# line break in one, so any program could forge rows.
#
# No `set -e`: nearly every command here may fail, and each failure is a finding to report.
set -uf         # -f: text is split into lines unquoted and must not match file names
export LC_ALL=C # match bytes, and get other programs' messages in English

readonly SERVICE=vllm # the Compose service that --project selects
readonly NUMBER='(0|[1-9][0-9]{0,8})'
readonly MAX_BYTES=262144 # of a program's output
readonly UNREADABLE=256   # in place of an exit code: the output is longer, or binary

judged=0 json=0 quiet=0 deep=0 check_drift=1 limit=10 expect='' container='' project=''
verdict=unknown code=3 cause='' message='' cure=''
# A value of a card or a process that cannot be read is empty.
gpu_index=() gpu_uuid=() gpu_bus=() gpu_total=() gpu_used=() gpu_driver=() gpu_name=() odd_gpu=''
app_uuid=() app_pid=() app_memory=() app_index=() app_name=() app_own=() app_row=() listed=false
mig_read=0 mig_list=() # exit code, output and error of "nvidia-smi -L" if it may have omitted an instance
up='cd /opt/vllm-gpu && docker compose -f docker-compose.serving.yml up -d' # in the server's directory
id='' status='' health='' exit_code='' started='' image='' directory='' pids=() requested=() requested_count=0
notes=() visible_uuids=() not_visible_why=''
expected_id='' expected_uuid=''  # the expected GPU as it was named, and its UUID
declare -A slot_of=() comm_of=() # UUID of a GPU or MIG instance: its card's place in gpu_…; own PID: its name

show_help() {
  printf '%s\n' \
    'Usage: check_gpu_allocation.sh [OPTION]...' \
    'Checks that the vLLM server runs on the expected GPU and on no other.' '' \
    '  --expect ID        the expected GPU: index, UUID or PCI bus id' \
    '                     (default: the GPU that the container requested)' \
    '  --container NAME   the container to check (default: vllm-server)' \
    "  --project NAME     or the container of service \"$SERVICE\" in this Compose project" \
    '  --deep             also check which GPUs the container sees' \
    '  --no-drift         do not compare an index with the GPU that it meant when' \
    '                     the server was proven' \
    '  --timeout SECONDS  limit for each call of nvidia-smi and docker (default: 10)' \
    '  --json             print one JSON object instead of the report' \
    '  --quiet            print nothing; only set the exit code' \
    '  --help             show this help' '' \
    'Exit code: 0 on the expected GPU and no other; 1 on a wrong or additional GPU;' \
    '           2 wrong usage, or no such GPU here; 3 unknown, for the reason given.'
}

usage_error() { # SENTENCE [CAUSE CURE]
  judged=1 verdict=usage code=2 message=$1 cause=${2:-usage} cure=${3:-'See --help.'}
  ((json && !quiet)) && print_json
  printable "check_gpu_allocation: $message $cure"
  printf '%s\n' "$REPLY" >&2
  exit 2
}

parse_options() {
  local option value
  for option; do [[ $option == --json ]] && json=1; done # so that wrong usage is reported as JSON, too
  while (($#)); do
    option=${1%%=*} value=${1#*=}
    case $1 in
      --json | --help | --quiet | --deep | --no-drift | --expect=* | --container=* | --project=* | --timeout=*) ;;
      --expect | --container | --project | --timeout)
        (($# > 1)) || usage_error "$1 needs a value."
        value=$2
        shift ;;
      *) usage_error "Unknown option '$1'." ;;
    esac
    shift
    case $option in
      --help) show_help; judged=1; exit 0 ;;
      --quiet) quiet=1 ;;
      --deep) deep=1 ;;
      --no-drift) check_drift=0 ;;
      --expect)
        bus_number "$value" || [[ $value =~ ^($NUMBER|(GPU|MIG)-[0-9A-Za-z/-]{1,80})$ ]] ||
          usage_error "'$value' is not a GPU index, UUID or PCI bus id."
        expect=$value ;;
      --container | --project)
        [[ $value =~ ^[a-zA-Z0-9][a-zA-Z0-9_.-]*$ ]] || usage_error "'$value' is not a valid name for $option."
        if [[ $option == --project ]]; then project=$value; else container=$value; fi ;;
      --timeout)
        [[ $value =~ ^[1-9][0-9]{0,3}$ ]] || usage_error "'$value' is not a number of seconds from 1 to 9999."
        limit=$value ;;
    esac
  done
  [[ $container && $project ]] && usage_error 'Use --container or --project, not both.'
  ((json && quiet)) && usage_error 'Use --json or --quiet, not both.'
  container=${container:-vllm-server}
}

# --- Calling other programs ------------------------------------------------------------------------

# start VARIABLE COMMAND...: runs it in the background; finish takes what it stores in VARIABLE.
# A process stuck in the kernel (a card that fell off the bus) survives even SIGKILL and keeps its
# pipes open. So finish never waits for it to end, and the subshell inherits none of our own pipes.
start() {
  local fd variable=$1
  shift
  exec {fd}< <(
    exec </dev/null 2>/dev/null
    {
      exec {pipe}< <(exec timeout -k 1 "$limit" "$@" 2>&3 3>&-)
      IFS= read -r -N "$MAX_BYTES" -u "$pipe" out
      exec {pipe}<&- # stops a program that prints without end
      wait "$!" && rc=0 || rc=$?
    } 3>&1
    ((${#out} < MAX_BYTES)) || out='' rc=$UNREADABLE
    printf '\0%s\0%s\0' "$out" "$rc"
  )
  printf -v "$variable" '%s' "$fd $!"
}

finish() { # HANDLE: sets $out, $err and $rc; rc is 124 after a timeout
  local fd=${1% *}
  out='' err='' rc=''
  if IFS= read -r -d '' -n "$MAX_BYTES" -t $((limit + 2)) -u "$fd" err && ((${#err} < MAX_BYTES)) &&
    IFS= read -r -d '' -t 9 -u "$fd" out && IFS= read -r -d '' -t 9 -u "$fd" rc; then
    [[ $rc =~ ^[0-9]{1,3}$ ]] || rc=$UNREADABLE
  else
    kill "${1#* }" 2>/dev/null
    rc=124
    ((${#err} < MAX_BYTES)) || rc=$UNREADABLE
  fi
  [[ $rc == 137 ]] && rc=124 # it ignored SIGTERM
  exec {fd}<&-
}

call() { # COMMAND...: start and finish
  local handle
  start handle "$@"
  finish "$handle"
}

split() { # TEXT: sets $lines, without carriage returns and empty lines, and cut to a length that matches fast
  local n IFS=$'\n'
  # shellcheck disable=SC2206 # splitting is intended
  lines=(${1//$'\r'/})
  for n in "${!lines[@]}"; do ((${#lines[n]} <= 4096)) || lines[n]=${lines[n]:0:4096}; done
}

excerpt() { # sets $REPLY to the start of a program's output, from $lines
  REPLY=${lines[*]:0:3}
  REPLY=${REPLY:0:300}
  REPLY=${REPLY:-no output}
}

# problem CAUSE SENTENCE CURE: a reason why there is no verdict. The first one sets the cause.
problem() {
  [[ $message != *"$2"* ]] || return 0 # two calls can fail in the same way
  cause=${cause:-$1}
  message+="${message:+ Also: }$2"
  cure+="${cure:+ }$3"
}

# --- The cards -------------------------------------------------------------------------------------

smi_problem() { # [ROW]: reports that nvidia-smi failed, or that its output (or this row) cannot be parsed
  local rerun="Run 'nvidia-smi' to see its output"
  if ((rc)); then split "$err"$'\n'"$out"; else split "${1-$out}"; fi
  excerpt
  case $rc:$out$err in
    124:*) problem nvidia_smi_timeout "nvidia-smi gave no answer within $limit s; a card may have fallen off the bus." \
      "Check 'dmesg' for 'Xid' or 'fallen off the bus'; a reboot usually helps. If nvidia-smi is only slow, run 'systemctl enable --now nvidia-persistenced'." ;;
    *'Driver/library version mismatch'*) problem driver_library_mismatch \
      'The loaded NVIDIA driver and its libraries have different versions (an update without a reboot).' \
      'Reboot, or reload the nvidia kernel modules.' ;;
    9:* | *"couldn't communicate with the NVIDIA driver"*) problem driver_not_loaded \
      'The NVIDIA driver is not loaded.' \
      "Try 'modprobe nvidia'; if that fails, install the driver for the running kernel and reboot." ;;
    15:* | *'GPU is lost'* | *'Unable to determine the device handle'*) problem gpu_lost \
      "nvidia-smi cannot reach a GPU; it may have fallen off the bus: $REPLY" \
      "Check 'dmesg' for 'Xid', then reboot." ;;
    6:* | *'No devices were found'*) problem no_devices 'nvidia-smi finds no GPU on this machine.' \
      "Check 'lspci | grep -i nvidia' and 'dmesg | grep -i nvrm'." ;;
    "$UNREADABLE":*) problem nvidia_smi_unparsable 'nvidia-smi printed more than 256 KiB, or binary data.' "$rerun." ;;
    0:*) problem nvidia_smi_unparsable "This script cannot parse the output of nvidia-smi: $REPLY" \
      "$rerun; a newer driver may need a newer version of this script." ;;
    *) problem nvidia_smi_failed "nvidia-smi failed (exit code $rc): $REPLY" "$rerun." ;;
  esac
  return 1
}

accept_damaged_inforom() { # the card works despite it, but nvidia-smi ends with 14 and may print a warning
  local line
  [[ $rc == 14 ]] || return 0
  split "$out"
  rc=0 out=''
  for line in "${lines[@]}"; do [[ $line == 'WARNING: infoROM'* ]] || out+=$line$'\n'; done
}

# fields LINE N: sets $field to the N comma-separated fields of a row; further commas belong to the last one.
# A missing field is empty.
fields() {
  local n IFS=,
  # shellcheck disable=SC2206 # splitting is intended
  field=($1)
  field=("${field[@]:0:$2-1}" "${field[*]:$2-1}")
  for ((n = 0; n < $2; n++)); do
    field[n]=${field[n]-}
    field[n]=${field[n]#"${field[n]%%[! ]*}"}
    field[n]=${field[n]%"${field[n]##*[! ]}"}
  done
}

set_if() { # VARIABLE TEXT REGEX: sets it to the text if that matches, otherwise to nothing
  local value=''
  [[ $2 =~ ^($3)$ ]] && value=$2
  printf -v "$1" '%s' "$value"
}

read_gpus() { # HANDLE
  local line n=0 field
  finish "$1"
  accept_damaged_inforom
  split "$out"
  ((rc || ${#lines[@]})) || rc=6
  [[ $rc != 0 || $out$err == *'No devices were found'* ]] && { smi_problem; return; }
  for line in "${lines[@]}"; do
    fields "$line" 7
    set_if "gpu_index[$n]" "${field[0]}" "$NUMBER"
    set_if "gpu_uuid[$n]" "${field[1]}" 'GPU-[0-9A-Za-z-]+'
    set_if "gpu_bus[$n]" "${field[2]}" '[0-9A-Fa-f:]+\.[0-7]'
    set_if "gpu_total[$n]" "${field[3]% MiB}" "$NUMBER"
    set_if "gpu_used[$n]" "${field[4]% MiB}" "$NUMBER"
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
  finish "$1"
  accept_damaged_inforom
  [[ $out == *'No running processes found'* ]] && out=''
  ((rc)) && { smi_problem; return; }
  listed=true
  split "$out"
  for line in "${lines[@]}"; do
    fields "$line" 3
    set_if "app_uuid[$n]" "${field[0]}" '(GPU|MIG)-[0-9A-Za-z/-]+'
    set_if "app_pid[$n]" "${field[1]}" '[1-9][0-9]{0,8}'
    set_if "app_memory[$n]" "${field[2]% MiB}" "$NUMBER"
    app_row[n]=$line
    [[ ${app_uuid[n]} == MIG* ]] && mig=1
    n=$((n + 1))
  done
  ((mig)) && read_mig
  for n in "${!app_pid[@]}"; do name_app "$n"; done
}

read_mig() { # finds the card of each MIG instance: one more call, so only where there is an instance
  local uuid uuids
  ((!mig_read)) || return 0
  mig_read=1
  list_uuids nvidia-smi -L
  for uuid in "${uuids[@]-}"; do [[ $rc == 0 && $uuid == @(GPU|MIG)-* ]] || mig_list=("$rc" "$out" "$err"); done
}

may_be_unlisted() { # ID: is it an instance that "nvidia-smi -L" may have omitted?
  [[ ${1#nvidia.com/gpu=} == MIG-* && ${mig_list[0]+failed} ]]
}

mig_problem() { # ID: if so, reports why
  may_be_unlisted "$1" || return 1
  rc=${mig_list[0]} out=${mig_list[1]} err=${mig_list[2]}
  smi_problem
  return 0
}

# list_uuids COMMAND...: runs a form of "nvidia-smi -L" and sets $uuids to those of the cards. A card with MIG
# instances is replaced by these, and a line that cannot be parsed is kept as it is: it may be a card.
list_uuids() {
  local line parent=''
  call "$@"
  accept_damaged_inforom
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
      uuids+=("$line")
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

# find_card ID: sets $REPLY to the UUID of the card or MIG instance with that name. The beginning of a UUID is
# enough, as for NVIDIA's runtime. Returns 2 where two cards match.
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

is_expected() { # UUID: is it the expected card or MIG instance, or an instance of the expected card?
  [[ $1 == "$expected_uuid" || ${slot_of[${1:-?}]+known} && ${gpu_uuid[${slot_of[$1]}]} == "$expected_uuid" ]]
}

is_expected_id() { # ID
  find_card "$1" && [[ $REPLY == "$expected_uuid" ]]
}

# --- The container ---------------------------------------------------------------------------------

docker_problem() { # reports why a call of docker failed
  local text=${out,,}${err,,}
  split "$err"$'\n'"$out"
  excerpt
  case $rc:$text in
    124:*) problem docker_timeout "docker gave no answer within $limit s." "Check 'systemctl status docker'." ;;
    *'no such container'* | *'no such object'*) no_such_container "There is no container $container on this machine" ;;
    *'permission denied while trying to connect'*)
      problem engine_permission "This user has no access to the Docker Engine's socket." \
        "Use sudo, or add the user to the group 'docker'." ;;
    *'cannot connect to the docker daemon'* | *'failed to connect to the docker api'* | *'error during connect'*)
      problem engine_not_running 'The Docker Engine is not running, or cannot be reached from here.' \
        "Start it with 'systemctl start docker'. If you ran this script yourself, also check DOCKER_HOST and 'docker context ls' (the role uses only /var/run/docker.sock)." ;;
    "$UNREADABLE":*) problem docker_unparsable 'docker printed more than 256 KiB, or binary data.' \
      "Run 'docker ps' to see its output." ;;
    *) problem docker_failed "docker failed (exit code $rc): $REPLY" "Run 'docker ps' to see its output." ;;
  esac
}

docker_unparsable() { # COMMAND, and in $lines what it printed
  excerpt
  problem docker_unparsable "This script cannot parse the output of '$1': $REPLY" "Run '$1' to see its output."
}

no_such_container() { # SENTENCE; adds which containers there are
  call docker ps -a --filter label=com.docker.compose.service --format '{{.Names}}'
  split "$out"
  problem no_such_container "$1${lines[0]+". Compose containers here: ${lines[*]:0:8}"}." \
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

# PIDs of another machine could match any process of this one. The context is read only where one is set.
engine_is_local() {
  local host=${DOCKER_HOST-} config=${DOCKER_CONFIG:-${HOME-}/.docker}/config.json text=''
  if [[ ! $host ]]; then
    [[ ${DOCKER_CONTEXT-} || ! -f $config ]] || { IFS= read -r -d '' -n "$MAX_BYTES" text <"$config"; } 2>/dev/null
    [[ ${DOCKER_CONTEXT:-default} != default || $text == *'"currentContext"'* ]] || return 0
    call docker context inspect --format '{{.Endpoints.docker.Host}}'
    ((rc)) && { docker_problem; return 1; }
    host=${out%%$'\n'*}
  fi
  [[ $host && $host != unix://* ]] || return 0
  problem remote_engine "docker is configured to use the Docker Engine at $host, which may be on another machine." \
    'Run this script on that machine, or set DOCKER_HOST=unix:///var/run/docker.sock to check this one.'
  return 1
}

read_container() {
  local line key value driver=''
  [[ ! $project ]] || find_in_project || return
  # No other fields: environment and arguments hold secrets. Ids as JSON, so that each is one line.
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
      count: | count:nvidia) [[ $value =~ ^(-1|[1-9][0-9]*)$ ]] && requested_count=$value ;;
      device: | device:nvidia) add_request "$value" ;;
      device:cdi) [[ $value == '"nvidia.com/gpu='* ]] && add_request "$value" ;;
    esac
  done
  if [[ ! $id =~ ^[0-9a-f]{12,64}$ || ! $status =~ ^[a-z]+$ ]]; then
    id=''
    docker_unparsable "docker inspect $container"
  elif [[ $status == running ]]; then
    [[ $health != unhealthy ]] || notes+=("Docker's health check reports $container as unhealthy. To see why: \
docker inspect --format '{{json .State.Health}}' $container")
    read_pids
  else
    not_running
  fi
}

add_request() { # an id as JSON; NVIDIA's runtime also accepts several in one, separated by commas
  local gpu IFS=, ids=${1#\"}
  for gpu in ${ids%\"}; do
    if [[ $gpu == @(all|nvidia.com/gpu=all) ]]; then requested_count=-1; else requested+=("$gpu"); fi
  done
}

not_running() {
  local next="Run 'docker logs --tail 50 $container' to see why, and '$up' to start it."
  case $status in
    created) next="It was never started, usually because the Docker Engine refused the GPU: 'docker start $container' shows why." ;;
    restarting) next="It keeps failing: run 'docker logs --tail 50 $container' to see why." ;;
    paused) next="It still holds its GPU memory: run 'docker unpause $container' to resume it." ;;
  esac
  problem container_not_running \
    "$container is not running: it is $status${exit_code:+ with exit code $exit_code}." "$next"
}

read_pids() { # of all processes of the container: in vLLM, a child uses the GPU
  local line row="^ *$NUMBER( +(.*[^ ]))? *$" top="docker top $container -eo pid,comm"
  call docker top "$id" -eo pid,comm # never the arguments: they can hold secrets
  case ${err,,} in # it has stopped since docker inspect
    *'is restarting'*) status=restarting ;;
    *'is not running'* | *'no such container'*) status=exited ;;
  esac
  [[ $status == running ]] || { not_running; return; }
  ((rc)) && { docker_problem; return; }
  split "$out"
  [[ ${lines[0]-} =~ ^\ *PID ]] || { docker_unparsable "$top"; return; }
  for line in "${lines[@]:1}"; do
    # Skipping a row could hide a process on a wrong card.
    [[ $line =~ $row ]] || { lines=("$line"); docker_unparsable "$top"; return; }
    pids+=("${BASH_REMATCH[1]}")
    comm_of[${pids[-1]}]=${BASH_REMATCH[3]}
  done
}

# --- The verdict -----------------------------------------------------------------------------------

judge() {
  local n cards=''
  if [[ ! $expect ]]; then
    [[ $id ]] && expect_requested
  elif ((${#slot_of[@]})); then
    expected_id=$expect
    if find_card "$expect"; then
      expected_uuid=$REPLY
    elif mig_problem "$expect"; then
      :
    elif [[ $odd_gpu ]]; then # it may be the expected one
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
    ((deep)) && note_visible
  fi
}

expect_requested() { # sets $expected_id and $expected_uuid, or reports why the request names no single GPU
  local gpu found why='' sentence next='Name the GPU with --expect, and set device_ids in the compose file: '
  next+='only that pins the server to one GPU.'
  if ((requested_count)); then
    why=asked_for_count sentence="a number of GPUs (${requested_count/#-1/all}), not a specific one."
  elif ((${#requested[@]} == 0)); then
    why=asked_for_no_gpu sentence='no GPU.'
  elif ((${#slot_of[@]})); then
    for gpu in "${requested[@]}"; do
      find_card "$gpu"
      found=$?
      if ((found)) && { ((found == 2)) || ! is_id "$gpu"; }; then
        why=requested_gpu_unclear
        sentence="GPU '$gpu', a name that this script cannot match to exactly one GPU."
        next="Set device_ids to its index or its whole UUID (for a MIG instance: MIG-…), as 'nvidia-smi -L' lists it; "
        next+='or name it with --expect.'
      elif ((found)) && mig_problem "$gpu"; then
        why=$cause
      elif ((found)) && [[ $odd_gpu ]]; then
        why=nvidia_smi_unparsable
        sentence="GPU '$gpu', which may be the one that nvidia-smi lists as '${odd_gpu:0:300}'."
        next="Run 'nvidia-smi' to see its output, or name the GPU by its UUID with --expect."
      elif ((found)); then
        why=requested_gpu_missing sentence="GPU '$gpu', which this machine does not have (any longer)."
        next="Compare with 'nvidia-smi -L', and name the GPU with --expect."
      elif [[ $expected_uuid && $expected_uuid != "$REPLY" ]]; then
        why=${why:-asked_for_several} sentence=${sentence:-"several GPUs (${requested[*]})."}
      fi
      expected_id=$gpu expected_uuid=$REPLY
    done
  fi
  [[ $why ]] || return
  expected_uuid=''
  [[ $cause ]] || problem "$why" "$container requested $sentence" "$next"
}

# Prints the first line of FILE, then owner, mode and name of everything on the path to it: folders, links and
# their targets. Exits with 3 only where FILE provably does not exist.
# A program of its own, so that it has a time limit: a container's label names the folder.
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

# An index can mean another card after a reboot or a change of cards. A file beside the server's files records
# what it meant when the server was proven. It is ignored if a user other than root and this one can have written it.
has_drifted() {
  local line index='' uuid='' file=$directory/.proven/current/gpu
  [[ $check_drift == 1 && $directory && ${requested[*]} =~ ^$NUMBER$ ]] || return 1
  call bash -c "$WALK" walk "$file"
  case $rc in
    0) ;;
    3) return 1 ;;
    124) notes+=("$file could not be read within $limit s, so it is not known which GPU was proven."); return 1 ;;
    *) notes+=("It is not known which GPU was proven: $file cannot be read. Run this script as root."); return 1 ;;
  esac
  split "$out"
  for line in "${lines[@]:1}"; do
    [[ ${line%% *} == @(0|"$EUID") && ${line#* } == @(l*|d????????[tT]*|?????-??-*) ]] && continue
    notes+=("$file is ignored, because users other than root can change it: check the owner and mode of ${line#* * }.")
    return 1
  done
  [[ ${lines[0]} =~ ^is\ $NUMBER\ +([^ ]+) ]] && index=${BASH_REMATCH[1]} uuid=${BASH_REMATCH[2]}
  [[ $index == "${requested[0]}" && $uuid != "$expected_uuid" ]] || return 1
  is_expected_id "$index" || return 1
  card "$expected_uuid"
  verdict=misplaced code=1 cause=gpu_drifted
  message="$REPLY is not the GPU $index on which $container was proven: that was $uuid."
  cure="Name the card by its UUID in gpu_device_id, or accept the new numbering: ansible-playbook serve.yml "
  cure+="-e '{\"vllm_gpu_force\": [\"drift\"]}'."
}

# An "ok" needs proof that no process of the container is outside the expected GPU. A row without a readable PID may
# be such a process, unless the container sees no other GPU: it cannot have opened a GPU that it does not see. A row
# on the expected GPU never prevents an "ok", nor does a row whose PID is not the container's.
judge_processes() {
  local n uuid right=0 wrong='' want unclear='' maybe=''
  for n in "${!app_pid[@]}"; do
    uuid=${app_uuid[n]}
    if ((!app_own[n])); then
      [[ ! ${app_pid[n]} ]] || continue
      if is_expected "$uuid"; then maybe=${app_row[n]}; else unclear=${app_row[n]}; fi
    elif [[ ! $uuid ]]; then
      maybe=${app_row[n]} unclear=$maybe
    elif [[ ! ${slot_of[$uuid]+known} ]]; then
      mig_problem "$uuid" || problem nvidia_smi_unparsable \
        "nvidia-smi lists a process on $uuid, which is not in its list of GPUs." \
        "Run this script again; if the message persists, compare with 'nvidia-smi -L'."
      return
    elif is_expected "$uuid"; then
      right=1
    elif [[ $uuid == "${gpu_uuid[${slot_of[$expected_uuid]}]}" ]]; then
      problem mig_instance_unclear "nvidia-smi does not report which MIG instance of $uuid $container runs on." \
        "Use '--expect $uuid' to check at least the card; 'nvidia-smi' may show more."
      return
    else
      card "$uuid"
      [[ $wrong == *"$REPLY"* ]] || wrong+="${wrong:+ and }$REPLY"
    fi
  done
  card "$expected_uuid"
  want=$REPLY
  if [[ $wrong ]]; then
    verdict=misplaced code=1 cause=wrong_gpu message="$container runs on $wrong, not on $want."
    ((right)) && cause=additional_gpu message="$container runs on $want, but holds $wrong as well."
    if requested_only_expected; then
      cure="It requested the right GPU only, but was given another. Run '$up --force-recreate'; if that does not"
      cure+=' help, check that it is not privileged and that the NVIDIA Container Toolkit is set up.'
    else
      cure="Run 'ansible-playbook serve.yml -e gpu_device_id=$expected_id', or set GPU_DEVICE_ID=$expected_id in .env"
      cure+=" and run '$up' ('restart' is not enough)."
    fi
  elif ((deep || !right)) && lost_its_view; then
    return
  elif [[ $unclear ]] && ! sees_only_expected; then
    process_unclear "$unclear" "${not_visible_why:-it sees other GPUs as well}"
  elif ((right)); then
    verdict=ok code=0 message="$container runs on $want and on no other."
  elif [[ $maybe ]]; then
    process_unclear "$maybe" 'none of its other processes is on a GPU'
  else
    no_process_yet
  fi
}

process_unclear() { # ROW WHY
  problem process_unclear "nvidia-smi lists '${1:0:300}', which may be a process of $container ($2)." \
    "Run 'nvidia-smi' to see that row; once it is gone or readable, run this script again."
}

requested_only_expected() {
  local gpu
  ((${#requested[@]} && !requested_count)) || return 1
  for gpu in "${requested[@]}"; do is_expected_id "$gpu" || return 1; done
}

# A call inside the container takes as long as all the others together: so only where the verdict needs it, or with --deep.
list_visible() { # sets $visible_uuids to the GPUs that the container sees, or $not_visible_why
  local uuids
  [[ ! ${visible_uuids[*]}$not_visible_why ]] || return 0
  list_uuids docker exec "$id" nvidia-smi -L
  ((rc || !${#uuids[@]})) || { visible_uuids=("${uuids[@]}"); return; }
  split "$err"$'\n'"$out"
  excerpt
  not_visible_why="nvidia-smi inside it failed with exit code $rc: $REPLY"
}

# A "systemctl daemon-reload" can take the card away from a running container. Only a call inside it shows that.
lost_its_view() {
  list_visible
  [[ $not_visible_why == *'NVML: Unknown Error'* ]] || return 1
  problem gpu_view_lost "$container lost access to its GPU while it was running (NVML: Unknown Error)." \
    "Recreate it: '$up --force-recreate'."
}

sees_only_expected() {
  local uuid
  list_visible
  [[ ! $not_visible_why ]] || return 1
  for uuid in "${visible_uuids[@]}"; do is_expected "$uuid" || return 1; done
}

note_visible() {
  local uuid others=''
  list_visible
  for uuid in "${visible_uuids[@]}"; do
    if [[ $uuid != @(GPU|MIG)-* ]] || is_expected "$uuid"; then continue; fi
    REPLY=$uuid
    [[ ! ${slot_of[$uuid]+known} ]] || card "$uuid"
    others+="${others:+ and }$REPLY"
  done
  card "$expected_uuid"
  [[ ! $others ]] || notes+=("$container also sees $others and can use it at any time. Check that it requests only \
$REPLY and is not privileged.")
  [[ ! $not_visible_why || $cause == gpu_view_lost ]] ||
    notes+=("It is not known which GPUs $container sees: $not_visible_why.")
}

no_process_yet() {
  local n since now age=''
  since=$(date -d "$started" +%s 2>/dev/null) && printf -v now '%(%s)T' -1 && age=", up for $((now - since)) s,"
  problem no_process_yet "$container$age has no process on any GPU yet: it may still be loading." \
    "Run this script again in a few seconds; 'docker logs --tail 50 $container' shows the progress."
  n=${slot_of[$expected_uuid]}
  ((${#app_row[@]} || ${gpu_used[n]:-0} < 400)) || notes+=("nvidia-smi lists no process on any GPU, although \
${gpu_used[n]} MiB of GPU ${gpu_index[n]:-?} are in use. In an LXC guest and under WSL2 it never lists any, so \
nothing can be proven there.")
}

# --- JSON ------------------------------------------------------------------------------------------

# printable TEXT: sets $REPLY to its first 4096 bytes. Control characters (they could drive a terminal), also C1
# (U+0080 to U+009F), become \u001b etc., and bytes that are not UTF-8 become \ufffd: valid in JSON as well.
printable() {
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
  printable "${REPLY//\"/\\\"}"
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

quote_list() { # TEXT...: sets $REPLY to a JSON list of strings
  local text list=''
  for text; do quote "$text"; list+=",$REPLY"; done
  REPLY="[${list#,}]"
}

print_json() {
  local n gpus='' expected=null box=null own='' others='' ids numbers=${pids[*]}
  for n in "${!gpu_uuid[@]}"; do
    object '#index' "${gpu_index[n]}" uuid "${gpu_uuid[n]}" pci_bus_id "${gpu_bus[n]}" name "${gpu_name[n]}" \
      '#memory_total_mib' "${gpu_total[n]}" '#memory_used_mib' "${gpu_used[n]}" driver_version "${gpu_driver[n]}"
    gpus+="${gpus:+,}$REPLY"
  done
  if [[ $expected_uuid ]]; then
    object id "$expected_id" '#index' "${gpu_index[${slot_of[$expected_uuid]}]}" uuid "$expected_uuid"
    expected=$REPLY
  fi
  if [[ $id ]]; then
    quote_list "${requested[@]}"
    ids=$REPLY
    object name "$container" id "$id" status "$status" health "$health" '#exit_code' "$exit_code" \
      started_at "$started" image "$image" @requested "$ids" '#requested_count' "${requested_count#0}" @pids "[${numbers// /,}]"
    box=$REPLY
  fi
  for n in "${!app_name[@]}"; do
    object '#pid' "${app_pid[n]}" name "${app_name[n]}" gpu_uuid "${app_uuid[n]}" \
      '#gpu_index' "${app_index[n]}" '#memory_mib' "${app_memory[n]}"
    if ((app_own[n])); then own+="${own:+,}$REPLY"; else others+="${others:+,}$REPLY"; fi
  done
  quote_list "${notes[@]}"
  object '#schema' 1 verdict "$verdict" cause "$cause" '#code' "$code" message "$message" cure "$cure" \
    @expected "$expected" @gpus "[$gpus]" @container "$box" @processes "[$own]" @other_processes "[$others]" \
    @processes_listed "$listed" @notes "$REPLY"
  printf '%s\n' "$REPLY"
}

# --- The report for a person -----------------------------------------------------------------------

print_wrapped() { # TEXT [COLOUR]: indented, in lines of up to 80 columns
  local word line=' '
  printable "$1"
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
    printable "${app_name[n]:-?}"
    printf '  GPU %-3s pid %-8s %7s MiB  %s\n' "${app_index[n]:-?}" "${app_pid[n]:-?}" "${app_memory[n]:-?}" "$REPLY"
  done
  ((any)) || print_wrapped none
}

name_requested() { # ID: sets $REPLY to what it means on this machine
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

print_container() {
  local gpu
  [[ $id ]] || { print_wrapped 'not known'; return; }
  print_wrapped "$container (${id:0:12}): $status${started:+ since ${started%.*}}"
  print_wrapped "image: $image"
  for gpu in "${requested[@]}"; do
    name_requested "$gpu"
    print_wrapped "requested: '$gpu' = $REPLY"
  done
  ((!requested_count)) || print_wrapped "requested: a number of GPUs (${requested_count/#-1/all})"
  ((requested_count || ${#requested[@]})) || print_wrapped 'requested: no GPU'
}

print_report() {
  local n bold='' normal='' colour='' word=UNKNOWN
  if [[ -t 1 && ! ${NO_COLOR-} && ${TERM-dumb} != dumb ]]; then bold=$'\e[1m' normal=$'\e[0m' colour=$'\e[33m'; fi
  case $verdict in
    ok) word=OK colour=${colour:+$'\e[32m'} ;;
    misplaced) word=MISPLACED colour=${colour:+$'\e[31m'} ;;
  esac
  printable "${gpu_driver[0]:+ (driver ${gpu_driver[0]})}"
  printf '%s\n' "${bold}1. GPUs of this machine$REPLY$normal"
  ((${#gpu_uuid[@]})) || print_wrapped 'not known'
  for n in "${!gpu_uuid[@]}"; do
    printable "${gpu_name[n]:-?}"
    printf '  GPU %-3s %s, %s of %s MiB used\n          %s  %s\n' "${gpu_index[n]:-?}" "$REPLY" \
      "${gpu_used[n]:-?}" "${gpu_total[n]:-?}" "${gpu_uuid[n]:-?}" "${gpu_bus[n]:-?}"
  done
  printf '\n%s\n' "${bold}2. The container and the GPUs it requested$normal"
  print_container
  printf '\n%s\n' "${bold}3. Its processes on the GPUs$normal"
  print_processes 1
  printf '%s\n' '  others on the GPUs:'
  print_processes 0
  printf '\n%s\n' "${bold}4. Verdict$normal"
  print_wrapped "$word: $message" "$colour"
  [[ ! $cure ]] || print_wrapped "Next: $cure"
  for n in "${notes[@]}"; do print_wrapped "Note: $n"; done
}

# --- Main ------------------------------------------------------------------------------------------

main() {
  local gpus='' apps='' docker_side
  parse_options "$@"
  if type -P nvidia-smi >/dev/null; then
    start gpus nvidia-smi --query-gpu=index,uuid,pci.bus_id,memory.total,memory.used,driver_version,name \
      --format=csv,noheader,nounits
    start apps nvidia-smi --query-compute-apps=gpu_uuid,pid,used_memory --format=csv,noheader,nounits
  fi
  # docker runs meanwhile. Its problems are reported after those of the cards.
  if type -P docker >/dev/null; then
    engine_is_local && read_container
  else
    problem docker_missing 'The docker command is not installed.' 'Install the Docker CLI, or run this script on the GPU host.'
  fi
  docker_side=("$cause" "$message" "$cure") cause='' message='' cure=''
  if [[ ! $gpus ]]; then
    problem nvidia_smi_missing 'nvidia-smi is not installed.' \
      "Install the NVIDIA driver's utilities, or run this script on the GPU host."
  elif read_gpus "$gpus"; then
    read_apps "$apps"
  else
    kill "${apps#* }" 2>/dev/null # it would fail in the same way
  fi
  # Without readable cards, a missing container is to be expected.
  [[ ! ${docker_side[0]} || (${docker_side[0]} == no_such_container && $cause) ]] || problem "${docker_side[@]}"
  judge
  if ((json)); then print_json; elif ((!quiet)); then print_report; fi
  judged=1
  exit "$code"
}

# bash exits with 1 after an error in a script, which must not be taken for a verdict.
# shellcheck disable=SC2317,SC2329 # the trap calls it
unjudged() { ((judged)) || exit 3; }
trap unjudged EXIT
main "$@"
